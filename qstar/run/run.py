"""What a run over a dataset is, whatever it does with each prompt: blocks, order, progress, and nothing lost.

Samples are worked on in blocks of a fixed number of consecutive ones, each block by itself. A resumed run does an
unfinished block again and writes what is missing of it: the same rows then meet in the same batches, and every line
comes out bit for bit as it would have without the interruption.
"""

import json
import sys
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging

from qstar.data.batch import COMPLETIONS
from qstar.data.prompts import Prompt
from qstar.pair import Pair
from qstar.prompting import PromptError
from qstar.run.checkpoints import written_since
from qstar.run.formats import Finished, Key, sample_line
from qstar.run.options import Job, data_source, failed
from qstar.run.output import OutputError
from qstar.sample import DecodeOptions, Request
from qstar.speculate import Tally

BLOCK_BATCHES = 16  # a block's length in batches: a longer one drains its last batch less often, a resume repeats more
SHOWN = 3  # samples that the report shows
FAR_APART_KL = 0.5  # nats a token: above it q* lies where both models find little
BANDS = {"ESS ratio": (0.9, 1.1), "|ΔKL|": (0.0, 0.05), "α": (0.2, 0.8)}


@dataclass
class Summary:
    """Running figures over the tokens of a run, its first samples (row, number, id, question and answer of each), and
    notes for the user.

    JSON has all of it, so that other processes can send theirs.
    """

    samples: int = 0
    tokens: int = 0
    alpha: float = 0.0
    kl: float = 0.0
    gap: float = 0.0
    ratio: float = 0.0
    ratio_tokens: int = 0
    inside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BANDS, 0))
    first: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, notes: Iterable[str]) -> None:
        """Add what the user is to be told, once."""
        self.notes = sorted({*self.notes, *notes})

    def add(self, done: Finished) -> None:
        fields = done.sample.fields
        self.samples += 1
        self.tokens += len(done.sample.token_ids)
        for alpha, kl, kl_t, ess_theta, ess_t in zip(
            *(fields[name] for name in ("alpha", "kl_theta", "kl_t", "ess_theta", "ess_t")), strict=True
        ):
            self.alpha += alpha
            self.kl += max(kl, kl_t)
            self.gap += abs(kl - kl_t)
            seen = {"|ΔKL|": abs(kl - kl_t), "α": alpha}
            if ess_t > 0:
                seen["ESS ratio"] = ess_theta / ess_t
                self.ratio += ess_theta / ess_t
                self.ratio_tokens += 1
            for name, value in seen.items():
                low, high = BANDS[name]
                self.inside[name] += low <= value <= high
        answer = done.messages[-1]["content"]
        question = next((m["content"] for m in reversed(done.messages) if m["role"] == "user"), "")
        # by prompt, not by who finished first: those are the short ones
        self.first = sorted([*self.first, [*done.key, done.id, question, answer]])[:SHOWN]

    def merge(self, other: "Summary") -> None:
        """Add another part of the run."""
        for name, value in vars(other).items():
            if isinstance(value, (int, float)):
                setattr(self, name, getattr(self, name) + value)
        for name in BANDS:
            self.inside[name] += other.inside[name]
        self.first = sorted([*self.first, *other.first])[:SHOWN]
        self.note(other.notes)

    @property
    def mean_kl(self) -> float:
        return self.kl / max(1, self.tokens)

    def figures(self, seconds: float) -> str:
        """The progress bar's figures after so many seconds."""
        alpha = self.alpha / max(1, self.tokens)
        return f"{self.tokens / seconds:.0f} tokens/s  α {alpha:.3f}  KL {self.mean_kl:.4f}"

    def table(self) -> Table:
        table = Table(title=f"q* over {self.tokens} tokens of this run", title_justify="left")
        for column in ("", "mean a token", "band", "tokens inside"):
            table.add_column(column, justify="right" if column else "left")
        n = max(1, self.tokens)
        means = {"ESS ratio": self.ratio / max(1, self.ratio_tokens), "|ΔKL|": self.gap / n, "α": self.alpha / n}
        for name, mean in means.items():
            low, high = BANDS[name]
            band = f"< {high:g}" if low == 0 else f"{low:g} to {high:g}"
            table.add_row(name, f"{mean:.4g}", band, f"{self.inside[name] / n:.1%}")
        table.add_row("KL (nats)", f"{self.mean_kl:.4g}", f"< {FAR_APART_KL:g}", "")
        return table


