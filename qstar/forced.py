"""Teacher forcing: q*'s numbers for tokens that are there already.

Both models go over prompt and tokens a chunk of positions at a time, with their KV caches, so that a chunk's logits and
activations are all that is held beside the caches, however long a sequence is.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from qstar.cache import Side
from qstar.decode import Decoder
from qstar.sample import Sample, numbers_of
from qstar.slots import closed_up

CHUNK_TOKENS = 2048  # that one forward pass takes, of all rows together: enough to keep the weights busy
CHUNK_LOGITS = 1 << 25  # logits of one model that are held at once: 128 MiB in float32
SORTED_BATCHES = 16  # batches whose samples are sorted by length, so that few columns are padding


class Scorer:
    """Gives given tokens the numbers that `Decoder` would have written beside them.

    Args:
        decoder: of the pair; its options say which q* the tokens are held against, and the batch size.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def run(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Fill `fields` and `status` of samples that have their `request` and `token_ids`; `error` and `finish_reason`
        of those that cannot be scored. Samples come back batch by batch, near their order."""
        source, batch_size = iter(samples), self.decoder.options.batch_size
        while window := list(islice(source, SORTED_BATCHES * batch_size)):
            window.sort(key=lambda s: len(s.token_ids))
            for start in range(0, len(window), batch_size):
                batch = window[start : start + batch_size]
                self._score(list(batch))
                yield from batch

    @torch.inference_mode()
    def _score(self, live: list[Sample]) -> None:
        sides = self.decoder.sides()
        self._look_up(live, [side.prefill(side.prompts(s.request for s in live)) for side in sides], 0)
        done = 1  # tokens scored of every live sample; those before the last are to be read
        while self._drop_finished(live, sides, done):
            longest = max(len(s.token_ids) for s in live)
            chunk = min(CHUNK_TOKENS, CHUNK_LOGITS // self.decoder.rule.vocab_size) // len(live)
            # rows that are at their end already go on with padding, and have no positions beyond the context
            count = max(1, min(longest - done, chunk, self.decoder.room(sides) + 1))
            block = [s.token_ids[done - 1 : done - 1 + count] for s in live]
            block = torch.tensor([ids + [sides[0].pad_id] * (count - len(ids)) for ids in block])  # [B, count]
            self._look_up(live, [side.advance(block) for side in sides], done)
            done += count

    def _look_up(self, live: list[Sample], logits: Iterable[tuple[Tensor, ...]], start: int) -> None:
        """Numbers of the tokens from `start` by the logits [B, K, V] of each side's copies, π_θ's first."""
        logits_theta, logits_t = (x for of_side in logits for x in of_side)
        count = logits_theta.shape[1]
        tokens = [s.token_ids[start : start + count] for s in live]
        padded = torch.tensor([ids + [-1] * (count - len(ids)) for ids in tokens], device=logits_theta.device)
        step = self.decoder.rule.step(
            logits_theta.flatten(0, 1),
            logits_t.flatten(0, 1).to(logits_theta.device),
            first=start == 0,
            tokens=padded.flatten(),
        )
        numbers = numbers_of(step).unflatten(0, (len(live), -1)).tolist()
        for sample, ids, of_sample in zip(live, tokens, numbers, strict=True):
            for _, (_, status, *values) in zip(ids, of_sample, strict=False):
                if not sample.add(status, values):
                    sample.finish_reason = "error"
                    break

    @staticmethod
    def _drop_finished(live: list[Sample], sides: Iterable[Side], done: int) -> bool:
        """Drop the samples whose tokens are all scored, and those that cannot be; whether any are left."""
        leaving = [i for i, s in enumerate(live) if s.error is not None or len(s.token_ids) <= done]
        if leaving:
            rows = closed_up(len(live), leaving)
            live[:] = [live[i] for i in rows]
            for side in sides:
                side.keep(rows)
        return bool(live)
