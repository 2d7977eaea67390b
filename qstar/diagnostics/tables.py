"""The statistics of runs as tables on a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qstar.diagnostics.statistics import OUTLIERS, STATISTICS, about
from qstar.weights import BANDS, WEIGHT

WIDEST = 1000  # columns that tables may take, however narrow the terminal is


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def table_of(title: str, columns: list[str]) -> Table:
    """An empty table, its first column of labels; without lines between columns, so that many find room."""
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    for name in ("", *columns):
        table.add_column(escape(name), justify="right" if name else "left", overflow="fold", no_wrap=not name)
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
