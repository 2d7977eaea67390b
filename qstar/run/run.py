"""What a run over a dataset is, whatever it does with each prompt: blocks, order, progress, and nothing lost.

Samples are worked on in blocks of a fixed number of consecutive ones, each block by itself. A resumed run does an
unfinished block again and writes what is missing of it: the same rows then meet in the same batches, and every line
comes out bit for bit as it would have without the interruption.
"""

import json
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from itertools import islice
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qstar.backends import load_pair
from qstar.data.batch import COMPLETIONS
from qstar.data.prompts import Prompt
from qstar.pair import Pair
from qstar.prompting import PromptError
from qstar.run.checkpoints import written_since
from qstar.run.formats import Finished, Key, sample_line
from qstar.run.job import Job, data_source
from qstar.run.options import BLOCK_BATCHES
from qstar.run.summary import Summary, progress_bar, tell
from qstar.sample import DecodeOptions, Request
from qstar.speculate import Tally


class Run(ABC):
    """One run of a command over a loaded pair."""

    def __init__(self, job: Job, pair: Pair, console: Console):
        self.job, self.pair, self.console, self.output = job, pair, console, job.output
        self.formats = {"theta": (job.format_theta, pair.tokenizer_theta), "t": (job.format_t, pair.tokenizer_t)}
        for side, (prompt_format, tokenizer) in self.formats.items():
            if unread := prompt_format.unread(tokenizer, prompt_format.template_kwargs):
                raise ValueError(f"--{side}-template-kwargs: the chat template of {side} does not read {unread[0]!r}")
        # which q* it is, how much of it at once, and where it ends, as far as the command has options for it
        said = {f.name: getattr(job.args, f.name, None) for f in fields(DecodeOptions)} | {"settings": job.settings}
        said = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
        self.of_run = DecodeOptions(**{name: value for name, value in said.items() if value is not None})
        self.decoders = {self.of_run: pair.decoder(self.of_run)}
        self.summary, self.failed_prompts = Summary(), set()
        self.drawn = True  # the answers are q*'s
        self.summary.note(pair.notes)

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
        """All that is to be done, each with its `key` and `prompt`, in the order of the output; whole blocks at the
        beginning may be left out that are on disk."""

    @abstractmethod
    def finished(self, block: list[Any]) -> Iterator[tuple[Key, Finished | None]]:
        """Do a block of items: samples as they finish, None for those that fail."""

    @property
    def block_size(self) -> int:
        """Samples of a block."""
        return BLOCK_BATCHES * self.job.args.batch_size

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

    def write(self, block: list[Any]) -> Iterator[Finished]:
        """Do a block and put what is not on disk yet there, sample by sample."""
        for done in self.in_order(block):
            if done.key not in self.output.done:
                self.output.write(done, self.line(done))
            self.summary.add(done)
            yield done
        self.output.sync()

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
            for block in blocks(self.items(), self.block_size):
                if all(item.key in self.output.done for item in block):
                    continue
                for _ in self.write(block):
                    figures = self.summary.figures(time.time() - start)
                    progress.update(task, completed=len(self.output.done), figures=figures)
            progress.update(task, completed=len(self.output.done), total=len(self.output.done))
        self.output.finish(data_source(self.job.args))
        self.report(time.time() - start, before)

    def tables(self) -> Iterator[Table]:
        """What the report shows beside the table over the tokens."""
        yield from ()

    def report(self, seconds: float, before: int) -> None:
        say, output = self.console.print, self.output
        tell(self.console, self.summary, self.tables(), self.drawn)
        new = len(output.done) - before
        say(f"\n{new} samples in {seconds:.1f} s, {len(output.done)} in all: {escape(str(output.path))}")
        if output.diagnostics_file is not None:
            say(f"diagnostics: {escape(str(output.diagnostics_file))}")
        if output.errors:
            reasons = escape(str(output.errors_file))
            say(f"[bold]{len(output.errors)} failed[/]; reasons in {reasons}, tried again at the next start")


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


def blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Cut the run's items into lists of `size`."""
    items = iter(items)
    while block := list(islice(items, size)):
        yield block


def run_job(job: Job, make_run: Callable[[Job, Pair, Console], Run]) -> int:
    """Load the pair and run; 0 if every sample is on disk, 1 if a prompt failed."""
    console = Console(stderr=False, soft_wrap=True, quiet=job.args.quiet)
    with job.output:
        console.print(f"prompts: {job.prompts.description}", markup=False, highlight=False)
        make_run(job.of_run(), load_pair(job.args), console).run()
        return 1 if job.output.errors else 0
