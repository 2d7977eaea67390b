"""q* inside transformers' own `model.generate()`: a logits processor, and a `custom_generate` function.

`model` is π_θ; π_t comes along and keeps a KV cache of its own. The processor hands log q* to whatever sampling
`generate` does; `qstar_generate` draws with this package's noise, so a sequence is the same in any batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from qstar.cache import Side
from qstar.decode import DecodeOptions, Decoder, Request
from qstar.probe import check_model
from qstar_kernels import Status, qstar_logprobs
from qstar_kernels.types import Settings


def unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The prompts [B, L] as lists without their left padding."""
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape or not attention_mask[:, -1].all():
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} for prompts {list(input_ids.shape)}; it must have their "
            "shape and mark left padding only (tokenizer.padding_side = 'left')"
        )
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]


class QStarLogitsProcessor(LogitsProcessor):
    """Turns π_θ's scores [B, V] into log q*, for one call of `generate` (sampling or greedy, not beam search).

    Let `generate` truncate nothing on top (`top_k=0`, `top_p=1.0`, `temperature=1.0`); give truncation and temperature
    here.

    Args:
        model_t: the model of π_t.
        attention_mask: int64 [B, L], of left-padded prompts.
        vocab_size: the tokenizer's length, where the models are padded differently.
        **settings: `method`, `temperature`, `top_p`, … of `qstar_kernels.qstar_sample`.

    Raises:
        ValueError: a setting is outside its range; while generating: the rows are not those of the step before with one
            token more each (another call, or beam search), or a row cannot be sampled from.
    """

    def __init__(self, model_t, attention_mask: Tensor | None = None, vocab_size: int | None = None, **settings):
        check_model(model_t, "t")
        Settings(**settings)
        self.model_t, self.attention_mask = model_t, attention_mask
        self.vocab_size, self.settings = vocab_size, settings
        self.side: Side | None = None
        self.seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with torch.inference_mode():
            if self.side is None:
                self.side, (logits_t,) = Side(self.model_t, 0, ("t",)).prefill(unpadded(input_ids, self.attention_mask))
            elif self.seen.shape == input_ids[:, :-1].shape and torch.equal(self.seen, input_ids[:, :-1]):
                (logits_t,) = self.side.advance(input_ids[:, -1:])
            else:
                raise ValueError(
                    "these rows do not continue those of the step before; "
                    "make a QStarLogitsProcessor for every call of generate, and do not use beam search"
                )
            log_q, stats = qstar_logprobs(
                scores, logits_t[:, -1].to(scores.device), vocab_size=self.vocab_size, **self.settings
            )
        self.seen = input_ids.clone()
        if (stats.status != Status.OK).any():
            row = int((stats.status != Status.OK).nonzero()[0])
            raise ValueError(f"row {row} cannot be sampled from: {Status(int(stats.status[row])).name.lower()}")
        out = torch.full_like(scores, -torch.inf)
        out[:, : log_q.shape[1]] = log_q
        return out


def qstar_generate(
    model,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    model_t=None,
    seeds: Sequence[int] | None = None,
    qstar_settings: dict | None = None,
    **model_kwargs,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`model.generate(**inputs, custom_generate=qstar_generate, model_t=..., seeds=[...])`: sequences from q*.

    Length and EOS come from the generation config, and `do_sample=False` is greedy; temperature and truncation come
    from `qstar_settings` alone, not from the config, whose defaults would truncate.

    Args:
        model: π_θ, given by `generate`, as are `input_ids` [B, L], `logits_processor`, `stopping_criteria` and
            `generation_config`.
        model_t: the model of π_t.
        seeds: one 64-bit seed a row; 0, 1, … by default.
        qstar_settings: `method`, `temperature`, … of `qstar_kernels.qstar_sample`.

    Returns:
        prompts and continuations, int64 [B, L + new], padded on the right.

    Raises:
        ValueError: `model_t` is missing, seeds and rows differ in number, logits processors or stopping criteria other
            than length and EOS are given, or a row cannot be sampled from.
    """
    if model_t is None:
        raise ValueError("model_t is missing; give the model of π_t to generate")
    others = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
    if others:
        raise ValueError(
            f"stopping criteria {[type(c).__name__ for c in others]} are not supported; only length and EOS"
        )
    seeds = range(len(input_ids)) if seeds is None else seeds
    if len(seeds) != len(input_ids):
        raise ValueError(f"seeds has {len(seeds)} entries for {len(input_ids)} rows; give one a row")
    check_model(model, "theta")
    check_model(model_t, "t")
    settings = dict(qstar_settings or {})
    if not generation_config.do_sample:
        settings["temperature"] = 0.0
    prompts = unpadded(input_ids, model_kwargs.get("attention_mask"))
    room = generation_config.max_length - input_ids.shape[1]
    eos = generation_config._eos_token_tensor
    eos_ids = set() if eos is None else set(eos.flatten().tolist())
    vocab_size = min(m.config.get_text_config().vocab_size for m in (model, model_t))
    options = DecodeOptions(Settings(**settings), batch_size=len(prompts))
    decoder = Decoder(model, model_t, vocab_size, eos_ids, eos_ids, None, options)
    requests = [Request(i, ids, ids, seed, room) for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))]
    samples = sorted(decoder.run(requests), key=lambda s: s.request.key)
    failed = next((s for s in samples if s.error), None)
    if failed is not None:
        raise ValueError(f"row {failed.request.key}: {failed.error}")
    width = max(len(s.token_ids) for s in samples)
    pad = generation_config._pad_token_tensor
    pad_id = int(pad) if pad is not None else min(eos_ids, default=0)
    new = torch.tensor([s.token_ids + [pad_id] * (width - len(s.token_ids)) for s in samples], device=input_ids.device)
    sequences = torch.cat([input_ids, new], dim=1)
    return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences
