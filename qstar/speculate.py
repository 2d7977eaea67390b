"""Speculative decoding: how many tokens to draft, and what came of it (theory/speculative.md).

A draft model proposes tokens with the very noise that the true tokens will be drawn with, so a draft is right exactly
where it equals q*'s own draw. Nothing here changes a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from qstar.cache import continues, kept

MAX_DRAFT = 15
PROBE_EVERY = 16  # rounds without drafts after which one token is drafted, to see whether it pays by now
PRIOR_ACCEPTANCE, PRIOR_DRAFTS = 0.8, 4  # what a sequence is believed to accept before it has been tried


@dataclass(frozen=True)
class Costs:
    """What decoding costs on a device, in reads of one parameter.

    Rough on purpose: a measurement would make K, and so the last digits of the diagnostics, differ from run to run.
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

    Args:
        speculate: that many always, or `auto`: what gives the most tokens for the cost, by the sequences' acceptance.
        draft: the model that runs once a token; None where nothing is drafted.
        verify: the models that run once a round.
    """

    def __init__(self, speculate: int | str, draft: torch.nn.Module | None, verify: Sequence[torch.nn.Module]):
        self.speculate, self.draft = speculate, draft and ModelCosts(draft)
        self.verify = [ModelCosts(model) for model in verify] if draft else []
        self.total, self.rounds, self.rounds_without = Tally(), 0, 0

    def cost(self, rows: int, drafts: int) -> float:
        """Rough cost of a round."""
        drafting = (drafts + 1) * self.draft.forward(rows, 1) + drafts * self.draft.draw(rows)
        verifying = sum(model.verify(rows, drafts + 1) for model in self.verify)
        return drafting + verifying + self.draft.draw(rows * (drafts + 1))

    def choose(self, sequences: Sequence[Tally]) -> int:
        """Tokens to draft for these live sequences."""
        if self.draft is None:
            return 0
        self.rounds += 1
        if self.speculate != "auto":
            return int(self.speculate)
        common = self.total.acceptance(PRIOR_ACCEPTANCE, PRIOR_DRAFTS)
        rates = [tally.acceptance(common, PRIOR_DRAFTS) for tally in sequences]
        rows, powers, expected = len(rates), [1.0] * len(rates), 0.0
        best, best_rate = 0, 0.0
        for drafts in range(MAX_DRAFT + 1):
            expected += sum(powers)
            powers = [power * rate for power, rate in zip(powers, rates, strict=True)]
            rate = expected / self.cost(rows, drafts)
            if rate > best_rate:
                best, best_rate = drafts, rate
        self.rounds_without = 0 if best else self.rounds_without + 1
        if self.rounds_without == PROBE_EVERY:
            self.rounds_without, best = 0, 1
        return best


def overlap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 − TV(p, q) = Σ min(p, q) of rows [B, V] of log-probabilities: [B]. No coupling accepts more."""
    return torch.minimum(log_p, log_q).exp().sum(-1)
