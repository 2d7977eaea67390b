"""Rollouts from q* in verl: an agent loop that asks a server of `qstar.serve` and returns log q*.

verl's actors learn, and its agent loops ask a server for completions. This one asks the server of a pair, with verl's
own prompt tokens, and returns log q* of every token as `response_logprobs`. They become `rollout_log_probs`, which
verl's rollout correction puts into the loss (`algorithm.rollout_correction`, `rollout.calculate_log_probs=true`). π_θ
at the server is what it was started with, or last given (`/v1/qstar/weights`), and log q* that of its pair.

A file for `rollout.agent.agent_loop_config_path`, beside `rollout.agent.default_agent_loop=qstar`:

    - name: qstar
      _target_: qstar.integrations.verl.QStarAgentLoop
      base_url: http://localhost:8000/v1
      rule: {method: fixed, alpha: 0.5}

verl wants an older transformers than the rest of this package: `pip install --no-deps qstar` beside verl and `openai`.
"""

import os
import time
from typing import Any

from openai import AsyncOpenAI
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register

from qstar_kernels.types import FIELDS

NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
PASSED_ON = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids")


@register("qstar")
class QStarAgentLoop(AgentLoopBase):
    """One turn of text from q*.

    Args:
        base_url: of the server, with its `/v1`.
        rule: the request's field `qstar`: `method`, `alpha`, … (the server's own by default).
        model: its name there.
        api_key: of the server; `QSTAR_API_KEY` of the environment by default.
        **theirs: what verl gives to every agent loop.
    """

    def __init__(
        self,
        *,
        base_url: str,
        rule: dict[str, Any] | None = None,
        model: str = "qstar",
        api_key: str | None = None,
        **theirs,
    ):
        super().__init__(**theirs)
        self.client = AsyncOpenAI(base_url=base_url, api_key=api_key or os.environ.get("QSTAR_API_KEY", "none"))
        self.model, self.rule = model, dict(rule or {})

    async def run(self, sampling_params: dict[str, Any], **kwargs) -> AgentLoopOutput:
        """Ask for the completion of a row's `raw_prompt`, sampled as verl's config says.

        Returns:
            the prompt's and the completion's tokens, log q* of the latter in nats, and in `extra_fields` its other
            numbers, `qstar_alpha`, `qstar_kl_theta` and so on, and `qstar_weights_version`, the server's.

        Raises:
            ValueError: the row has pictures, films or sound, a parameter has no meaning for q*, or a token has no
                distribution.
            OpenAIError: the server says no, or is not there.
        """
        messages = list(kwargs["raw_prompt"])
        if await self.process_multi_modal_info(messages):
            raise ValueError("the prompt has pictures, films or sound; q* is drawn from text alone")
        for name, neutral in NEUTRAL.items():
            if sampling_params.get(name, neutral) != neutral:
                raise ValueError(f"{name} is {sampling_params[name]}, which q* does not have; leave it at {neutral}")
        asked = {name: sampling_params[name] for name in PASSED_ON if sampling_params.get(name) is not None}
        prompt_ids, start = await self.ct_build_initial_tokens(messages), time.perf_counter()
        length = self.rollout_config.response_length
        answer = await self.client.completions.create(
            model=self.model, prompt=prompt_ids, max_tokens=length, extra_body={"qstar": self.rule, **asked}
        )
        numbers = answer.choices[0].qstar
        if numbers["error"] is not None:
            raise ValueError(numbers["error"])
        others = {f"qstar_{name}": numbers[name] for name in (*FIELDS, "weights_version") if name != "logq"}
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=numbers["token_ids"],
            response_mask=[1] * len(numbers["token_ids"]),
            response_logprobs=numbers["logq"],
            num_turns=2,
            metrics={"generate_sequences": time.perf_counter() - start},
            # as verl's own loops have it, so that batches of several loops can be put together
            extra_fields={**others, "turn_scores": [], "tool_rewards": []},
        )
