"""Drawing samples of prompts: what there is to do, a conversation's turns, and the line of a sample."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

from rich.table import Table

from qstar.conversation import answered, as_text
from qstar.data.prompts import Prompt, PromptSource
from qstar.pair import sample_seed
from qstar.prompting import PromptError
from qstar.run.formats import Finished, Key, openai_line, sample_line
from qstar.run.job import Job, parts_of
from qstar.run.run import Run
from qstar.run.summary import draft_table


@dataclass(frozen=True)
class Todo:
    """One sample to draw."""

    prompt: Prompt
    sample_index: int

    @property
    def key(self) -> Key:
        return self.prompt.index, self.sample_index


def todo(prompts: PromptSource, samples_per_prompt: int, first: int = 0) -> Iterator[Todo]:
    """All samples of a run, prompt by prompt: so many of each, or as many as the row itself asks for.

    `first` leaves out so many, where no row asks for more or fewer than the others.
    """
    skipped, inside = divmod(first, samples_per_prompt)
    asked = prompts.starting_at(skipped)
    items = (Todo(prompt, j) for prompt in asked for j in range(prompt.asked.samples or samples_per_prompt))
    return islice(items, inside, None)


def total_samples(job: Job) -> int | None:
    """How many samples a run will have, where that is known."""
    if job.args.use_request_parameters:
        return None
    prompts = job.args.num_samples or job.prompts.count()
    return prompts and prompts * job.args.samples_per_prompt


class Generate(Run):
    """Draws `samples_per_prompt` samples of every prompt."""

    def items(self) -> Iterator[Todo]:
        args, first = self.job.args, 0
        if not args.use_request_parameters:  # blocks at the beginning that are on disk need not be looked at
            missing = (i for i in count() if divmod(i, args.samples_per_prompt) not in self.output.done)
            first = next(missing) // self.block_size * self.block_size
        return todo(self.job.prompts, args.samples_per_prompt, first)

    def total(self) -> int | None:
        return total_samples(self.job)

    def seed(self, item: Todo, turn: int) -> int:
        """Of a sample: a request's own seed gives the same samples wherever the request stands."""
        own = item.prompt.asked.seed
        if own is not None:
            return sample_seed(own, 0, item.sample_index, turn)
        return sample_seed(self.job.args.seed, item.prompt.index, item.sample_index, turn)

    def finished(self, block: list[Todo]) -> Iterator[tuple[Key, Finished | None]]:
        """Decode a block. A conversation with later turns goes round again until the last one is answered."""
        turn, pending = 0, [(item, item.prompt.messages) for item in block]
        while pending:
            requests, conversations = defaultdict(list), {}
            for item, messages in pending:
                prompt, j = item.prompt, item.sample_index
                if prompt.error is not None:
                    self.fail(prompt, None, prompt.error)
                    yield item.key, None
                    continue
                try:
                    decoder, limit = self.decoder(prompt), prompt.asked.max_new_tokens or self.job.args.max_new_tokens
                    request = self.request(item.key, prompt, messages, self.seed(item, turn), limit)
                except PromptError as error:
                    self.fail(prompt, None if turn == 0 else j, str(error))
                    yield item.key, None
                    continue
                conversations[item.key] = item, messages
                requests[decoder].append(request)
            if turn == 0 and self.output.done >= conversations.keys():
                return  # only prompts that fail again are missing
            pending = []
            for sample in chain.from_iterable(decoder.run(of_it) for decoder, of_it in requests.items()):
                item, messages = conversations[sample.request.key]
                prompt, j = item.prompt, item.sample_index
                messages = answered(messages, sample.text)
                if sample.error is not None:
                    self.fail(prompt, j, sample.error)
                    yield item.key, None
                elif turn < len(prompt.later_turns):
                    pending.append((item, [*messages, {"role": "user", "content": prompt.later_turns[turn]}]))
                else:
                    yield item.key, Finished(prompt, j, as_text(messages), sample)
            turn += 1

    def line(self, done: Finished) -> dict[str, Any]:
        if self.job.args.output_format != "openai-batch":
            return sample_line(done)
        names = parts_of(self.job.args)
        sides = ("+".join(filter(None, (names[side], names[f"adapter_{side}"]))) for side in ("theta", "t"))
        model = f"qstar({','.join(sides)})"
        samples = done.prompt.asked.samples or self.job.args.samples_per_prompt
        return openai_line(done, self.pair.tokenizer_theta, model, samples == 1)

    def tables(self) -> Iterator[Table]:
        if self.tally.drafted:
            yield draft_table(self.tally, self.job.args.draft)
