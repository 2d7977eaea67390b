"""Speculative decoding: how many tokens to draft, and what came of it (theory/speculative.md).

A draft model proposes tokens with the very noise that the true tokens will be drawn with, so a draft is right exactly
where it equals q*'s own draw. Nothing here changes a token.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import median

import torch
from torch import Tensor

from qstar.cache import continues, kept

MAX_DRAFT = 15
PROBE_EVERY = 16  # rounds without drafts after which one token is drafted, to see whether it pays by now
PLAIN_ROUNDS, PLAIN_EVERY = 3, 32  # rounds without drafts before the first with some, and among those
REMEMBERED = 9  # rounds of a kind whose median is what such a round takes
WORTH = 1.05  # as many tokens a second as without drafts: less is noise
LOSS = 0.02  # of the time, that rounds with drafts may have taken beyond what their tokens take without
PRIOR_ACCEPTANCE, PRIOR_DRAFTS = 0.8, 4  # what a sequence is believed to accept before it has been tried


@dataclass(frozen=True)
class Costs:
    """What decoding costs on a device, in reads of one parameter.

    A guess at how rounds of different sizes compare, which measured rounds correct.
    """

    layer: float  # fixed, of each layer in a forward pass
    balance: float  # tokens whose arithmetic costs as much as reading the parameters
    draw: float  # fixed, of a draw with all that is around it
    logit: float  # of each logit that is drawn from


CPU_COSTS = Costs(layer=2e6, balance=6.0, draw=2e6, logit=35.0)  # measured
OTHER_COSTS = Costs(layer=1e8, balance=200.0, draw=1e8, logit=1.0)  # estimated for a GPU


@dataclass
class Tally:
    """Drafts of a run, or of one sequence, by their place in the draft (0 is the first).

    `drafted[i]` counts drafts whose predecessors were all right, `accepted[i]` those of them that were right too;
    `passes` counts rows of verifying passes, `tokens` what they gave. `overlap` sums 1 − TV(q*, draft model) at
    `overlap_rows` first places.
    """

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    overlap: float = 0.0
    overlap_rows: int = 0

    def add(self, right: int, tried: int, tokens: int) -> None:
        """One pass of one row: `tried` drafts counted, the first `right` of them equal to the true token."""
        self.passes += 1
        self.tokens += tokens
        for counts, n in ((self.drafted, tried), (self.accepted, right)):
            counts.extend([0] * (n - len(counts)))
            for i in range(n):
                counts[i] += 1
        self.accepted.extend([0] * (len(self.drafted) - len(self.accepted)))

    def merge(self, other: "Tally") -> None:
        """Add the drafts of another part of the run."""
        for name in ("drafted", "accepted"):
            ours, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, [sum(counts) for counts in zip_longest(ours, theirs, fillvalue=0)])
        for name in ("passes", "tokens", "overlap", "overlap_rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def acceptance(self, prior: float, weight: float) -> float:
        """Share of the drafts that were right, drawn towards `prior` as by `weight` drafts."""
        return (sum(self.accepted) + prior * weight) / (sum(self.drafted) + weight)


class ModelCosts:
    """Rough cost of a model's forward pass and of a draw from its logits, in reads of one parameter."""

    def __init__(self, model: torch.nn.Module):
        costs, config = CPU_COSTS if model.device.type == "cpu" else OTHER_COSTS, model.config.get_text_config()
        parameters = sum(p.numel() for p in model.parameters())
        self.fixed, self.token = config.num_hidden_layers * costs.layer + parameters, parameters / costs.balance
        self.has_states, self.continues = "states" in kept(model), continues(model)
        self.fixed_draw, self.row = costs.draw, config.vocab_size * costs.logit

    def forward(self, rows: int, tokens: int) -> float:
        """Of one pass over `tokens` tokens in each of `rows` rows."""
        return self.fixed + self.token * rows * tokens

    def verify(self, rows: int, tokens: int) -> float:
        """Of a pass over a token and its drafts in each row, and of what puts states back behind wrong ones."""
        if not self.continues:
            return tokens * self.forward(rows, 1)
        # rows with as many right drafts are read again together, half of the tokens in the mean
        again = self.fixed * min(rows, tokens - 1) + self.token * rows * tokens / 2
        return self.forward(rows, tokens) + (again if self.has_states and tokens > 1 else 0.0)

    def draw(self, rows: int) -> float:
        """Of one draw from `rows` rows of logits."""
        return self.fixed_draw + self.row * rows


