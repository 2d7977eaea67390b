"""What a token is drawn from, or held against, under the options of a run: q*, or π_t where that is forced."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qstar_kernels import QStarStep, qstar_logprobs, qstar_sample, qstar_stats
from qstar_kernels.types import Settings


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

    def step(self, logits_theta: Tensor, logits_t: Tensor, *, first: bool = False, **what: Tensor) -> QStarStep:
        """Draw a token a row, or look up given ones, with all their numbers.

        Args:
            logits_theta, logits_t: [B, V] on one device.
            first: the rows are those of the first tokens of their sequences.
            **what: `seeds` and `positions`, int64 [B], to draw; `tokens`, int64 [B], to look up.
        """
        options = self._options(first)
        if not self.force_t_special_tokens:
            return (qstar_stats if "tokens" in what else qstar_sample)(logits_theta, logits_t, **what, **options)
        forced = self._special_from_t(logits_theta, logits_t, options)
        if "tokens" in what:
            step = qstar_stats(forced, forced, **what, method="fixed")
        else:
            greedy = {"temperature": 0.0} if options["temperature"] == 0 else {}
            step = qstar_sample(forced, forced, **what, method="fixed", **greedy)
        stats = qstar_stats(logits_theta, logits_t, tokens=step.token, **options)
        stats.logq, stats.status = step.logq, torch.maximum(stats.status, step.status)
        return stats

    def log_q(self, logits_theta: Tensor, logits_t: Tensor, *, first: bool = False) -> Tensor:
        """The whole distribution that `step` draws from: log-probabilities [B, vocab_size], −inf where cut."""
        options = self._options(first)
        if self.force_t_special_tokens:
            return self._special_from_t(logits_theta, logits_t, options)
        return qstar_logprobs(logits_theta, logits_t, **options)[0]

    def _options(self, first: bool) -> dict:
        settings = self.settings
        if first and self.force_t_first_token:
            settings = replace(settings, method="fixed", alpha=0.0, alpha_min=0.0, alpha_max=1.0)
        return vars(settings) | {"vocab_size": self.vocab_size}

    def _special_from_t(self, logits_theta: Tensor, logits_t: Tensor, options: dict) -> Tensor:
        """log q* [B, V] with the special tokens at π_t's own probability and the others scaled to the rest."""
        log_q, _ = qstar_logprobs(logits_theta, logits_t, **options)
        special = torch.tensor(sorted(self.special_ids), dtype=torch.int64, device=log_q.device)
        temperature = options["temperature"] or 1.0
        log_t = (logits_t[:, : self.vocab_size].to(log_q.dtype) / temperature).log_softmax(-1)[:, special]
        rest = log_q.index_fill(-1, special, -torch.inf).log_softmax(-1)
        forced = rest + torch.log1p(-log_t.exp().sum(-1, keepdim=True).clamp(max=1))
        forced[:, special] = log_t
        return forced
