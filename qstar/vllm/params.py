"""What a request to a pair's engine says, and what it may not.

Temperature, top-k, top-p, min-p, the seed and what ends a sample are vLLM's own parameters. The rest is in
`SamplingParams.extra_args` (`vllm_xargs` over HTTP), and goes before them:
- `qstar_` and the name of a field of `qstar_kernels.Settings`, or `qstar_force_t_first_token` and
  `qstar_force_t_special_tokens`: which q* it is drawn from.
- `qstar_seed`: the seed of its noise, a signed 64-bit integer.
- `qstar_key`: the name that its numbers are kept under (`numbers_key`) until they are fetched; without one they are
  not kept.
"""

import hashlib
import re
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from qstar.pair import sample_seed
from qstar.rule import Rule
from qstar_kernels.types import Settings

# what vLLM does to one model's logits, and its value where it does nothing
REFUSED = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "logit_bias": None,
    "bad_words": None,
    "allowed_token_ids": None,
    "structured_outputs": None,
    "logprob_token_ids": None,
    "prompt_logprobs": None,
    "thinking_token_budget": None,
    "watermarking": None,
}

PREFIX = "qstar_"
SETTINGS = {field.name: field.type for field in fields(Settings)}
FORCED = {"force_t_first_token": bool, "force_t_special_tokens": bool}


@dataclass(frozen=True)
class Asked:
    """What a request wants of its draws."""

    seed: int
    rule: Rule
    key: str | None  # of its numbers

    @classmethod
    def of(cls, name: str, params: SamplingParams, pair: dict[str, Any]) -> "Asked":
        """By the request's name and parameters; `pair` is what the engine knows of it (`engine.engine_options`)."""
        extra, (prompt, sample) = params.extra_args or {}, place(name)
        if (seed := extra.get("qstar_seed")) is None:
            if params.seed is None:  # the name ends in random characters of vLLM's
                seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
            else:  # which vLLM has counted up already
                seed = sample_seed(params.seed - sample, prompt, sample)
        key = extra.get("qstar_key")
        return cls(seed, rule(params, pair), None if key is None else numbers_key(key, prompt, sample))


def numbers_key(key: str, prompt: int = 0, sample: int = 0) -> str:
    """What the numbers of one of a request's samples are kept under."""
    return f"{key}/{prompt}/{sample}"


def place(name: str) -> tuple[int, int]:
    """Which prompt of its HTTP request a request is for, and which of its samples, by the name that vLLM gives it."""
    found = re.fullmatch(r"(?:(\d+)_)?(?:cmpl-.*-(\d+)-[^-]*|.*)", name)
    return int(found[2] or 0), int(found[1] or 0)


def of_any_rank(numbers: list[dict[str, list[list[float]]]]) -> dict[str, list[list[float]]]:
    """Of what all workers have popped: the ranks of a group have drawn the same, ranks that hold other layers none."""
    return next((of_rank for of_rank in numbers if of_rank), {})


def rule_fields(settings: Settings, options: Any) -> dict[str, Any]:
    """All that a `Rule` is chosen by, as JSON has it; `options` has the attributes `FORCED`."""
    return vars(settings) | {name: getattr(options, name) for name in FORCED}


def rule(params: SamplingParams, pair: dict[str, Any]) -> Rule:
    """Which q* a request is drawn from: its own `extra_args`, then vLLM's parameters, then what the engine is told.

    Raises:
        ValueError: a parameter is unknown or outside its range.
    """
    extra = {k.removeprefix(PREFIX): v for k, v in (params.extra_args or {}).items() if k.startswith(PREFIX)}
    own = {name: value for name, value in extra.items() if name not in ("seed", "key")}
    for name, value in own.items():
        if (kind := (SETTINGS | FORCED).get(name)) is None:
            raise ValueError(f"{PREFIX}{name} is unknown; there are {', '.join(PREFIX + n for n in SETTINGS | FORCED)}")
        if not isinstance(value, str if kind is str else (int, float)) or kind(value) != value:
            raise ValueError(f"{PREFIX}{name} is {value!r}; it must be of type {kind.__name__}")
    vllms = {"temperature": params.temperature, "top_p": params.top_p, "min_p": params.min_p}
    chosen = pair["rule"] | vllms | {"top_k": max(0, params.top_k)} | own
    settings = Settings(**{name: chosen[name] for name in SETTINGS if name in chosen})
    forced = {name: bool(chosen.get(name)) for name in FORCED}
    return Rule(pair["vocab_size"], settings, **forced, special_ids=tuple(pair["special_ids"]))


class PairParams(LogitsProcessor):
    """Refuses what would be left undone, since vLLM asks every logits processor about a request; changes no logits."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        for name, neutral in REFUSED.items():
            if getattr(sampling_params, name) not in (neutral, None, []):
                raise ValueError(f"{name} is set; a pair of models does not support it")
        if sampling_params.logprobs == -1:
            raise ValueError("logprobs is -1; a pair of models gives a number of them, not all")
        extra = sampling_params.extra_args or {}
        if sampling_params.n > 1 and "qstar_seed" in extra:
            raise ValueError(f"qstar_seed is that of one sample and n is {sampling_params.n}; use seed")
        if not isinstance(extra.get("qstar_seed", 0), int):
            raise ValueError(f"qstar_seed is {extra['qstar_seed']!r}; it must be a whole number")
        rule(sampling_params, {"rule": {}, "vocab_size": 0, "special_ids": ()})

    def __init__(self, vllm_config, device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update) -> None:
        pass
