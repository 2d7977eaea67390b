"""What a run tells its user: running figures, how far it is, and at the end tables and the first samples."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qstar.run.formats import Finished
from qstar.speculate import Tally
from qstar.weights import BANDS, FAR_APART_KL, derived

SHOWN = 3  # samples that are shown at the end
SHOWN_MEANS = ("kl", *(quantity for quantity, _, _ in BANDS.values()))


@dataclass
class Summary:
    """Running figures over the tokens of a run, its first samples (row, number, id, question and answer of each), and
    notes for the user.

    JSON has all of it, so that other processes can send theirs.
    """

    samples: int = 0
    tokens: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SHOWN_MEANS, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SHOWN_MEANS, 0))  # tokens that have the number
    inside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BANDS, 0))
    first: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, notes: Iterable[str]) -> None:
        """Add what the user is to be told, once."""
        self.notes = sorted({*self.notes, *notes})

    def add(self, done: Finished) -> None:
        fields = {name: np.array(values) for name, values in done.sample.fields.items()}
        fields |= derived(fields)
        self.samples += 1
        self.tokens += len(done.sample.token_ids)
        for name in SHOWN_MEANS:
            known = fields[name][~np.isnan(fields[name])]
            self.sums[name] += float(known.sum())
            self.counts[name] += len(known)
        for name, (quantity, low, high) in BANDS.items():
            self.inside[name] += int(((fields[quantity] >= low) & (fields[quantity] <= high)).sum())
        answer = done.messages[-1]["content"]
        question = next((m["content"] for m in reversed(done.messages) if m["role"] == "user"), "")
        # by prompt, not by who finished first: those are the short ones
        self.first = sorted([*self.first, [*done.key, done.id, question, answer]])[:SHOWN]

    def merge(self, other: "Summary") -> None:
        """Add another part of the run."""
        self.samples += other.samples
        self.tokens += other.tokens
        for mine, others in ((self.sums, other.sums), (self.counts, other.counts), (self.inside, other.inside)):
            mine.update({name: mine[name] + value for name, value in others.items()})
        self.first = sorted([*self.first, *other.first])[:SHOWN]
        self.note(other.notes)

    def mean(self, quantity: str) -> float:
        """Over the tokens that have one of `SHOWN_MEANS`."""
        return self.sums[quantity] / max(1, self.counts[quantity])

    def figures(self, seconds: float) -> str:
        """The progress bar's figures after so many seconds."""
        return f"{self.tokens / seconds:.0f} tokens/s  α {self.mean('alpha'):.3f}  KL {self.mean('kl'):.4f}"

    def table(self) -> Table:
        table = Table(title=f"q* over {self.tokens} tokens of this run", title_justify="left")
        for column in ("", "mean a token", "band", "tokens inside"):
            table.add_column(column, justify="right" if column else "left")
        for name, (quantity, low, high) in BANDS.items():
            band = f"< {high:g}" if low == 0 else f"{low:g} to {high:g}"
            share = self.inside[name] / max(1, self.tokens)
            table.add_row(name, f"{self.mean(quantity):.4g}", band, f"{share:.1%}")
        table.add_row("KL (nats)", f"{self.mean('kl'):.4g}", f"< {FAR_APART_KL:g}", "")
        return table


def draft_table(tally: Tally, draft: str) -> Table:
    """How often each place of the drafts was right."""
    title = f"drafts by {draft}: {tally.tokens / tally.passes:.2f} tokens a verifying pass"
    if tally.overlap_rows:
        title += f", 1 − TV(q*, {draft}) {tally.overlap / tally.overlap_rows:.3f}"
    table = Table(title=title, title_justify="left")
    for column in ("place in the draft", "drafted", "right"):
        table.add_column(column, justify="right")
    for place, (drafted, accepted) in enumerate(zip(tally.drafted, tally.accepted, strict=True), 1):
        table.add_row(str(place), str(drafted), f"{accepted / drafted:.1%}")
    return table


def progress_bar(console: Console) -> Progress:
    """A bar over the samples of a run; its task has a field `figures`."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(TextColumn("samples"), *columns, console=console)


def tell(console: Console, summary: Summary, tables: Iterable[Table], drawn: bool = True) -> None:
    """Print the summary, with a warning where the pair is far apart, the other tables, and the first samples, which are
    q*'s if it has `drawn` them."""
    if summary.tokens:
        console.print(summary.table())
    if summary.mean("kl") > FAR_APART_KL:
        console.print(
            f"[bold]Warning:[/] the pair is far apart ({summary.mean('kl'):.2f} nats a token): q* spreads onto "
            "tokens that both models find unlikely. See «When the pair is far apart» in docs/guide.md."
        )
    for note in summary.notes:
        console.print(f"[bold]Warning:[/] {escape(note)}")  # a token may look like markup
    for table in tables:
        console.print(table)
    for *_, name, question, answer in summary.first:
        console.print(f"\n[bold]{name}[/]", highlight=False)
        console.print(f"user: {question}\n{'q*' if drawn else 'answer'}: {answer}", markup=False, highlight=False)
