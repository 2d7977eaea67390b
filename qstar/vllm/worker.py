"""Where a pair's engine draws: q* and its numbers for every row of a batch, in place of vLLM's own sampler.

vLLM's V1 runner has no hook for a sampler that needs to know whose row it draws, so the worker, which vLLM lets one
choose, replaces the runner's.
"""

import hashlib
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.sampler import Sampler

from qstar.decode import FIELDS
from qstar.pair import sample_seed
from qstar.rule import Rule
from qstar.vllm.params import DEFAULT_RULE, read_rule
from qstar_kernels import QStarStep, Status

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

LOGITS = 1 << 26  # of both models, that are solved for at once: bounds the memory of a step, not its results
NUMBERED = re.compile(r"(\d+)_")  # vLLM names the n samples of a request by their number and the request's name


@dataclass(frozen=True)
class Row:
    """What a row of logits belongs to: the noise of its token, and where its numbers go."""

    seed: int
    position: int  # of the token in its answer
    rule: str
    key: str | None  # of its numbers
    number: int  # among the n samples of a request

    @classmethod
    def of(cls, state) -> "Row":
        """The next token of a request, from the runner's state of it."""
        extra, name = state.sampling_params.extra_args or {}, state.req_id
        number = int(match[1]) if (match := NUMBERED.match(name)) else 0
        seed = extra.get("qstar_seed")
        if seed is None:  # the name ends in random characters of vLLM's
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
        elif number:
            seed = sample_seed(seed, 0, number)
        rule = extra.get("qstar_rule", DEFAULT_RULE)
        return cls(seed, len(state.output_token_ids), rule, extra.get("qstar_key"), number)


class PairSampler(Sampler):
    """Draws from q* with the noise of each request (`params`).

    Args:
        runner: the model runner, which knows the requests behind the rows.
        pair: `hf_overrides["qstar"]` (see `engine.engine_options`).
    """

    def __init__(self, runner, pair: dict):
        super().__init__()
        self.runner, self.pair, self.rules = runner, pair, {}
        # by key and by the request's number among the n of its prompt: one row [2 + F] a token, on the device
        self.numbers: dict[str, dict[int, list[Tensor]]] = {}

    def forward(self, logits: Tensor, sampling_metadata, **_) -> SamplerOutput:
        batch = self.runner.input_batch
        if sampling_metadata is batch.sampling_metadata:
            rows = [Row.of(self.runner.requests[name]) for name in batch.req_ids]
        else:  # the engine measures its memory
            rows = [Row(0, 0, DEFAULT_RULE, None, 0)] * len(logits)
        top = sampling_metadata.max_num_logprobs
        tokens, log_q = self.draw(logits, rows, top is not None)
        logprobs = None if log_q is None else self.gather_logprobs(log_q, top, tokens)
        return SamplerOutput(sampled_token_ids=tokens.int()[:, None], logprobs_tensors=logprobs)

    def draw(self, logits: Tensor, rows: list[Row], want_log_q: bool) -> tuple[Tensor, Tensor | None]:
        """A token a row, int64 [N], and log q* [N, V] if wanted."""
        theta, t = logits.chunk(2, -1)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        log_q = torch.empty_like(theta, dtype=torch.float32) if want_log_q else None
        alike: dict[tuple[str, bool], list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault((row.rule, row.position == 0), []).append(i)
        size = max(1, LOGITS // logits.shape[1])
        for (text, first), members in alike.items():
            rule = self.rule(text)
            for chunk in (members[start : start + size] for start in range(0, len(members), size)):
                index = torch.tensor(chunk, device=logits.device)
                of_chunk = [rows[i] for i in chunk]
                seeds = torch.tensor([row.seed for row in of_chunk], device=logits.device)
                positions = torch.tensor([row.position for row in of_chunk], device=logits.device)
                step = rule.step(theta[index], t[index], first=first, seeds=seeds, positions=positions)
                self.keep(step, of_chunk)
                # a row without a distribution ends here; its status says why
                tokens[index] = torch.where(step.status == Status.OK, step.token, self.pair["eos_ids"][0])
                if want_log_q:
                    log_q[index] = rule.log_q(theta[index], t[index], first=first).float()
        return tokens, log_q

    def rule(self, text: str) -> Rule:
        if text not in self.rules:
            fields = {"vocab_size": self.pair["vocab_size"], "special_ids": tuple(self.pair["special_ids"])}
            self.rules[text] = Rule(**fields | read_rule(text))
        return self.rules[text]

    def keep(self, step: QStarStep, rows: list[Row]) -> None:
        """Keep the numbers of a step for the requests that want them."""
        numbers = torch.stack([getattr(step, name).double() for name in ("token", "status", *FIELDS)], -1)
        for row, of_row in zip(rows, numbers.unbind(), strict=True):
            if row.key is not None:
                kept = self.numbers.setdefault(row.key, {}).setdefault(row.number, [])
                kept[row.position :] = [of_row]  # a prompt's chunk before the last draws a token too, and it is dropped

    def pop(self, keys: list[str]) -> dict[str, dict[int, list[list[float]]]]:
        """Token, status and `FIELDS` of every token of these requests [tokens][2 + F], by key and number."""
        found = {key: self.numbers.pop(key) for key in keys if key in self.numbers}
        return {
            key: {number: torch.stack(rows).tolist() for number, rows in samples.items()}
            for key, samples in found.items()
        }


class PairWorker(Worker):
    """vLLM's worker for this platform with `PairSampler` in the place of its sampler."""

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        self.model_runner.sampler = PairSampler(self.model_runner, self.vllm_config.model_config.hf_config.qstar)

    def pop_numbers(self, keys: list[str]) -> dict[str, dict[int, list[list[float]]]]:
        """`PairSampler.pop`, for `collective_rpc`."""
        return self.model_runner.sampler.pop(keys)
