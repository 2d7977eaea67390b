"""What a token is drawn from, or held against, under the options of a run: q*, or π_t where that is forced."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qstar_kernels import QStarStep, dispatch
from qstar_kernels.types import Settings

FORCED = ("force_t_first_token", "force_t_special_tokens")


@dataclass(frozen=True)
class Rule:
    """The distribution of every token of a sequence.

    Args:
        vocab_size: the tokenizer's length; both models' logits are cut to it.
        settings: the rule for α, temperature and truncation.
        force_t_first_token: the first token comes from π_t.
        force_t_special_tokens: special tokens take π_t's own probability, the others share the rest as q* has it.
        special_ids: those special tokens.
    """

    vocab_size: int
    settings: Settings = field(default_factory=Settings)
    force_t_first_token: bool = False
    force_t_special_tokens: bool = False
    special_ids: Iterable[int] = ()
    _on: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def step(self, logits_theta: Tensor, logits_t: Tensor, *, first: bool = False, **what: Tensor) -> QStarStep:
        """Draw a token a row, or look up given ones, with all their numbers.

        Args:
            logits_theta, logits_t: [B, V] on one device.
            first: the rows are those of the first tokens of their sequences.
            **what: `seeds` and `positions`, int64 [B], to draw; `tokens`, int64 [B], to look up.
        """
        settings = self._settings(first)
        if not self.force_t_special_tokens:
            return dispatch.step("auto", logits_theta, logits_t, settings, self.vocab_size, **what)[0]
        forced = self._special_from_t(logits_theta, logits_t, settings)
        greedy = settings.temperature == 0 and "tokens" not in what
        of_forced = Settings(method="fixed", temperature=0.0 if greedy else 1.0)
        drawn, _ = dispatch.step("auto", forced, forced, of_forced, **what)
        stats, _ = dispatch.step("auto", logits_theta, logits_t, settings, self.vocab_size, tokens=drawn.token)
        stats.logq, stats.status = drawn.logq, torch.maximum(stats.status, drawn.status)
        return stats

    def log_q(self, logits_theta: Tensor, logits_t: Tensor, *, first: bool = False) -> Tensor:
        """The whole distribution that `step` draws from: log-probabilities [B, vocab_size], −inf where cut."""
        settings = self._settings(first)
        if self.force_t_special_tokens:
            return self._special_from_t(logits_theta, logits_t, settings)
        return dispatch.step("auto", logits_theta, logits_t, settings, self.vocab_size, want_log_q=True)[1]

    def _special(self, device: torch.device) -> Tensor:
        """The special tokens, brought to a device once."""
        if device not in self._on:
            self._on[device] = torch.tensor(sorted(self.special_ids), dtype=torch.int64, device=device)
        return self._on[device]

    def _settings(self, first: bool) -> Settings:
        if first and self.force_t_first_token:
            return replace(self.settings, method="fixed", alpha=0.0, alpha_min=0.0, alpha_max=1.0)
        return self.settings

    def _special_from_t(self, logits_theta: Tensor, logits_t: Tensor, settings: Settings) -> Tensor:
        """log q* [B, V] with the special tokens at π_t's own probability and the others scaled to the rest.

        Where truncation leaves no other token, there is nothing that could take the rest: the special ones are then
        all, in the proportions that π_t has them in.
        """
        _, log_q = dispatch.step("auto", logits_theta, logits_t, settings, self.vocab_size, want_log_q=True)
        special = self._special(log_q.device)
        temperature = settings.temperature or 1.0
        log_t = (logits_t[:, : self.vocab_size].to(log_q.dtype) / temperature).log_softmax(-1)[:, special]
        others = log_q.index_fill(-1, special, -torch.inf)
        rest = others.log_softmax(-1)
        forced = rest + torch.log1p(-log_t.exp().sum(-1, keepdim=True).clamp(max=1))
        alone = (others == -torch.inf).all(-1, keepdim=True)
        forced = forced.masked_fill(alone, -torch.inf)
        alone_t = log_t.log_softmax(-1).masked_fill(log_t == -torch.inf, -torch.inf)
        forced[:, special] = torch.where(alone, alone_t, log_t)
        return forced
