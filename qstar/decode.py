"""The decoding loop: two models, two KV caches, one token of q* a step, or several where a draft of them was right.

A finished row leaves the batch at once and a waiting prompt takes its place, so that the cost follows the live tokens.
The noise of a token depends on its sequence's seed and its position only, so neither the rows that share a batch nor
drafts change anything but rounding.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from qstar.cache import Side
from qstar.rule import Rule
from qstar.sample import Ending, Request, Sample, numbers_of
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

    def run(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Generate all requests; samples come in the order in which they finish, which is the same every time."""
        source, waiting = iter(requests), deque()
        sides, drafter = self._sides_and_drafter()
        caches = sides if drafter is None or drafter in sides else [*sides, drafter]
        others = [side for side in sides if side is not drafter]
        length = DraftLength(self.options.speculate, drafter and drafter.model, [side.model for side in others])
        live: list[Sample] = []
        batch_size = self.options.batch_size
        while True:
            waiting.extend(islice(source, batch_size - len(waiting)))
            if not waiting and not live:
                return
            # a quarter of the batch at a time, so that prompts share their prefill
            if waiting and (not live or batch_size - len(live) >= max(1, batch_size // 4)):
                samples = [Sample(request) for request in self._admit(waiting, batch_size - len(live))]
                with torch.inference_mode():
                    prompts = [side.prompts(s.request for s in samples) for side in caches]
                    new, logits = zip(*(side.prefill(p) for side, p in zip(caches, prompts, strict=True)), strict=True)
                    logits_theta, logits_t = [x for of_side in logits for x in of_side][:2]
                    self._draw(samples, logits_theta, logits_t)
                    finished = self._drop_finished(samples, new)
                    if samples:
                        for side, newcomers in zip(caches, new, strict=True):
                            side.join(newcomers)
                    live += samples
                yield from finished
            if live:
                with torch.inference_mode():
                    drafts = min(length.choose([s.tally for s in live]), self.room(caches))
                    self._round(live, sides, drafter, drafts, length)
                    length.took(drafts)
                    finished = self._drop_finished(live, caches)
                yield from finished

    def room(self, caches: Iterable[Side]) -> int:
        """Tokens that can be drafted before a row outgrows the context."""
        return max(0, self.context - max(max(side.lengths) for side in caches) - 1)

    def _round(
        self, live: list[Sample], sides: list[Side], drafter: Side | None, drafts: int, length: DraftLength
    ) -> None:
        """Draw at least one token of every live row: draft some, decide on all in one pass, forget the wrong ones."""
        block = torch.tensor([s.token_ids[-1] for s in live])[:, None]  # [B, read], the tokens that are not cached yet
        drafted, of_drafter = [], []
        if drafter is not None:
            block = block.to(drafter.device)
            ended = torch.zeros(len(live), dtype=torch.bool, device=block.device)
            # as one of the two sides it reads the last draft too
            for step in range(drafts + (drafter in sides)):
                (logits,) = drafter.advance(block[:, -1:])  # [B, 1, V]
                of_drafter.append(logits)
                if step == drafts:
                    break
                drafted.append(self._draft(live, logits[:, 0], step).to(block.device))
                ended |= torch.isin(drafted[-1], self.end_ids.to(block.device))
                if ended.all():
                    break  # nothing follows, should the drafts be right
                block = torch.cat([block, drafted[-1][:, None]], dim=1)
        both = []
        for side in sides:
            both += [torch.cat(of_drafter, 1)] if side is drafter else side.advance(block)
        if drafted and length.rounds % OVERLAP_EVERY == 0:
            self._measure_overlap(of_drafter[0][:, 0], *(logits[:, 0] for logits in both))
        before = [len(s.token_ids) for s in live]
        drafted = torch.stack(drafted, 1).tolist() if drafted else [[]] * len(live)
        self._draw(live, *both, drafted)
        kept = [len(s.token_ids) - n for s, n in zip(live, before, strict=True)]
        if drafter is None:
            return
        for sample, n, tokens in zip(live, kept, drafted, strict=True):
            drawn = sample.token_ids[len(sample.token_ids) - n :]
            wrong = next((i for i, (x, y) in enumerate(zip(tokens, drawn, strict=False)) if x != y), None)
            tried = min(len(tokens), n)
            for tally in (sample.tally, length.total, self.tally):
                tally.add(tried if wrong is None else wrong, tried if wrong is None else wrong + 1, n)
        for side in sides:
            side.forget([block.shape[1] - n for n in kept])
        if drafter not in sides:
            read = len(of_drafter)
            if any(n > read and not s.finish_reason for n, s in zip(kept, live, strict=True)):
                drafter.advance(block[:, -1:])
                read += 1
            drafter.forget([max(0, read - n) for n in kept])

    def _draft(self, samples: list[Sample], logits: Tensor, ahead: int) -> Tensor:
        """Token `ahead` of the next one by the draft model's logits [B, V] and the token's own noise: int64 [B]."""
        noise = self._noise(samples, logits, ahead)
        step, _ = dispatch.step("auto", logits, logits, self.of_drafts, self.rule.vocab_size, **noise)
        return step.token.clamp(min=0)  # a row that cannot be drawn from is found out when it is verified

    def _measure_overlap(self, of_drafter: Tensor, logits_theta: Tensor, logits_t: Tensor) -> None:
        """Add 1 − TV(q*, draft model) of the rows [B, V] of the first draft to the tally."""
        settings, vocab_size = self.options.settings, self.rule.vocab_size
        logits_t = logits_t.to(logits_theta.device)
        _, log_q = dispatch.step("auto", logits_theta, logits_t, settings, vocab_size, want_log_q=True)
        _, log_p = dispatch.step("auto", of_drafter, of_drafter, self.of_drafts, vocab_size, want_log_q=True)
        found = overlap(log_p.to(log_q.device), log_q)
        found = found[found.isfinite()]
        self.tally.overlap += found.sum().item()
        self.tally.overlap_rows += len(found)

    @staticmethod
    def _noise(samples: list[Sample], logits: Tensor, ahead: int = 0, count: int = 1) -> dict[str, Tensor]:
        """Seeds and positions of `count` tokens of each row from `ahead` of its next one, int64 [B · count] each."""
        seeds = torch.tensor([s.request.seed for s in samples], device=logits.device)
        positions = torch.tensor([len(s.token_ids) + ahead for s in samples], device=logits.device)
        if count == 1:
            return {"seeds": seeds, "positions": positions}
        positions = positions[:, None] + torch.arange(count, device=logits.device)
        return {"seeds": seeds.repeat_interleave(count), "positions": positions.flatten()}

    @staticmethod
    def _admit(waiting: deque[Request], free: int) -> list[Request]:
        admitted, longest = [], 0
        while waiting and len(admitted) < free:
            longest = max(longest, len(waiting[0].ids_theta), len(waiting[0].ids_t))
            if admitted and longest * (len(admitted) + 1) > PREFILL_TOKENS:
                break
            admitted.append(waiting.popleft())
        return admitted

    def _draw(
        self, samples: list[Sample], logits_theta: Tensor, logits_t: Tensor, drafted: list[list[int]] | None = None
    ) -> None:
        """Draw from logits [B, K, V] and append the tokens, with their numbers, to the rows' samples.

        `drafted` are the tokens a row, at least K − 1, that were read for the columns after the first; None for the
        first token of a sequence. A row takes its tokens up to the first that differs from its draft, since the next
        columns follow from the draft, and up to its end.
        """
        count = logits_theta.shape[1]
        logits_theta, logits_t = logits_theta.flatten(0, 1), logits_t.flatten(0, 1).to(logits_theta.device)
        step = self.rule.step(
            logits_theta, logits_t, first=drafted is None, **self._noise(samples, logits_theta, count=count)
        )
        numbers = numbers_of(step).unflatten(0, (len(samples), -1)).tolist()  # [B][K][2 + F], one transfer
        for i, sample in enumerate(samples):
            for column, (token, status, *values) in enumerate(numbers[i]):
                sample.draw(token, status, values)
                self.ending.finish(sample)
                if sample.finish_reason or (column < count - 1 and drafted[i][column] != token):
                    break

    @staticmethod
    def _drop_finished(samples: list[Sample], sides: Iterable[Side]) -> list[Sample]:
        """Take the finished samples out of `samples` and their rows out of the sides."""
        finished = [s for s in samples if s.finish_reason]
        if finished:
            rows = [i for i, s in enumerate(samples) if not s.finish_reason]
            samples[:] = [samples[i] for i in rows]
            for side in sides:
                side.keep(rows)
        return finished
