"""The decoding loop: two models, two KV caches, one token of q* a step.

Rows are left-padded. A finished row leaves the batch at once and a waiting prompt takes its place, so that the cost
follows the live tokens. The noise of a token depends on its sequence's seed and its position only, so which rows share
a batch changes nothing but rounding.
"""

import inspect
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qstar_kernels import QStarStep, Status, qstar_logprobs, qstar_sample, qstar_stats
from qstar_kernels.types import Settings

FIELDS = ("logq", "logp_theta", "logp_t", "alpha", "kl_theta", "kl_t", "ess_theta", "ess_t")
PREFILL_TOKENS = 16384  # padded prompt tokens that one forward pass takes: bounds the activations, not the results


@dataclass(frozen=True)
class Request:
    """One sequence to generate: both prompts in token ids, its 64-bit seed, and the token limit it has room for."""

    key: Any
    ids_theta: list[int]
    ids_t: list[int]
    seed: int
    max_new_tokens: int


@dataclass
class Sample:
    """A finished sequence.

    `finish_reason` is `eos` (of either model), `stop` (a stop string), `length`, or `error` with the reason in `error`.
    `token_ids` holds every drawn token, EOS included; `text` leaves out special tokens and ends before a stop string.
    `fields` has one number a token for each of `FIELDS` (see `qstar_kernels.QStarStep`), `status` one code a token.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    error: str | None = None
    fields: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FIELDS})
    status: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class DecodeOptions:
    """How sequences are drawn and when they end."""

    settings: Settings = field(default_factory=Settings)
    batch_size: int = 16
    stop: tuple[str, ...] = ()
    force_t_first_token: bool = False
    force_t_special_tokens: bool = False


class Side:
    """One model with the KV cache of the live rows; every cached row ends at the last column.

    Attributes:
        cache: keys and values of all layers, [B, heads, L, head_dim] each.
        mask: int64 [B, L], 1 where a cached column belongs to the row, 0 on its left padding.
        lengths: tokens cached for each row, also the position id of its next token.
    """

    def __init__(self, model: torch.nn.Module, pad_id: int):
        self.model, self.pad_id = model, pad_id
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.device = model.get_input_embeddings().weight.device
        self.cache = self._new_cache()
        self.mask = torch.empty(0, 0, dtype=torch.int64, device=self.device)
        self.lengths: list[int] = []

    @staticmethod
    def _new_cache() -> DynamicCache:
        # Without the model's config every layer keeps all its tokens. Sliding-window layers would drop old columns,
        # counted from the padded start, and rows of different age could not be joined; the window is then applied by
        # the attention mask, which gives the same numbers.
        return DynamicCache()

    def _forward(self, ids: Tensor, positions: Tensor, cache: DynamicCache, mask: Tensor) -> Tensor:
        extra = {"position_ids": positions} if self.takes_positions else {}
        out = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra, **self.last_only
        )
        return out.logits[:, -1]  # [B, V]

    def prefill(self, prompts: list[list[int]]) -> tuple["Side", Tensor]:
        """Run prompts in a batch of their own: a `Side` that holds them, and the logits [B, V] of the next token."""
        new = Side(self.model, self.pad_id)
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=self.device)
        new.lengths = [len(p) for p in prompts]
        lengths = torch.tensor(new.lengths, device=self.device)
        new.mask = (torch.arange(width, device=self.device) >= width - lengths[:, None]).long()
        positions = (new.mask.cumsum(-1) - 1).clamp(min=0)
        return new, self._forward(ids, positions, new.cache, new.mask)

    def advance(self, tokens: Tensor) -> Tensor:
        """Append one token a row, int64 [B], and return the logits [B, V] of the next."""
        tokens = tokens.to(self.device)[:, None]  # [B, 1]
        positions = torch.tensor(self.lengths, device=self.device)[:, None]  # [B, 1]
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.lengths = [n + 1 for n in self.lengths]
        return self._forward(tokens, positions, self.cache, self.mask)

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, and the columns that are padding in all that stay."""
        self.lengths = [self.lengths[i] for i in rows]
        start = self.mask.shape[1] - max(self.lengths, default=0)
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.mask = self.mask[index, start:]
        for layer in self.cache.layers:
            if layer.get_seq_length():
                index = index.to(layer.keys.device)
                layer.keys, layer.values = layer.keys[index, :, start:], layer.values[index, :, start:]

    def join(self, other: "Side") -> None:
        """Take over the rows of `other`, behind this side's own."""
        if not self.lengths:
            self.cache, self.mask, self.lengths = other.cache, other.mask, other.lengths
            return
        width = max(self.mask.shape[1], other.mask.shape[1])

        def widened(x: Tensor, dim: int) -> Tensor:
            missing = width - x.shape[dim]
            return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (missing, 0)) if missing else x

        self.mask = torch.cat([widened(self.mask, 1), widened(other.mask, 1)])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            if mine.get_seq_length():  # a layer that shares another one's keys has none of its own
                mine.keys = torch.cat([widened(mine.keys, 2), widened(theirs.keys, 2)])
                mine.values = torch.cat([widened(mine.values, 2), widened(theirs.values, 2)])
        self.lengths += other.lengths