class Run(ABC):
    """One run of a command over a loaded pair."""

    def __init__(self, job: Job, pair: Pair, console: Console):
        self.job, self.pair, self.console, self.output = job, pair, console, job.output
        self.formats = {"theta": (job.format_theta, pair.tokenizer_theta), "t": (job.format_t, pair.tokenizer_t)}
        for side, (prompt_format, tokenizer) in self.formats.items():
            if unread := prompt_format.unread(tokenizer, prompt_format.template_kwargs):
                raise ValueError(f"--{side}-template-kwargs: the chat template of {side} does not read {unread[0]!r}")
        self.of_run = self.options()
        self.decoders = {self.of_run: pair.decoder(self.of_run)}
        self.summary, self.failed_prompts = Summary(), set()
        self.summary.note(pair.notes)

    def options(self) -> DecodeOptions:
        """Which q* it is, and how much of it at once."""
        args = self.job.args
        return DecodeOptions(
            self.job.settings,
            args.batch_size,
            force_t_first_token=args.force_t_first_token,
            force_t_special_tokens=args.force_t_special_tokens,
        )

    def decoder(self, prompt: Prompt) -> Any:
        """The decoder for a prompt: the run's, or one with what the row itself asks for.

        Raises:
            PromptError: what it asks for cannot be.
        """
        options, asked = self.of_run, prompt.asked
        if asked.settings or asked.stop:
            try:
                settings = replace(options.settings, **asked.settings)
                options = replace(options, settings=settings, stop=tuple(dict.fromkeys((*options.stop, *asked.stop))))
                if options not in self.decoders:
                    self.decoders[options] = self.pair.decoder(options)
            except ValueError as error:
                raise PromptError(f"`body`: {error}") from None
        return self.decoders[options]

    @property
    def tally(self) -> Tally:
        """What came of the drafts."""
        tally = Tally()
        for decoder in self.decoders.values():
            tally.merge(decoder.tally)
        return tally

    @abstractmethod
    def items(self) -> Iterator[Any]:
        """All that is to be done, each with its `key` and `prompt`, in the order of the output."""

    @abstractmethod
    def finished(self, block: list[Any]) -> Iterator[tuple[Key, Finished | None]]:
        """Do a block of items: samples as they finish, None for those that fail."""

    def total(self) -> int | None:
        """How many samples there will be, where that is known."""
        return self.job.args.num_samples or self.job.prompts.count()

    def line(self, done: Finished) -> dict[str, Any]:
        """A sample's line in the journal."""
        return sample_line(done)

    def in_order(self, block: list[Any]) -> Iterator[Finished]:
        """The samples of a block in its order, each as soon as all before it have finished or failed: what is written
        depends neither on the batch size nor on drafts."""
        order, early = deque(item.key for item in block), {}
        for key, done in self.finished(block):
            early[key] = done
            while order and order[0] in early:
                if (done := early.pop(order.popleft())) is not None:
                    yield done

    def request(
        self, key: Key, prompt: Prompt, messages: list[dict[str, Any]], seed: int, max_new_tokens: int
    ) -> Request:
        """Encode a prompt, of which `messages` is the conversation so far.

        Raises:
            PromptError: a template refuses it, or it leaves no room for a token.
        """
        names = [*(("tools",) if prompt.tools else ()), *prompt.template_kwargs]
        names += ["tool_calls"] if any(message.get("tool_calls") for message in messages) else []
        formats = self.formats
        if prompt.endpoint == COMPLETIONS:
            formats = {side: (replace(f, chat_template="none"), tokenizer) for side, (f, tokenizer) in formats.items()}
        for side, (prompt_format, tokenizer) in formats.items():
            unread = prompt_format.unread(tokenizer, names, prompt.tools)
            self.summary.note(f"the chat template of {side} does not read `{name}`, which rows have" for name in unread)
        return self.pair.request(
            key,
            messages,
            seed,
            max_new_tokens,
            formats["theta"][0],
            formats["t"][0],
            self.hint(prompt),
            tools=prompt.tools,
            template_kwargs=prompt.template_kwargs,
        )

    def hint(self, prompt: Prompt) -> str | None:
        name = self.job.args.t_hint_field
        if name is None:
            return None
        hint = prompt.metadata.get(name)
        if hint is None or hint == "":
            raise PromptError(f"the hint column {name!r} is empty")
        return hint if isinstance(hint, str) else json.dumps(hint, ensure_ascii=False)

    def fail(self, prompt: Prompt, sample_index: int | None, error: str) -> None:
        if sample_index is None:
            if prompt.index in self.failed_prompts:
                return
            self.failed_prompts.add(prompt.index)
        self.output.write_error(prompt, sample_index, error)

    def run(self) -> None:
        start, before = time.time(), len(self.output.done)
        if before:
            say_resuming(self.console, self.job, f"{before} samples are on disk")
        with progress_bar(self.console) as progress:
            task = progress.add_task("", total=self.total(), completed=before, figures="")
            for block in blocks(self.items(), BLOCK_BATCHES * self.job.args.batch_size):
                if all(item.key in self.output.done for item in block):
                    continue
                for done in self.in_order(block):
                    if done.key not in self.output.done:
                        self.output.write(done, self.line(done))
                        progress.advance(task)
                    self.summary.add(done)
                    progress.update(task, figures=self.summary.figures(time.time() - start))
            progress.update(task, total=len(self.output.done))
        self.output.finish(data_source(self.job.args))
        self.report(time.time() - start, before)

    def tables(self) -> Iterator[Table]:
        """What the report shows beside the table over the tokens."""
        yield from ()

    def report(self, seconds: float, before: int) -> None:
        say, output = self.console.print, self.output
        tell(self.console, self.summary, self.tables())
        new = len(output.done) - before
        say(f"\n{new} samples in {seconds:.1f} s, {len(output.done)} in all: {output.path}")
        if output.diagnostics_file is not None:
            say(f"diagnostics: {output.diagnostics_file}")
        if output.errors:
            say(f"[bold]{len(output.errors)} failed[/]; reasons in {output.errors_file}, tried again at the next start")


