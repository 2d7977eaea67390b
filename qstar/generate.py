"""`python -m qstar.generate`: prompts in, samples from q* on disk.

Samples are decoded in blocks of a fixed number of consecutive samples, each block from an empty batch. A resumed run
decodes an unfinished block again and writes what is missing of it: the same rows then meet in the same batches, and
every line comes out bit for bit as it would have without the interruption.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging

from qstar.arguments import Job, prepare
from qstar.data import DataError, Prompt
from qstar.decode import DecodeOptions
from qstar.demo import PROMPTS
from qstar.formats import Finished, Key, openai_line, sample_line
from qstar.output import OutputError
from qstar.pair import Pair, sample_seed
from qstar.prompting import PromptError
from qstar.speculate import Tally

BLOCK_BATCHES = 16  # a block's length in batches: a longer one drains its last batch less often, a resume repeats more
FAR_APART_KL = 0.5  # nats a token: above it q* lies where both models find little
BANDS = {"ESS ratio": (0.9, 1.1), "|ΔKL|": (0.0, 0.05), "α": (0.2, 0.8)}


@dataclass
class Summary:
    """Running figures over the tokens of a run."""

    samples: int = 0
    tokens: int = 0
    alpha: float = 0.0
    kl: float = 0.0
    gap: float = 0.0
    ratio: float = 0.0
    ratio_tokens: int = 0
    inside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BANDS, 0))

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
            if ess_theta > 0 and ess_t > 0:
                seen["ESS ratio"] = ess_theta / ess_t
                self.ratio += ess_theta / ess_t
                self.ratio_tokens += 1
            for name, value in seen.items():
                low, high = BANDS[name]
                self.inside[name] += low <= value <= high

    @property
    def mean_kl(self) -> float:
        return self.kl / max(1, self.tokens)

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


def blocks(prompts: Iterable[Prompt], samples_per_prompt: int, size: int) -> Iterator[list[tuple[Prompt, int]]]:
    """Cut the run's samples, prompt by prompt, into lists of `size`."""
    pairs = ((prompt, j) for prompt in prompts for j in range(samples_per_prompt))
    while block := list(islice(pairs, size)):
        yield block