class DraftLength:
    """Chooses how many tokens to draft in each round.

    `auto` measures: rounds without drafts come first, in each size of batch, and then now and then; rounds with drafts
    follow where, by the sequences' acceptance, they are expected to give more tokens a second, and go on while they do.
    What they lose against rounds without is counted, and where it comes to a `LOSS` of the time there are no drafts.

    Args:
        speculate: that many always, or `auto`.
        draft: the model that runs once a token; None where nothing is drafted.
        verify: the models that run once a round.
        clock: seconds, as they pass.
    """

    def __init__(
        self,
        speculate: int | str,
        draft: torch.nn.Module | None,
        verify: Sequence[torch.nn.Module],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.speculate, self.draft, self.clock = speculate, draft and ModelCosts(draft), clock
        self.verify = [ModelCosts(model) for model in verify] if draft else []
        self.total, self.rounds, self.rounds_without, self.rounds_with = Tally(), 0, 0, 0
        self.elapsed = self.lost = 0.0  # seconds of all rounds, and of those with drafts too many
        # seconds for a unit of `cost`, of the last rounds of a size (a power of two of rows) and a number of drafts
        self.units: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self.begun, self.rows, self.tokens = 0.0, 0, 0

    def cost(self, rows: int, drafts: int) -> float:
        """Rough cost of a round."""
        drafting = (drafts + 1) * self.draft.forward(rows, 1) + drafts * self.draft.draw(rows)
        verifying = sum(model.verify(rows, drafts + 1) for model in self.verify)
        return drafting + verifying + self.draft.draw(rows * (drafts + 1))

    def seconds(self, rows: int, drafts: int) -> float:
        """What such a round takes, by those that were most like it."""
        size = rows.bit_length()
        like = min(self.units, key=lambda kind: (abs(kind[1] - drafts), abs(kind[0] - size)))
        if (size, 0) in self.units and like[0] != size:  # rather one of this size without drafts
            of_size = [kind for kind in self.units if kind[0] == size]
            like = min(of_size, key=lambda kind: abs(kind[1] - drafts))
        return median(self.units[like]) * self.cost(rows, drafts)

    def choose(self, sequences: Sequence[Tally]) -> int:
        """Tokens to draft for these live sequences."""
        if self.draft is None:
            return 0
        self.rounds += 1
        chosen = self._auto(sequences) if self.speculate == "auto" else int(self.speculate)
        self.begun, self.rows, self.tokens = self.clock(), len(sequences), self.total.tokens
        return chosen

    def _auto(self, sequences: Sequence[Tally]) -> int:
        size, rows = len(sequences).bit_length(), len(sequences)
        if len(self.units[size, 0]) < PLAIN_ROUNDS or self.lost > LOSS * self.elapsed:
            return 0
        most = min(MAX_DRAFT, 2 * max(1, *(drafts for _, drafts in self.units)))  # not far beyond what was tried
        best, rate = self.most_tokens(sequences, most)
        if rate < WORTH * rows / self.seconds(rows, 0):
            self.rounds_without += 1
            best = int(self.rounds_without % PROBE_EVERY == 0)
        else:
            self.rounds_with += 1
            best = 0 if self.rounds_with % PLAIN_EVERY == 0 else best
        return best

    def most_tokens(self, sequences: Sequence[Tally], most: int) -> tuple[int, float]:
        """The number of drafts up to `most` that gives the most tokens a second, and how many that are."""
        common = self.total.acceptance(PRIOR_ACCEPTANCE, PRIOR_DRAFTS)
        rates = [tally.acceptance(common, PRIOR_DRAFTS) for tally in sequences]
        powers, expected, found = [1.0] * len(rates), 0.0, []
        for drafts in range(most + 1):
            expected += sum(powers)
            powers = [power * rate for power, rate in zip(powers, rates, strict=True)]
            found.append((expected / self.seconds(len(rates), drafts), drafts))
        rate, best = max(found)
        return best, rate

    def took(self, drafts: int) -> None:
        """The round that was chosen last is over, with so many drafts."""
        if self.draft is None or self.speculate != "auto":
            return
        seconds, size = self.clock() - self.begun, self.rows.bit_length()
        self.elapsed += seconds
        self.units[size, drafts].append(seconds / self.cost(self.rows, drafts))
        if drafts:  # by what such rounds take: another process may have had the processor in this one
            without = (self.total.tokens - self.tokens) / self.rows * self.seconds(self.rows, 0)
            self.lost += self.seconds(self.rows, drafts) - without


def overlap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 − TV(p, q) = Σ min(p, q) of rows [B, V] of log-probabilities: [B]. No coupling accepts more."""
    return torch.minimum(log_p, log_q).exp().sum(-1)
