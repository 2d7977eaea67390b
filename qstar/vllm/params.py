"""What a request to a pair's engine says, and what it may not.

Beside the token limit and what ends it, all of it is in `SamplingParams.extra_args`:
- `qstar_seed`: the seed of its noise, a signed 64-bit integer.
- `qstar_rule`: which q* it draws from, as JSON (`rule_text`).
- `qstar_key`: the name that its numbers are kept under until they are fetched; without one they are not kept.
"""

import json
from typing import Any

from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

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
}

DEFAULT_RULE = '{"settings": {}}'


def rule_text(settings: dict[str, Any], force_t_first_token: bool, force_t_special_tokens: bool) -> str:
    """`qstar_rule` for the fields of a `Settings` and the two options beside them."""
    forced = {"force_t_first_token": force_t_first_token, "force_t_special_tokens": force_t_special_tokens}
    return json.dumps({"settings": settings} | forced)


def read_rule(text: str) -> dict[str, Any]:
    """The fields of a `Rule` that `qstar_rule` holds.

    Raises:
        ValueError: it is not one, or a setting is outside its range.
    """
    try:
        fields = json.loads(text)
        return fields | {"settings": Settings(**fields["settings"])}
    except (TypeError, KeyError) as error:
        raise ValueError(f"qstar_rule is {text!r}; it must be what qstar.vllm.params.rule_text gives") from error


class PairParams(LogitsProcessor):
    """Refuses what would be left undone, since vLLM asks every logits processor about a request; changes no logits."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        for name, neutral in REFUSED.items():
            if (value := getattr(sampling_params, name)) not in (neutral, None, []):
                raise ValueError(f"{name} is {value!r}; a pair of models does not support it")
        if sampling_params.logprobs == -1:
            raise ValueError("logprobs is -1; a pair of models gives a number of them, not all")
        read_rule((sampling_params.extra_args or {}).get("qstar_rule", DEFAULT_RULE))

    def __init__(self, vllm_config, device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update) -> None:
        pass