class Run:
    """One run of the command over a loaded pair."""

    def __init__(self, job: Job, pair: Pair, console: Console):
        self.job, self.pair, self.console, self.output = job, pair, console, job.output
        args = job.args
        self.decoder = pair.decoder(
            DecodeOptions(
                job.settings,
                args.batch_size,
                tuple(args.stop),
                args.speculate,
                args.force_t_first_token,
                args.force_t_special_tokens,
            )
        )
        self.summary, self.shown, self.failed_prompts = Summary(), [], set()

    def in_order(self, block: list[tuple[Prompt, int]]) -> Iterator[Finished]:
        """The samples of a block in its order, each as soon as all before it have finished or failed: what is written
        depends neither on the batch size nor on drafts."""
        order, early = deque((prompt.index, j) for prompt, j in block), {}
        for key, done in self.finished(block):
            early[key] = done
            while order and order[0] in early:
                if (done := early.pop(order.popleft())) is not None:
                    yield done

    def finished(self, block: list[tuple[Prompt, int]]) -> Iterator[tuple[Key, Finished | None]]:
        """Decode a block: samples as they finish, None for those that fail. A conversation with later turns goes round
        again until the last one is answered."""
        turn, pending = 0, [(prompt, j, prompt.messages) for prompt, j in block]
        while pending:
            requests, conversations = [], {}
            for prompt, j, messages in pending:
                if prompt.error is not None:
                    self.fail(prompt, None, prompt.error)
                    yield (prompt.index, j), None
                    continue
                try:
                    request = self.pair.request(
                        (prompt.index, j),
                        messages,
                        sample_seed(self.job.args.seed, prompt.index, j, turn),
                        self.job.args.max_new_tokens,
                        self.job.format_theta,
                        self.job.format_t,
                        self.hint(prompt),
                    )
                except PromptError as error:
                    self.fail(prompt, None if turn == 0 else j, str(error))
                    yield (prompt.index, j), None
                    continue
                conversations[request.key] = prompt, j, messages
                requests.append(request)
            if turn == 0 and self.output.done >= conversations.keys():
                return  # only prompts that fail again are missing
            pending = []
            for sample in self.decoder.run(requests):
                prompt, j, messages = conversations[sample.request.key]
                messages = [*messages, {"role": "assistant", "content": sample.text}]
                if sample.error is not None:
                    self.fail(prompt, j, sample.error)
                    yield (prompt.index, j), None
                elif turn < len(prompt.later_turns):
                    pending.append((prompt, j, [*messages, {"role": "user", "content": prompt.later_turns[turn]}]))
                else:
                    yield (prompt.index, j), Finished(prompt, j, messages, sample)
            turn += 1

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

    def line(self, done: Finished) -> dict[str, Any]:
        if self.job.args.output_format != "openai-batch":
            return sample_line(done)
        model = f"qstar({self.job.args.model_theta},{self.job.args.model_t})"
        return openai_line(done, self.pair.tokenizer_theta, model, self.job.args.samples_per_prompt == 1)

    def run(self) -> None:
        args = self.job.args
        start, before = time.time(), len(self.output.done)
        if before:
            self.console.print(f"resuming: {before} samples are on disk")
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(TextColumn("samples"), *columns, console=self.console) as progress:
            prompts = args.num_samples or self.job.prompts.count()
            total = prompts * args.samples_per_prompt if prompts else None
            task = progress.add_task("", total=total, completed=before, figures="")
            for block in blocks(self.job.prompts, args.samples_per_prompt, BLOCK_BATCHES * args.batch_size):
                if all((prompt.index, j) in self.output.done for prompt, j in block):
                    continue
                for done in self.in_order(block):
                    if done.key not in self.output.done:
                        self.output.write(done, self.line(done))
                        progress.advance(task)
                    self.summary.add(done)
                    # by prompt, not by who finished first: those are the short ones
                    self.shown = sorted([*self.shown, done], key=lambda d: d.key)[:3]
                    s, seconds = self.summary, time.time() - start
                    figures = f"{s.tokens / seconds:.0f} tokens/s  α {s.alpha / s.tokens:.3f}  KL {s.mean_kl:.4f}"
                    progress.update(task, figures=figures)
            progress.update(task, total=len(self.output.done))
        self.output.finish(Path(args.dataset or PROMPTS).stem)
        self.report(time.time() - start, before)

    def report(self, seconds: float, before: int) -> None:
        say, summary, output = self.console.print, self.summary, self.output
        if summary.tokens:
            say(summary.table())
            if summary.mean_kl > FAR_APART_KL:
                say(
                    f"[bold]Warning:[/] the pair is far apart ({summary.mean_kl:.2f} nats a token): q* spreads onto "
                    "tokens that both models find unlikely. See «When the pair is far apart» in docs/guide.md."
                )
            if self.decoder.tally.drafted:
                say(draft_table(self.decoder.tally, self.job.args.draft))
            for done in self.shown:
                say(f"\n[bold]{done.id}[/]", highlight=False)
                say(
                    f"user: {done.messages[-2]['content']}\nq*: {done.messages[-1]['content']}",
                    markup=False,
                    highlight=False,
                )
        new = len(output.done) - before
        say(f"\n{new} samples in {seconds:.1f} s, {len(output.done)} in all: {output.path}")
        if output.diagnostics_file is not None:
            say(f"diagnostics: {output.diagnostics_file}")
        if output.errors:
            say(f"[bold]{len(output.errors)} failed[/]; reasons in {output.errors_file}, tried again at the next start")


def failed(message: str) -> int:
    print(f"python -m qstar.generate: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if every sample is on disk, 1 if something failed, 2 for a wrong command line."""
    console = Console(stderr=False, soft_wrap=True)
    job = prepare(argv)
    try:
        with job.output:
            console.print(f"prompts: {job.prompts.description}", markup=False, highlight=False)
            logging.disable_progress_bar()
            args = job.args
            pair = Pair.from_pretrained(
                args.model_theta,
                args.model_t,
                draft=args.draft,
                dtype=args.dtype,
                device=args.device,
                device_map=args.device_map,
                attn_implementation=args.attn_implementation,
                load_in_4bit=args.load_in_4bit,
                trust_remote_code=args.trust_remote_code,
            )
            Run(job, pair, console).run()
            return 1 if job.output.errors else 0
    except torch.OutOfMemoryError:
        return failed("out of memory; start again with a smaller --batch-size, what is on disk is kept")
    except (OutputError, DataError, ValueError, OSError, ImportError) as error:
        return failed(str(error))
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
