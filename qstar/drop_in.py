"""q* inside transformers' own `model.generate()`: a logits processor, and a `custom_generate` function.

`model` is π_θ; π_t comes along and keeps a KV cache of its own. The processor hands log q* to whatever sampling
`generate` does; `qstar_generate` draws with this package's noise, so a sequence is the same in any batch.

Temperature, truncation, penalties and the like, which a checkpoint's generation config brings along without a word,
would make something else of q*: the processor is called with arguments that switch them off, and the function refuses
them. What either does not know is switched off, or refused, like them.
"""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StopStringCriteria,
    TopKLogitsWarper,
)

from qstar.cache import Side, holds_tokens
from qstar.decode import Decoder
from qstar.probe import check_model
from qstar.sample import DecodeOptions, Ending, Request, Sample
from qstar_kernels import Status, dispatch
from qstar_kernels.types import SETTINGS, Settings

# Fields of a generation config that have no part in which token comes next
LENGTH = frozenset("max_length max_new_tokens max_time stop_strings num_return_sequences do_sample".split())
TOKENS = frozenset("bos_token_id eos_token_id pad_token_id decoder_start_token_id transformers_version".split())
OUTPUT = frozenset("return_dict_in_generate output_attentions output_hidden_states output_scores output_logits".split())
CACHE = frozenset(
    "use_cache cache_implementation cache_config max_cache_len prefill_chunk_size compile_config disable_compile "
    "low_memory".split()
)
HONOURED = LENGTH | TOKENS | {"return_dict_in_generate", "disable_compile"}  # by `qstar_generate`
# Values that switch a field off, beside None, transformers' default and, where that is None, False
OFF = {"top_k": 0, "min_p": 0.0, "guidance_scale": 1.0, "min_new_tokens": 0}
UNSAID: Any = object()
CRITERIA = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)


def unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The prompts [B, L] as lists without their left padding."""
    if attention_mask is None and len(input_ids) > 1:
        raise ValueError("attention_mask is missing; give that of the prompts, ones where nothing is padded")
    if attention_mask is None:
        return input_ids.tolist()
    fits = attention_mask.shape == input_ids.shape
    if not fits or not attention_mask[:, -1].all() or (attention_mask.long().diff() < 0).any():
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} for prompts {list(input_ids.shape)}; it must have their "
            "shape, repeated as they are for num_return_sequences, and mark left padding only "
            "(tokenizer.padding_side = 'left')"
        )
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]


class QStarLogitsProcessor(LogitsProcessor):
    """Turns π_θ's scores [B, V] into log q*, for one call of `generate` (sampling or greedy, not beam search).

    `model.generate(**inputs, **processor.arguments(), do_sample=True)`: a processor cannot see what `generate` does to
    the scores before and after it, so it works with these arguments only.

    Args:
        model_t: the model of π_t.
        attention_mask: int64 [B, L], of left-padded prompts; a single row may do without.
        vocab_size: the tokenizer's length, where the models are padded differently.
        **settings: `method`, `temperature`, `top_p`, … of `qstar_kernels.qstar_sample`.

    Raises:
        ValueError: a setting is outside its range; while generating: `arguments` were not asked for, the rows are not
            those of the step before with one token more each (another call, or beam search), or a row cannot be
            sampled from.
    """

    def __init__(self, model_t, attention_mask: Tensor | None = None, vocab_size: int | None = None, **settings):
        check_model(model_t, "t")
        self.model_t, self.attention_mask = model_t, attention_mask
        self.vocab_size, self.settings = vocab_size, Settings(**settings)
        self.side: Side | None = None
        self.seen: Tensor | None = None
        self.alone = False

    def arguments(self) -> dict[str, Any]:
        """Arguments of `generate` that leave this processor alone with the scores: `temperature=None`, `top_k=None`,
        `repetition_penalty=None` and so on for all that the installed transformers has, over whatever a checkpoint's
        generation config says. Python refuses any of them that is given a second time."""
        self.alone = True
        fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
        off = dict.fromkeys(sorted(fields - LENGTH - TOKENS - OUTPUT - CACHE)) | {"num_beams": 1}
        others = ("generation_config", "prefix_allowed_tokens_fn", "assistant_model", "custom_generate")
        off["min_length"] = 0  # a number, for generate counts on one where it is given embeddings
        return {"logits_processor": [self], **off, **dict.fromkeys(others)}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.alone:
            raise ValueError(
                "a temperature, truncation or penalty of generate or of the checkpoint's generation config would make "
                "something else of q*, and a logits processor cannot see them; call "
                "model.generate(**inputs, **processor.arguments(), do_sample=True), which switches them off"
            )
        with torch.inference_mode():
            if self.side is None:
                self.side = Side(self.model_t, 0, ("t",))
                (logits_t,) = self.side.prefill(unpadded(input_ids, self.attention_mask))
            elif self.seen.shape == input_ids[:, :-1].shape and torch.equal(self.seen, input_ids[:, :-1]):
                (logits_t,) = self.side.advance(input_ids[:, -1:])
            else:
                raise ValueError(
                    "these rows do not continue those of the step before; "
                    "make a QStarLogitsProcessor for every call of generate, and do not use beam search"
                )
            logits_t = logits_t[:, -1].to(scores.device)
            stats, log_q = dispatch.step("auto", scores, logits_t, self.settings, self.vocab_size, want_log_q=True)
        self.seen = input_ids.clone()
        if (stats.status != Status.OK).any():
            row = int((stats.status != Status.OK).nonzero()[0])
            raise ValueError(f"row {row} cannot be sampled from: {Status(int(stats.status[row])).name.lower()}")
        out = torch.full_like(scores, -torch.inf)
        out[:, : log_q.shape[1]] = log_q
        return out


class CriteriaEnding(Ending):
    """Ends a sequence where `generate` would: at EOS, its token limit, or by a criterion that looks at its tokens."""

    def __init__(self, eos_ids: set[int], criteria: list[StopStringCriteria]):
        super().__init__(eos_ids, None, DecodeOptions())
        self.criteria = criteria

    def finish(self, sample: Sample) -> None:
        super().finish(sample)
        if self.criteria and not sample.finish_reason:
            row = torch.tensor([[*sample.request.ids_theta, *sample.token_ids]])
            if any(criterion(row, None).all() for criterion in self.criteria):
                sample.finish_reason = "stop"


def refused(model, config: GenerationConfig, top_k: Any, prompt_length: int) -> dict[str, tuple[Any, Any]]:
    """The fields of a generation config, merged from the call, the checkpoint and transformers' defaults, that
    `qstar_generate` does not do: what each of them is, and what would switch it off."""
    defaults, found = config._get_default_generation_params(), {}
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    if top_k is not UNSAID:
        fields["top_k"] = top_k
    for name, value in fields.items():
        default = defaults.get(name)
        is_off = value is None or (name in OFF and value == OFF[name]) or (value is False and not default)
        if name == "top_k":  # the default truncates: it is neutral only as long as nobody has asked for it
            is_off = is_off or (top_k is UNSAID and model.generation_config.top_k is None and value == default)
        elif name == "min_length":  # of prompt and new tokens; made from min_new_tokens where that is given
            is_off = is_off or config.min_new_tokens is not None or value <= prompt_length
        else:
            is_off = is_off or value == default
        if name not in HONOURED and not is_off:
            found[name] = value, OFF.get(name, default)
    return found


def check_arguments(
    model, prompt_length: int, logits_processor, stopping_criteria, config: GenerationConfig, top_k: Any
) -> None:
    """Refuse what `qstar_generate` would otherwise leave undone without a word.

    Raises:
        ValueError: there is such a thing; the message names it.
    """
    found = refused(model, config, top_k, prompt_length)
    if found:
        said = ", ".join(f"{name} = {value!r}" for name, (value, _) in found.items())
        off = ", ".join(f"{name}={neutral!r}" for name, (_, neutral) in found.items())
        raise ValueError(
            f"generate or the checkpoint's generation config asks for {said}, which qstar_generate does not do; give "
            f"{off} to generate, and q*'s own temperature and truncation in qstar_settings"
        )
    # what `generate` makes of what has just been found neutral
    processors = [
        p for p in logits_processor if type(p) is not MinLengthLogitsProcessor or p.min_length > prompt_length
    ]
    if config.do_sample and config.top_k and isinstance(processors[-1], TopKLogitsWarper):
        processors.pop()
    others = [type(p).__name__ for p in processors]
    if others:
        raise ValueError(f"logits processors ({', '.join(others)}) are not applied to q*; give none to generate")
    others = [type(c).__name__ for c in stopping_criteria if type(c) not in CRITERIA]
    if others:
        raise ValueError(
            f"stopping criteria {others} are not supported; only {', '.join(kind.__name__ for kind in CRITERIA)}, "
            "which look at nothing but the tokens of a row"
        )


def check_model_kwargs(model_kwargs: dict[str, Any], prompts: list[list[int]]) -> None:
    """Refuse what would be given to π_θ and not to π_t.

    Raises:
        ValueError: there is something beside the prompts and their mask.
    """
    given = {name: value for name, value in model_kwargs.items() if value is not None}
    caches = {"past_key_values", "cache_params"}
    others = given.keys() - caches - {"attention_mask", "position_ids", "logits_to_keep", "use_cache"}
    positions = given.get("position_ids")
    if positions is not None:
        rows = positions.tolist() if positions.dim() == 2 else [[]] * len(prompts)
        if any(row[-len(ids) :] != list(range(len(ids))) for row, ids in zip(rows, prompts, strict=True)):
            others.add("position_ids")
    others |= {name for name in caches & given.keys() if holds_tokens(given[name])}
    if others:
        raise ValueError(
            f"{', '.join(sorted(others))} would be for one model of the two; give input_ids and attention_mask only"
        )


def qstar_generate(
    model,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    model_t=None,
    seeds: Sequence[int] | None = None,
    qstar_settings: dict | None = None,
    top_k: int | None = UNSAID,
    **model_kwargs,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`model.generate(**inputs, custom_generate=qstar_generate, model_t=..., seeds=[...])`: sequences from q*.

    Of `generate`'s own arguments and the generation config (the checkpoint's, too) it does the lengths (`max_length`,
    `max_new_tokens`), EOS and padding tokens, `num_return_sequences`, `return_dict_in_generate`, criteria of the kinds
    `MaxLengthCriteria`, `EosTokenCriteria` and `StopStringCriteria`, and `do_sample=False`, which is greedy. Everything
    else is refused by name unless its value is neutral: q*'s temperature and truncation are in `qstar_settings`. A
    `top_k` of 50 that neither the call nor the checkpoint gives is transformers' default, and not applied; one in a
    `GenerationConfig` looks the same. transformers lets no `custom_generate` function know of `assistant_model`,
    `streamer` and `synced_gpus`: they do nothing.

    Args:
        model: π_θ, given by `generate`, as are `input_ids` [B, L], `logits_processor`, `stopping_criteria` and
            `generation_config`.
        model_t: the model of π_t.
        seeds: one 64-bit seed a row; 0, 1, … by default.
        qstar_settings: `method`, `temperature`, … of `qstar_kernels.qstar_sample`.
        top_k: only None or 0; here so that `generate` passes it on as the call has it.

    Returns:
        prompts and continuations, int64 [B, L + new], padded on the right.

    Raises:
        ValueError: `model_t` is missing, seeds and rows differ in number, something is asked for that is not done, or a
            row cannot be sampled from.
    """
    if model_t is None:
        raise ValueError("model_t is missing; give the model of π_t to generate")
    prompts = unpadded(input_ids, model_kwargs.get("attention_mask"))
    check_arguments(model, input_ids.shape[1], logits_processor, stopping_criteria, generation_config, top_k)
    check_model_kwargs(model_kwargs, prompts)
    try:
        seeds = [index(seed) for seed in (range(len(input_ids)) if seeds is None else seeds)]
    except TypeError:
        seeds = None
    if seeds is None or not all(-(2**63) <= seed < 2**63 for seed in seeds):
        raise ValueError("seeds must be a sequence of integers from −2⁶³ to 2⁶³ − 1, one a row")
    if len(seeds) != len(input_ids):
        raise ValueError(f"seeds has {len(seeds)} entries for {len(input_ids)} rows; give one a row")
    check_model(model, "theta")
    check_model(model_t, "t")
    settings = dict(qstar_settings or {})
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        raise ValueError(f"qstar_settings has {', '.join(unknown)}; it may have {', '.join(SETTINGS)}")
    if not generation_config.do_sample and settings.setdefault("temperature", 0.0) != 0:
        raise ValueError(
            f"qstar_settings has temperature = {settings['temperature']} and do_sample is False, which is greedy; "
            "give do_sample=True to generate"
        )
    criteria = {kind: [c for c in stopping_criteria if type(c) is kind] for kind in CRITERIA}
    room = max(1, min(c.max_length for c in criteria[MaxLengthCriteria]) - input_ids.shape[1])
    eos_ids = {i for c in criteria[EosTokenCriteria] for i in c.eos_token_id.flatten().tolist()}
    vocab_size = min(m.config.get_text_config().vocab_size for m in (model, model_t))
    options = DecodeOptions(Settings(**settings), batch_size=len(prompts))
    decoder = Decoder(model, model_t, vocab_size, eos_ids, eos_ids, None, options)
    decoder.ending = CriteriaEnding(eos_ids, criteria[StopStringCriteria])
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