def say_resuming(console: Console, job: Job, done: str) -> None:
    """Say what is done, and warn where large weights may not be those of the first start."""
    console.print(f"resuming: {done}")
    for side, name in (("theta", job.args.model_theta), ("t", job.args.model_t)):
        if job.output.moment is not None and written_since(name, job.output.moment):
            console.print(
                f"[bold]Warning:[/] the weights of {side} were written after the first start of this run. Their "
                "fingerprint is the same, which of so large a model is one of samples: if they are not a copy of what "
                "was there, choose another --output."
            )


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


def tell(console: Console, summary: Summary, tables: Iterable[Table]) -> None:
    """Print the summary, with a warning where the pair is far apart, the other tables, and the first samples."""
    if summary.tokens:
        console.print(summary.table())
    if summary.mean_kl > FAR_APART_KL:
        console.print(
            f"[bold]Warning:[/] the pair is far apart ({summary.mean_kl:.2f} nats a token): q* spreads onto "
            "tokens that both models find unlikely. See «When the pair is far apart» in docs/guide.md."
        )
    for note in summary.notes:
        console.print(f"[bold]Warning:[/] {escape(note)}")  # a token may look like markup
    for table in tables:
        console.print(table)
    for *_, name, question, answer in summary.first:
        console.print(f"\n[bold]{name}[/]", highlight=False)
        console.print(f"user: {question}\nq*: {answer}", markup=False, highlight=False)


def load_pair(args: Namespace) -> Pair:
    """The pair that a command line names, on the backend that it names."""
    logging.disable_progress_bar()
    if args.backend == "vllm":
        from qstar.vllm.engine import EnginePair  # vLLM takes its time to import, and need not be there

        return EnginePair(
            args.model_theta,
            args.model_t,
            dtype=args.dtype,
            max_num_seqs=args.batch_size,
            trust_remote_code=args.trust_remote_code,
            options=args.vllm_options,
        )
    return Pair.from_pretrained(
        args.model_theta,
        args.model_t,
        draft=args.draft,
        revision_theta=args.revision_theta,
        revision_t=args.revision_t,
        dtype=args.dtype,
        device=args.device,
        device_map=args.device_map,
        attn_implementation=args.attn_implementation,
        load_in_4bit=args.load_in_4bit,
        trust_remote_code=args.trust_remote_code,
    )


def blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Cut the run's items into lists of `size`."""
    items = iter(items)
    while block := list(islice(items, size)):
        yield block


def run_command(command: str, job: Job, make_run: Callable[[Job, Pair, Console], Run]) -> int:
    """Load the pair and run; 0 if every sample is on disk, 1 with one line on stderr if something failed."""

    def run() -> int:
        console = Console(stderr=False, soft_wrap=True)
        with job.output:
            console.print(f"prompts: {job.prompts.description}", markup=False, highlight=False)
            make_run(job.of_run(), load_pair(job.args), console).run()
            return 1 if job.output.errors else 0

    return one_line_if_it_fails(command, run)


def one_line_if_it_fails(command: str, run: Callable[[], int]) -> int:
    """What `run` returns; 1, or 130 for an interruption, with one line on stderr if it raises."""
    try:
        return run()
    except torch.OutOfMemoryError:
        message = "out of memory; start again with a smaller --batch-size, what is on disk is kept"
        return failed(f"python -m {command}", message)
    except (OutputError, ValueError, OSError, ImportError) as error:
        return failed(f"python -m {command}", error)
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        return 130
