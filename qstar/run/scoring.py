"""Scoring answers: their tokens behind their prompts, and the importance weights of all of them."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from qstar.conversation import answered, as_text
from qstar.data.answers import Answer
from qstar.forced import Scorer
from qstar.prompting import PromptError
from qstar.run.formats import Finished, Key
from qstar.run.job import option_of, parts_of
from qstar.run.output import ANSWERS, explained, json_line, replacing
from qstar.run.records import RunAnswers, RunFiles
from qstar.run.run import Run
from qstar.sample import Request, Sample, finite
from qstar.weights import WEIGHT, effective_sample_size, weights


class Score(Run):
    """Scores every answer of a dataset, or of a run."""

    def __init__(self, *args):
        super().__init__(*args)
        self.log_weights: dict[str, torch.Tensor] = {}
        self.drawn = RunFiles.drawn_in(self.output.settings | {ANSWERS: self.output.answers})
        self.say_other_weights()

    def say_other_weights(self) -> None:
        """Warn where the models that drew the samples of a run have other weights by now."""
        drawn = self.job.prompts.files.settings if isinstance(self.job.prompts, RunAnswers) else {}
        for part, name in parts_of(self.job.args).items():
            known = drawn.get(f"weights of {part}")
            same = drawn.get(option_of(part)) == name
            if same and known not in (None, self.output.settings.get(f"weights of {part}")):
                self.console.print(
                    f"[bold]Warning:[/] the weights of {part} are not those that the samples were drawn with; they are "
                    "scored by those that are there now."
                )

    def items(self) -> Iterator[Answer]:
        return iter(self.job.prompts)

    def finished(self, block: list[Answer]) -> Iterator[tuple[Key, Finished | None]]:
        samples = []
        for answer in block:
            try:
                samples.append(self.to_score(answer))
            except PromptError as error:
                self.fail(answer.prompt, answer.sample_index, str(error))
                yield answer.key, None
        if self.output.done >= {sample.request.key for sample in samples}:
            return  # only answers that fail again are missing
        of_key = {answer.key: answer for answer in block}
        of_decoder = defaultdict(list)
        for sample in samples:
            of_decoder[self.decoder(of_key[sample.request.key].prompt)].append(sample)
        for sample in chain.from_iterable(Scorer(decoder).run(those) for decoder, those in of_decoder.items()):
            answer = of_key[sample.request.key]
            if sample.error is not None:
                self.fail(answer.prompt, answer.sample_index, sample.error)
                yield answer.key, None
            else:
                before = answer.prompt.messages
                if answer.message is not None or not before:  # of openai-batch the conversation is not known
                    messages = [*before, answer.message or {"role": "assistant", "content": answer.text}]
                else:
                    messages = answered(before, answer.text)
                yield answer.key, Finished(answer.prompt, answer.sample_index, as_text(messages), sample)

    def to_score(self, answer: Answer) -> Sample:
        """The answer's tokens behind its prompts.

        Raises:
            PromptError: there is no answer or no prompt, or the answer has no room behind it.
        """
        if answer.error is not None:
            raise PromptError(answer.error)
        args, pair, ids, reason = self.job.args, self.pair, answer.ids, answer.finish_reason or "eos"
        if ids is not None:
            request = Request(answer.key, answer.ids_theta, answer.ids_t, 0, len(ids))
            if max(ids + request.ids_theta + request.ids_t) >= pair.vocab_size:
                raise PromptError(
                    f"a token is beyond the pair's vocabulary of {pair.vocab_size}: other models wrote it"
                )
        else:
            ids, end = self.encoded(answer)
            if reason == "eos" and not args.no_eos and end is not None:
                ids = [*ids, end]
            elif reason == "eos":
                reason = "length"
            request = self.request(answer.key, answer.prompt, answer.prompt.messages, 0, len(ids))
        shortest, longest = sorted((len(request.ids_theta), len(request.ids_t)))
        if not ids or not shortest or longest + len(ids) > pair.context:
            raise PromptError(
                f"the prompt has {longest if shortest else 0} tokens, the answer {len(ids)}, and the smaller context "
                f"of the pair is {pair.context}"
            )
        return Sample(request, list(ids), answer.text, reason)

    def encoded(self, answer: Answer) -> tuple[list[int], int | None]:
        """The answer's token ids as π_θ would have written them, and the EOS that ends them.

        Raises:
            PromptError: it has calls or thoughts that the template of π_θ does not write.
        """
        (prompt_format, tokenizer), prompt = self.formats["theta"], answer.prompt
        if answer.message is None:
            return tokenizer(answer.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
        ids = prompt_format.encode_turn(
            tokenizer, prompt.messages, answer.message, prompt.tools, prompt.template_kwargs
        )
        # what a template has behind the end of a turn belongs to the next one
        turn = list(takewhile(lambda token: token not in self.pair.eos_ids, ids))
        return turn, ids[len(turn)] if len(turn) < len(ids) else tokenizer.eos_token_id

    def report(self, seconds: float, before: int) -> None:
        if self.output.done:
            self.write_weights()
        super().report(seconds, before)
        if self.output.done:
            for note in self.job.prompts.files.notes if isinstance(self.job.prompts, RunAnswers) else ():
                self.console.print(f"note: {note}", markup=False, highlight=False)
            if outside := len(self.output.done) - len(self.log_weights["theta"]):
                self.console.print(f"[bold]{outside} samples[/] have a token outside q*'s support, and so no weight")
            self.console.print(f"weights: {escape(str(self.weights_file))}")

    @property
    def weights_file(self) -> Path:
        return Path(str(self.output.diagnostics_lines).replace(".diagnostics.jsonl", ".weights.jsonl"))

    def write_weights(self) -> None:
        """Write the importance weights π/q* of all samples; null where a token is outside q*'s support, which leaves a
        sample without a weight."""
        files = RunFiles(self.output.path)
        of_records = [[log_weight(record.diagnostics, side) for side in WEIGHT] for record in files]
        for side, log_w in zip(WEIGHT, torch.tensor(of_records, dtype=torch.float64).unbind(1), strict=True):
            self.log_weights[side] = log_w[log_w < torch.inf]
        columns = {}
        for side, log_w in self.log_weights.items():
            columns[f"log_weight_{side}"] = log_w
            columns[f"clipped_weight_{side}"] = weights(log_w, high=self.job.args.clip)
            columns[f"normalised_weight_{side}"] = weights(log_w, normalise=True)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        with explained(self.weights_file), replacing(self.weights_file) as file:
            for record in files:
                numbers = record.diagnostics
                line = {name: numbers[name] for name in ("id", "prompt_index", "sample_index", "num_tokens")}
                values = next(rows) if numbers["logq_sum"] is not None else [-torch.inf] * len(columns)
                file.write(json_line(line | dict(zip(columns, map(finite, values), strict=True))))

    def tables(self) -> Iterator[Table]:
        if not self.log_weights:
            return
        count, clip = len(self.output.done), self.job.args.clip
        if not self.drawn:
            yield self.ratios_table(count)
            return
        table = Table(title=f"importance weights of {count} samples, clipped at {clip:g}", title_justify="left")
        for column in ("", "mean log weight", "clipped", "effective samples", "of all"):
            table.add_column(column, justify="right" if column else "left")
        for side, log_w in self.log_weights.items():
            if len(log_w):
                ess, clipped = effective_sample_size(log_w), (log_w.exp() > clip).double().mean().item()
                table.add_row(
                    WEIGHT[side], f"{log_w.mean().item():.3f}", f"{clipped:.1%}", f"{ess:.1f}", f"{ess / count:.1%}"
                )
        yield table

    def ratios_table(self, count: int) -> Table:
        """In place of weights, of answers that q* did not draw."""
        title = (
            f"q* did not draw these {count} answers: π/q* of them are ratios of densities, and no importance weights"
        )
        table = Table(title=title, title_justify="left")
        for column in ("", "mean log ratio", "median"):
            table.add_column(column, justify="right" if column else "left")
        for side, log_w in self.log_weights.items():
            if len(log_w):
                table.add_row(WEIGHT[side], f"{log_w.mean().item():.3f}", f"{log_w.median().item():.3f}")
        return table


def log_weight(numbers: dict[str, Any], side: str) -> float:
    """log π/q* of a sample by its line of the diagnostics: ∞ where q* has no such sample."""
    if numbers["logq_sum"] is None:
        return torch.inf
    logp = numbers[f"logp_{side}_sum"]
    return -torch.inf if logp is None else logp - numbers["logq_sum"]