def check_cache(model: torch.nn.Module, name: str) -> None:
    """Refuse a model whose state is not a plain KV cache.

    Raises:
        ValueError: the model is an encoder-decoder, or has recurrent layers.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; a decoder-only causal language model is needed")
    layers = DynamicCache(config=model.config).layers
    other = next(
        (layer for layer in layers if not isinstance(layer, DynamicLayer) or hasattr(layer, "conv_states")), None
    )
    if other is not None or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{name} ({model.config.model_type}) keeps recurrent state; "
            "only models whose layers all have a plain KV cache are supported"
        )


class Decoder:
    """Draws sequences from q* of a pair; `run` is the loop.

    Args:
        theta, t: the models of π_θ and π_t; the same object for one model with two prompts (then with two caches).
        vocab_size: the tokenizer's length; both models' logits are cut to it.
        eos_ids: ids that end a sequence, of both models.
        special_ids: ids that take π_t's probability under `force_t_special_tokens`.
        tokenizer: turns ids into text, for stop strings and the samples' text; None leaves the text empty.
        options: how to draw.
    """

    def __init__(self, theta, t, vocab_size: int, eos_ids: set[int], special_ids: set[int], tokenizer, options):
        self.models = theta, t
        self.vocab_size, self.eos_ids, self.tokenizer, self.options = vocab_size, eos_ids, tokenizer, options
        self.special_ids = torch.tensor(sorted(special_ids))
        # every token is at least one byte of text or none (special), so a window of the stop's bytes and a few more
        # always covers a stop string that the newest token completes
        self.stop_window = max((len(s.encode()) for s in options.stop), default=0) + 16

    def run(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Generate all requests; samples come in the order in which they finish, which is the same every time."""
        source, waiting, pad_id = iter(requests), deque(), min(self.eos_ids, default=0)
        sides = [Side(model, pad_id) for model in self.models]
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
                    new, logits = zip(
                        sides[0].prefill([s.request.ids_theta for s in samples]),
                        sides[1].prefill([s.request.ids_t for s in samples]),
                        strict=True,
                    )
                    self._draw(samples, *logits, first=True)
                    finished = self._drop_finished(samples, new)
                    if samples:
                        for side, newcomers in zip(sides, new, strict=True):
                            side.join(newcomers)
                    live += samples
                yield from finished
            if live:
                with torch.inference_mode():
                    tokens = torch.tensor([s.token_ids[-1] for s in live])
                    self._draw(live, *(side.advance(tokens) for side in sides), first=False)
                    finished = self._drop_finished(live, sides)
                yield from finished

    @staticmethod
    def _admit(waiting: deque[Request], free: int) -> list[Request]:
        admitted, longest = [], 0
        while waiting and len(admitted) < free:
            longest = max(longest, len(waiting[0].ids_theta), len(waiting[0].ids_t))
            if admitted and longest * (len(admitted) + 1) > PREFILL_TOKENS:
                break
            admitted.append(waiting.popleft())
        return admitted

    def _draw(self, samples: list[Sample], logits_theta: Tensor, logits_t: Tensor, first: bool) -> None:
        """Draw the next token of every row from logits [B, V] and append it, with its numbers, to the row's sample."""
        logits_t = logits_t.to(logits_theta.device)
        seeds = torch.tensor([s.request.seed for s in samples], device=logits_theta.device)
        positions = torch.tensor([len(s.token_ids) for s in samples], device=logits_theta.device)
        settings = vars(self.options.settings)
        if first and self.options.force_t_first_token:
            settings = settings | {"method": "fixed", "alpha": 0.0, "alpha_min": 0.0, "alpha_max": 1.0}
        draw = self._sample_special_from_t if self.options.force_t_special_tokens else qstar_sample
        step = draw(logits_theta, logits_t, seeds=seeds, positions=positions, vocab_size=self.vocab_size, **settings)
        # one transfer a step: token ids are exact in float64
        numbers = torch.stack([getattr(step, name).double() for name in ("token", "status", *FIELDS)])  # [2 + F, B]
        for sample, (token, status, *values) in zip(samples, numbers.T.tolist(), strict=True):
            if int(status) != Status.OK:
                name = Status(int(status)).name.lower().replace("_", " ")
                sample.error = f"token {len(sample.token_ids)} cannot be drawn: {name} (status {int(status)})"
                continue
            sample.token_ids.append(int(token))
            sample.status.append(int(status))
            for name, value in zip(FIELDS, values, strict=True):
                sample.fields[name].append(value)

    def _sample_special_from_t(
        self, logits_theta: Tensor, logits_t: Tensor, *, seeds, positions, **settings
    ) -> QStarStep:
        """Draw from q* with the special tokens at π_t's own probability and the others scaled to the rest."""
        log_q, _ = qstar_logprobs(logits_theta, logits_t, **settings)
        temperature = settings["temperature"] or 1.0
        special = self.special_ids.to(log_q.device)
        log_t = (logits_t[:, : self.vocab_size].to(log_q.dtype) / temperature).log_softmax(-1)[:, special]
        rest = log_q.index_fill(-1, special, -torch.inf).log_softmax(-1)
        forced = rest + torch.log1p(-log_t.exp().sum(-1, keepdim=True).clamp(max=1))
        forced[:, special] = log_t
        greedy = {"temperature": 0.0} if settings["temperature"] == 0 else {}
        step = qstar_sample(forced, forced, seeds=seeds, positions=positions, method="fixed", **greedy)
        stats = qstar_stats(logits_theta, logits_t, tokens=step.token, **settings)
        stats.logq, stats.status = step.logq, torch.maximum(stats.status, step.status)
        return stats

    def _drop_finished(self, samples: list[Sample], sides: Iterable[Side]) -> list[Sample]:
        """Take the finished samples out of `samples` and their rows out of both sides."""
        finished = [s for s in samples if self._finish(s)]
        if finished:
            rows = [i for i, s in enumerate(samples) if not s.finish_reason]
            samples[:] = [samples[i] for i in rows]
            for side in sides:
                side.keep(rows)
        return finished

    def _finish(self, sample: Sample) -> bool:
        """Set the finish reason and the text if the sequence has ended."""
        ids = sample.token_ids
        stopped = False
        if sample.error is not None:
            sample.finish_reason = "error"
        elif ids[-1] in self.eos_ids:
            sample.finish_reason = "eos"
        elif self.options.stop and self._stops_in(self._text(ids[-self.stop_window :])):
            sample.finish_reason, stopped = "stop", True
        elif len(ids) >= sample.request.max_new_tokens:
            sample.finish_reason = "length"
        else:
            return False
        sample.text = self._text(ids[:-1] if sample.finish_reason == "eos" else ids)
        if stopped:
            sample.text = sample.text[: min(self._stops_in(sample.text), default=len(sample.text))]
        return True

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if self.tokenizer else ""

    def _stops_in(self, text: str) -> list[int]:
        return [text.index(stop) for stop in self.options.stop if stop in text]
