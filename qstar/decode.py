"""The decoding loop: two models, two KV caches, one token of q* a step, or several where a draft of them was right.

A finished row leaves the batch and a waiting prompt takes its place, so that the cost follows the live tokens. The
noise of a token depends on its sequence's seed and its position only, so neither the rows that share a batch nor drafts
change anything but rounding.

On a GPU nothing of a step waits for the device: what the next one starts from stays there (`qstar.batch`), and the
numbers of a step are read while the next one runs. So the host sees an end one step late, and drops what was drawn
behind it.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from qstar.batch import Rows, Underway
from qstar.cache import Side
from qstar.graphs import Graphs
from qstar.rule import Rule
from qstar.sample import Ending, Request, Sample, numbers_of
from qstar.slots import closed_up
from qstar.speculate import DraftLength, Tally, overlap
from qstar_kernels import dispatch

OVERLAP_EVERY = 8  # drafting rounds from one measurement of 1 − TV(q*, draft model) to the next
PREFILL_TOKENS = 16384  # padded prompt tokens that one forward pass takes: bounds the activations, not the results


class Decoder:
    """Draws sequences from q* of a pair; `run` is the loop.

    Args:
        theta, t: the models of π_θ and π_t; the same object for one model with two prompts, which then goes forward
            once for both.
        vocab_size: the tokenizer's length; both models' logits are cut to it.
        eos_ids: ids that end a sequence, of both models.
        special_ids: ids that take π_t's probability under `force_t_special_tokens`.
        tokenizer: turns ids into text, for stop strings and the samples' text; None leaves the text empty.
        options: how to draw.
        context: tokens that each model has room for; drafts do not go beyond it.
        draft: who drafts under `options.speculate`: `theta`, `t`, or a third model, which sees π_θ's prompt.

    Attributes:
        tally: what came of the drafts since the decoder was made.
    """

    def __init__(
        self, theta, t, vocab_size: int, eos_ids: set[int], special_ids: set[int], tokenizer, options,
        context: int = 1 << 30, draft="theta",
    ):  # fmt: skip
        if options.cuda_graphs not in ("auto", "off"):
            raise ValueError(f"cuda_graphs is {options.cuda_graphs!r}; it must be 'auto' or 'off'")
        self.models, self.context, self.draft = (theta, t), context, draft
        self.options = options
        self.rule = Rule(
            vocab_size, options.settings, options.force_t_first_token, options.force_t_special_tokens, special_ids
        )
        # of the draft model alone, which is then both sides
        self.of_drafts = replace(options.settings, method="fixed", target_top_k=0, target_top_p=1.0)
        self.ending = Ending(eos_ids, tokenizer, options)
        self.end_ids = torch.tensor(sorted(eos_ids | self.ending.stop_ids), dtype=torch.int64)
        self.pad_id = min(eos_ids, default=0)
        self.tally = Tally()

    def sides(self, together: bool = True) -> list[Side]:
        """Empty caches of the two models, π_θ's first; one for both where they are one model and go `together`."""
        theta, t = self.models
        if theta is t and together:
            return [Side(theta, self.pad_id, ("theta", "t"))]
        return [Side(theta, self.pad_id, ("theta",)), Side(t, self.pad_id, ("t",))]

    def _sides_and_drafter(self) -> tuple[list[Side], Side | None]:
        """Empty caches of the two models, and the one that drafts, maybe one of them."""
        speculate, one_of_them = self.options.speculate, isinstance(self.draft, str)
        # where one model stands for both sides, drafting with it costs what deciding costs, so `auto` never does
        sides = self.sides(together=not one_of_them or speculate in (0, "auto"))
        if speculate == 0 or (one_of_them and len(sides) == 1):
            return sides, None
        drafter = sides[self.draft == "t"] if one_of_them else Side(self.draft, self.pad_id, ("theta",))
        for side in (*sides, drafter):
            side.forgets = True
        return sides, drafter

    @property
    def waits(self) -> bool:
        """Whether the host looks at a step's numbers before it goes on: where nothing runs beside it, it loses no time
        by that, and would lose a forward pass over each row that has ended."""
        return self.models[0].device.type != "cuda"

    @property
    def records(self) -> bool:
        """Whether steps without drafts are recorded and played (`qstar.graphs`)."""
        return self.options.cuda_graphs == "auto" and self.models[0].device.type == "cuda"

    def run(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Generate all requests; samples come in the order in which they finish, which is the same every time."""
        batch_size, source = self.options.batch_size, iter(requests)
        waiting = deque(islice(source, batch_size))
        sides, drafter = self._sides_and_drafter()
        caches = sides if drafter is None or drafter in sides else [*sides, drafter]
        for side in caches:
            side.expects = len(waiting)
        others = [side for side in sides if side is not drafter]
        length = DraftLength(self.options.speculate, drafter and drafter.model, [side.model for side in others])
        rows, underway = Rows([], sides[0].device), deque()
        graphs = Graphs(sides, self._draw) if self.records and drafter is None else None
        # what is forgotten of drafts hangs on the numbers
        late = 0 if self.waits or drafter is not None else 1
        while waiting or rows.samples or underway:
            # a quarter of the batch at a time, so that prompts share their prefill
            if waiting and (not rows.samples or batch_size - len(rows.samples) >= max(1, batch_size // 4)):
                with torch.inference_mode():
                    underway.append(self._start(rows, self._admit(waiting, batch_size - len(rows.samples)), caches))
                    finished = self._settle(underway, late, rows, caches)
                yield from finished
            with torch.inference_mode():
                if rows.samples:
                    drafts = min(length.choose([s.tally for s in rows.samples]), self.room(caches))
                    underway.append(self._round(rows, sides, drafter, drafts, length, graphs))
                finished = self._settle(underway, late if rows.samples else 0, rows, caches)
            yield from finished
            waiting.extend(islice(source, batch_size - len(waiting)))

    def room(self, caches: Iterable[Side]) -> int:
        """Tokens that can be drafted before a row outgrows the context."""
        return max(0, self.context - max(max(side.lengths) for side in caches) - 1)

    @staticmethod
    def _admit(waiting: deque[Request], free: int) -> list[Request]:
        admitted, longest = [], 0
        while waiting and len(admitted) < free:
            longest = max(longest, len(waiting[0].ids_theta), len(waiting[0].ids_t))
            if admitted and longest * (len(admitted) + 1) > PREFILL_TOKENS:
                break
            admitted.append(waiting.popleft())
        return admitted

    def _start(self, rows: Rows, requests: list[Request], caches: list[Side]) -> Underway:
        """Read prompts and draw the first token of each: new rows behind the others."""
        new = Rows([Sample(request) for request in requests], rows.state.device)
        logits = [x for side in caches for x in side.prefill(side.prompts(requests))]
        step = self._draw(new, *logits[:2], first=True)
        rows.join(new)
        return Underway(new.samples, [step])

    def _round(
        self,
        rows: Rows,
        sides: list[Side],
        drafter: Side | None,
        drafts: int,
        length: DraftLength,
        graphs: Graphs | None,
    ) -> Underway:
        """Draw at least one token of every live row: draft some, decide on all in one pass, forget the wrong ones."""
        samples = list(rows.samples)
        if drafter is None:
            numbers = None if graphs is None else graphs.step(rows)
            if numbers is None:
                numbers = self._draw(rows, *[x for side in sides for x in side.advance(rows.tokens)])
            return Underway(samples, [numbers])
        block, drafted, of_drafter = self._drafted(rows, drafter, drafts, drafter in sides)
        both = []
        for side in sides:
            both += [torch.cat(of_drafter, 1)] if side is drafter else side.advance(block)
        drafted, measured = drafted.to(rows.state.device, non_blocking=True), []
        if drafted.shape[1] and length.rounds % OVERLAP_EVERY == 0:
            measured.append(self._overlap(of_drafter[0][:, 0], *(logits[:, 0] for logits in both)))

        def then(kept: list[int], drafted: list[list[int]], measured: tuple[float, float] = (0.0, 0.0)) -> None:
            for sample, n, guesses in zip(samples, kept, drafted, strict=True):
                drawn = sample.token_ids[len(sample.token_ids) - n :]
                right = next((i for i, (x, y) in enumerate(zip(guesses, drawn, strict=False)) if x != y), None)
                tried = min(len(guesses), n)
                for tally in (sample.tally, length.total, self.tally):
                    tally.add(*((tried, tried) if right is None else (right, right + 1)), n)
            self.tally.overlap += measured[0]
            self.tally.overlap_rows += int(measured[1])
            for side in sides:
                side.forget([block.shape[1] - n for n in kept])
            if drafter not in sides:
                read = len(of_drafter)
                if any(n > read and not s.finish_reason for n, s in zip(kept, samples, strict=True)):
                    drafter.advance(block[:, -1:])
                    read += 1
                drafter.forget([max(0, read - n) for n in kept])
            length.took(drafts)

        return Underway(samples, [self._draw(rows, *both, drafted), drafted, *measured], then)

    def _drafted(self, rows: Rows, drafter: Side, drafts: int, reads_last: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Draft tokens, int64 [B, drafts]; before them what is to be read, int64 [B, K], and the logits [B, 1, V] that
        they are from. One of the two sides reads the last draft too."""
        block, drafted, of_drafter = rows.tokens.to(drafter.device, non_blocking=True), [], []
        ended = torch.zeros(len(block), dtype=torch.bool, device=drafter.device)
        for step in range(drafts + reads_last):
            (logits,) = drafter.advance(block[:, -1:])
            of_drafter.append(logits)
            if step == drafts:
                break
            drafted.append(self._draft(rows, logits[:, 0], step)[:, None])
            if self.waits:
                ended |= torch.isin(drafted[-1][:, 0], self.end_ids.to(ended.device))
                if ended.all():
                    break  # nothing follows, should the drafts be right
            block = torch.cat([block, drafted[-1]], 1)
        return block, torch.cat([block[:, :0], *drafted], 1), of_drafter

    def _draft(self, rows: Rows, logits: Tensor, ahead: int) -> Tensor:
        """Token `ahead` of the next one by the draft model's logits [B, V] and the token's own noise: int64 [B]."""
        noise = rows.noise(logits.device, ahead)
        step, _ = dispatch.step("auto", logits, logits, self.of_drafts, self.rule.vocab_size, **noise)
        return step.token.clamp(min=0)  # a row that cannot be drawn from is found out when it is verified

    def _overlap(self, of_drafter: Tensor, logits_theta: Tensor, logits_t: Tensor) -> Tensor:
        """Σ 1 − TV(q*, draft model) over the rows [B, V] of the first draft, and how many they are: float64 [2]."""
        settings, vocab_size = self.options.settings, self.rule.vocab_size
        logits_t = logits_t.to(logits_theta.device, non_blocking=True)
        _, log_q = dispatch.step("auto", logits_theta, logits_t, settings, vocab_size, want_log_q=True)
        _, log_p = dispatch.step("auto", of_drafter, of_drafter, self.of_drafts, vocab_size, want_log_q=True)
        found = overlap(log_p.to(log_q.device, non_blocking=True), log_q)
        valid = found.isfinite()
        return torch.stack([found.where(valid, 0.0).sum().double(), valid.sum().double()])

    def _draw(
        self, rows: Rows, logits_theta: Tensor, logits_t: Tensor, drafted: Tensor | None = None, first: bool = False
    ) -> Tensor:
        """Draw from logits [B, K, V]: tokens and their numbers, float64 [B, K, 2 + F], on their device.

        `drafted`, int64 [B, at least K − 1], was read for the columns after the first. The rows go on from their tokens
        up to the first that differs from its draft, since the next columns follow from the draft.
        """
        device, count = logits_theta.device, logits_theta.shape[1]
        logits_t = logits_t.flatten(0, 1).to(device, non_blocking=True)
        step = self.rule.step(logits_theta.flatten(0, 1), logits_t, first=first, **rows.noise(device, count=count))
        rows.draw(step.token.unflatten(0, (-1, count)).to(rows.state.device, non_blocking=True), drafted)
        return numbers_of(step).unflatten(0, (-1, count))

    def _settle(self, underway: deque[Underway], late: int, rows: Rows, caches: Iterable[Side]) -> list[Sample]:
        """Read the numbers of all steps but the last `late` ones, and drop the rows that have ended: the samples that
        are finished."""
        finished = []
        while len(underway) > late:
            finished += self._read(underway.popleft())
        drawn = {id(s) for step in underway for s in step.samples}  # a token that is not in the sample yet
        leaving = {
            i
            for i, s in enumerate(rows.samples)
            if s.finish_reason or len(s.token_ids) + (id(s) in drawn) >= s.request.max_new_tokens
        }
        if leaving:
            staying = closed_up(len(rows.samples), leaving)
            rows.keep(staying)
            for side in caches:
                side.keep(staying)
        return finished

    def _read(self, step: Underway) -> list[Sample]:
        """Append a step's tokens and numbers to its samples, each up to its end: those that it ends."""
        numbers, *of_drafts = step.read()  # [B][K][2 + F]
        drafted = of_drafts[0] if of_drafts else [[]] * len(numbers)
        kept, finished = [], []
        for sample, of_row, guesses in zip(step.samples, numbers, drafted, strict=True):
            if sample.finish_reason:  # drawn before its end was known
                continue
            before = len(sample.token_ids)
            for column, (token, status, *values) in enumerate(of_row):
                sample.draw(token, status, values)
                self.ending.finish(sample)
                if sample.finish_reason or (column < len(of_row) - 1 and guesses[column] != token):
                    break
            kept.append(len(sample.token_ids) - before)
            if sample.finish_reason:
                finished.append(sample)
        if step.then is not None:
            step.then(kept, *of_drafts)
        return finished
