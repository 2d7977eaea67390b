"""`python -m qstar.analyze`: what the numbers of a data set say, before anyone trains on it.

Everything is read from `x.jsonl` and `x.diagnostics.jsonl`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qstar.diagnostics.statistics import STATISTICS, Numbers, analysis, plotted, read_numbers
from qstar.run.options import Parser, failed
from qstar.run.records import RecordError
from qstar.weights import BANDS, WEIGHT

MIN_WIDTH = 116


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


def show(results: list[dict[str, Any]], console: Console) -> None:
    """The tables of one file, or of several side by side."""
    single = len(results) == 1
    table = Table(title="all files" if not single else results[0]["file"], title_justify="left")
    names = [""] + (list(STATISTICS) if single else [result["file"] for result in results])
    for name in names:
        table.add_column(name, justify="right" if name else "left", overflow="fold", no_wrap=not name)

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    for group in ("fields", "of_samples"):
        for field in results[0][group]:
            label = field if group == "fields" else f"{field}, a sample"
            if single:
                table.add_row(label, *(number(results[0][group][field][name]) for name in STATISTICS))
            else:
                cells = (result[group][field] for result in results)
                table.add_row(label, *(f"{number(c['mean'])} ± {number(c['std'])}" for c in cells))
        table.add_section()
    console.print(table)
    table = Table(title="verdicts: mean, and tokens inside the band", title_justify="left")
    for name in ("", "band", *(result["file"] for result in results)):
        table.add_column(name, justify="right" if name else "left", overflow="fold", no_wrap=not name)
    for name, (_, low, high) in BANDS.items():
        cells = []
        for result in results:
            verdict = result["verdicts"][name]
            cells.append(f"{number(verdict['mean'])} {'✓' if verdict['met'] else '✗'} {verdict['tokens_inside']:.1%}")
        table.add_row(name, f"{low:g} to {high:g}", *cells)
    for side in WEIGHT:
        cells = []
        for result in results:
            weight = result["weights"][side]
            cells.append(f"{weight['effective_samples']:.1f} of {result['samples']}")
        table.add_row(f"effective samples, {WEIGHT[side]}", "", *cells)
    console.print(table)
    for result in results:
        for warning in result["warnings"]:
            console.print(f"[bold]Warning:[/] {result['file']}: ", end="")
            console.print(warning, markup=False, highlight=False)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "analyze",
        description="What the numbers of generated or scored samples say: statistics, verdicts and warnings.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="x.jsonl that was written with its diagnostics")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the plots there, as PNG")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the analysis; 0, or 1 with one line on stderr if a file cannot be read."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        numbers = [read_numbers(path) for path in args.files]
        results = [analysis(n) for n in numbers]
        if args.plots is not None:
            save_plots(numbers, args.plots)
    except (RecordError, OSError, ImportError) as error:
        return failed(parser.prog, error)
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        console = Console(soft_wrap=True)
        console.width = max(console.width, MIN_WIDTH)  # numbers that are broken in two cannot be read
        show(results, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
