"""What a request to a pair's engine says, and what it may not.

The seed and what ends a sample are vLLM's own parameters. The rest is in `SamplingParams.extra_args` (`vllm_xargs` over
HTTP), where vLLM leaves it as it is:
- `qstar_` and the name of a field of `qstar_kernels.Settings`, or `qstar_force_t_first_token` and
  `qstar_force_t_special_tokens`: which q* it is drawn from.
- `qstar_seed`: the seed of its noise, a signed 64-bit integer.
- `numbers_key`: the name that its numbers are kept under (`numbers_key`) until they are fetched; without one they are
  not kept. A server fetches all numbers, and draws nothing without one.
- `numbers_batch`: its HTTP request is for several conversations (`place`).
"""

import hashlib
import os
import re
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from qstar.pair import sample_seed
from qstar.rule import FORCED, Rule
from qstar.vllm import SERVER
from qstar_kernels.types import SETTINGS, Settings, check_read

# What vLLM's sampler, which a pair has none of, would do to one model's logits; the values with which it does nothing,
# as it does with None and with what is empty
UNSUPPORTED = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "logit_bias": (),
    "bad_words": (),
    "allowed_token_ids": (),
    "structured_outputs": (),
    "logprob_token_ids": (),
    "prompt_logprobs": (),
    "prompt_logprob_token_ids": (),
    "prompt_logprob_start": (),
    "thinking_token_budget": (),
    "trace_decode_token_ids": (),
    "watermarking": (False,),
}
# A pair has these in `extra_args`: vLLM would raise a low temperature and refuse a high one
ELSEWHERE = {"temperature": (1,), "top_k": (0, -1), "top_p": (1,), "min_p": (0,)}
ROUTES = "/v1/chat/completions, /v1/chat/completions/batch, /v1/completions or /invocations"

PREFIX = "qstar_"


@dataclass(frozen=True)
class Asked:
    """What a request wants of its draws."""

    seed: int
    rule: Rule
    key: str | None  # of its numbers

    @classmethod
    def of(cls, name: str, params: SamplingParams, pair: dict[str, Any]) -> "Asked":
        """By the request's name and parameters; `pair` is what the engine knows of it (`engine.engine_options`)."""
        extra = params.extra_args or {}
        prompt, sample = place(name, bool(extra.get("numbers_batch")))
        if (seed := extra.get("qstar_seed")) is None:
            if params.seed is None:  # the name ends in random characters of vLLM's
                seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
            else:  # which vLLM has counted up already
                seed = sample_seed(params.seed - sample, prompt, sample)
        key = extra.get("numbers_key")
        return cls(seed, rule(params, pair), None if key is None else numbers_key(key, prompt, sample))


def numbers_key(key: str, prompt: int = 0, sample: int = 0) -> str:
    """What the numbers of one of a request's samples are kept under."""
    return f"{key}/{prompt}/{sample}"


def place(name: str, batch: bool = False) -> tuple[int, int]:
    """Which prompt of its HTTP request a request is for, and which of its samples, by the name that vLLM gives it.

    The middle of a name is the client's to choose. `batch` is whether the request was for several conversations.
    """
    if batch and (found := re.fullmatch(r"(?s)chatcmpl-.*_(\d+)-[^-]*", name)):
        return int(found[1]), 0
    found = re.fullmatch(r"(?s)(?:(\d+)_)?(?:cmpl-.*-(\d+)-[^-]*|.*)", name)
    return int(found[2] or 0), int(found[1] or 0)


def of_any_rank(numbers: list[dict[str, Any]]) -> dict[str, Any]:
    """Of what all workers have popped: the ranks of a group have drawn the same, ranks that hold other layers none."""
    return next((of_rank for of_rank in numbers if of_rank), {})


def rule_fields(settings: Settings, options: Any) -> dict[str, Any]:
    """All that a `Rule` is chosen by, as JSON has it; `options` has the attributes `FORCED`."""
    return vars(settings) | {name: getattr(options, name) for name in FORCED}


def own_fields(params: SamplingParams) -> dict[str, Any]:
    """What a request says of its rule, by the names of `Rule` and of its settings."""
    extra = {k.removeprefix(PREFIX): v for k, v in (params.extra_args or {}).items() if k.startswith(PREFIX)}
    return {name: value for name, value in extra.items() if name != "seed"}


def rule(params: SamplingParams, pair: dict[str, Any]) -> Rule:
    """Which q* a request is drawn from: what its `extra_args` say, then what the engine is told.

    Raises:
        ValueError: a setting is unknown or outside its range.
    """
    own = own_fields(params)
    for name, value in own.items():
        if name not in SETTINGS + FORCED:
            raise ValueError(f"{PREFIX}{name} is unknown; there are {', '.join(PREFIX + n for n in SETTINGS + FORCED)}")
        if not isinstance(value, str | int | float):
            raise ValueError(f"{name} is a {type(value).__name__}; it must be a single value")
        if name in FORCED and value not in (False, True):
            raise ValueError(f"{name} is {value!r:.40}; it must be true or false")
    chosen = pair["rule"] | own
    settings = Settings(**{name: chosen[name] for name in SETTINGS if name in chosen})
    forced = {name: bool(chosen.get(name)) for name in FORCED}
    return Rule(pair["vocab_size"], settings, **forced, special_ids=tuple(pair["special_ids"]))


def does_nothing(value: Any, neutral: tuple) -> bool:
    """Whether a parameter leaves logits as they are."""
    if isinstance(value, dict):
        return not any(value.values())
    if isinstance(value, Sized):
        return len(value) == 0
    return value is None or value in neutral


class PairParams(LogitsProcessor):
    """Refuses what would be left undone, since vLLM asks every logits processor about a request; changes no logits."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        extra = sampling_params.extra_args or {}
        if SERVER in os.environ and "numbers_key" not in extra:
            raise ValueError(f"this route has no place for the numbers of q*; use {ROUTES}")
        for name, neutral in UNSUPPORTED.items():
            if not does_nothing(getattr(sampling_params, name), neutral):
                raise ValueError(f"{name} is set; a pair of models does not support it")
        for name, neutral in ELSEWHERE.items():
            if (value := getattr(sampling_params, name)) not in neutral:
                raise ValueError(f"{name} is {value}; a pair of models has it as {PREFIX}{name} in extra_args")
        if sampling_params.logprobs == -1:
            raise ValueError("logprobs is -1; a pair of models gives a number of them, not all")
        if sampling_params.n > 1 and "qstar_seed" in extra:
            raise ValueError(f"qstar_seed is that of one sample and n is {sampling_params.n}; use seed")
        seed = extra.get("qstar_seed", 0)
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"qstar_seed is {seed!r:.40}; it must be a whole number of 64 bits")
        own = rule(sampling_params, {"rule": {}, "vocab_size": 0, "special_ids": ()}).settings
        if f"{PREFIX}method" in extra:  # otherwise it is the engine's, which is not known here
            check_read(own_fields(sampling_params), own.method)

    def __init__(self, vllm_config, device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update) -> None:
        pass
