"""`python -m qstar.analyze`: what the numbers of a data set say, before anyone trains on it.

Everything is read from what `qstar.generate` or `qstar.score` wrote, in whichever format.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qstar.diagnostics.statistics import OUTLIERS, STATISTICS, Numbers, about, analysis, plotted, read_all
from qstar.run.options import Parser, failed
from qstar.run.records import RecordError, RunFiles, names_of
from qstar.weights import BANDS, WEIGHT

WIDEST = 1000  # columns that tables may take, however narrow the terminal is


def save_plots(numbers: list[Numbers], folder: Path) -> None:
    """Draw all plots as PNG files into a folder, which is made.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the folder cannot be written to.
    """
    from qstar.diagnostics.plots import all_plots, png  # matplotlib is an extra

    folder.mkdir(parents=True, exist_ok=True)
    for name, _, draw in all_plots(plotted(numbers)):
        (folder / f"{name}.png").write_bytes(png(draw(False), transparent=False))


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def table_of(title: str, columns: list[str]) -> Table:
    """An empty table, its first column of labels; without lines between columns, so that many find room."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left", overflow="fold", no_wrap=not name)
    return table


def statistics_tables(results: list[dict[str, Any]]) -> Iterator[Table]:
    """Statistics of tokens, and of samples: of one file, or the means of several side by side."""
    for group, what in (("fields", "tokens"), ("of_samples", "samples")):
        if len(results) == 1:
            table = table_of(f"{what} of {results[0]['file']}", list(STATISTICS))
            for field, found in results[0][group].items():
                table.add_row(field, *(number(found[name]) for name in STATISTICS))
        else:
            table = table_of(f"{what}: mean ± standard deviation", [result["file"] for result in results])
            for field in results[0][group]:
                cells = (result[group][field] for result in results)
                table.add_row(field, *(f"{number(c['mean'])} ± {number(c['std'])}" for c in cells))
        yield table


def verdicts_table(results: list[dict[str, Any]]) -> Table:
    """Each band with the mean and the tokens inside, and what the samples are worth as weighted ones."""
    table = table_of("verdicts: mean, and tokens inside the band", ["band", *(result["file"] for result in results)])
    for name, (_, low, high) in BANDS.items():
        cells = []
        for result in results:
            verdict = result["verdicts"][name]
            cells.append(f"{number(verdict['mean'])} {'✓' if verdict['met'] else '✗'} {verdict['tokens_inside']:.1%}")
        table.add_row(name, f"{low:g} to {high:g}", *cells)
        if any(r["verdicts"][name]["met"] != r["verdicts"][name]["met_without_outliers"] for r in results):
            middles = (r["verdicts"][name] for r in results)
            cells = (
                f"{number(v['mean_without_outliers'])} {'✓' if v['met_without_outliers'] else '✗'}" for v in middles
            )
            table.add_row(f"  without {OUTLIERS:.0%} of outliers", "", *cells)
    for side in WEIGHT:
        found = [result["weights"].get(side) for result in results]
        if any(found):
            cells = (
                f"{weight['effective_samples']:.1f} of {result['samples']}" if weight else "–"
                for weight, result in zip(found, results, strict=True)
            )
            table.add_row(f"effective samples, {WEIGHT[side]}", "", *cells)
    return table


def show(results: list[dict[str, Any]], console: Console) -> None:
    """The tables of one file, or of several side by side, and what is to be said of each."""
    tables = [*statistics_tables(results), verdicts_table(results)]
    # numbers that are broken in two cannot be read: rather lines that are too long
    wide = console.options.update(width=WIDEST)
    console.width = max(console.width, *(console.measure(table, options=wide).maximum for table in tables))
    for table in tables:
        console.print(table)
        console.print()
    for result in results:
        for line in about(result):
            console.print(f"{result['file']}: {line}", markup=False, highlight=False)
        for warning in result["warnings"]:
            console.print(f"[bold]Warning:[/] {escape(result['file'])}: ", end="")
            console.print(warning, markup=False, highlight=False)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "analyze",
        description="What the numbers of generated or scored samples say: statistics, verdicts and warnings.",
    )
    what = "x.jsonl or another output that was written with its diagnostics, or the folder of its parts"
    parser.add_argument("files", nargs="+", metavar="FILE", help=what)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the plots there, as PNG")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the analysis; 0, or 1 with one line on stderr if a file cannot be read."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        runs = [RunFiles(path) for path in args.files]
        numbers = read_all(runs, names_of(runs), Console(stderr=True))
        results = [analysis(n) for n in numbers]
        if args.plots is not None:
            save_plots(numbers, args.plots)
    except (RecordError, OSError, ImportError) as error:
        return failed(parser.prog, error)
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        show(results, Console(soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
