"""Where a pair's engine draws: q* and its numbers for every row of a batch, in place of vLLM's own sampler.

vLLM's V1 runner has no hook for a sampler that needs to know whose row it draws, so the worker, which vLLM lets one
choose, replaces the runner's.
"""

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.sampler import Sampler

from qstar.rule import Rule
from qstar.sample import numbers_of
from qstar.vllm.params import Asked
from qstar.vllm.weights import FIRST_VERSION
from qstar_kernels import QStarStep, Status

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

LOGITS = 1 << 26  # of both models, that are solved for at once: bounds the memory of a step, not its results
FORGOTTEN = 1024  # requests that have ended and whose numbers nobody has fetched, beyond as many as are alive
ROW = tuple[Asked, int]  # what a row of logits is for: who asked, and the token's place


class PairSampler(Sampler):
    """Draws from q* with the noise of each request (`params`).

    Args:
        runner: the model runner, which knows the requests behind the rows.
        pair: `hf_overrides["qstar"]` (see `engine.engine_options`).
    """

    def __init__(self, runner, pair: dict):
        super().__init__()
        self.runner, self.pair = runner, pair
        self.asked: dict[str, Asked] = {}  # by the name of the request
        self.rules: dict[Rule, Rule] = {}  # one of each, which a step then tells apart without reading them
        # by key, of each token: its row [2 + F], on the device, and the version of the weights that drew it
        self.numbers: dict[str, list[tuple[Tensor, str | None]]] = {}
        self.version: str | None = FIRST_VERSION  # None: nobody has named these weights

    def forward(self, logits: Tensor, sampling_metadata, **_) -> SamplerOutput:
        batch = self.runner.input_batch
        if sampling_metadata is batch.sampling_metadata:
            rows = [self.row(name) for name in batch.req_ids]
            # the noise is ours, and after a chunk of a prompt vLLM would turn a generator back, which a CPU's cannot
            batch.generators.clear()
        else:  # the engine measures its memory
            rows = [(Asked.of("", SamplingParams(), self.pair), 0)] * len(logits)
        top = sampling_metadata.max_num_logprobs
        tokens, log_q = self.draw(logits, rows, top is not None)
        logprobs = None if log_q is None else self.gather_logprobs(log_q, top, tokens)
        return SamplerOutput(sampled_token_ids=tokens.int()[:, None], logprobs_tensors=logprobs)

    def row(self, name: str) -> ROW:
        """What the next row of a request is for."""
        state = self.runner.requests[name]
        if name not in self.asked:
            self.tidy()
            asked = Asked.of(name, state.sampling_params, self.pair)
            self.asked[name] = replace(asked, rule=self.rules.setdefault(asked.rule, asked.rule))
        return self.asked[name], len(state.output_token_ids)

    def tidy(self) -> None:
        """Drop what is known of requests that have ended, and numbers that nobody will fetch (of aborted requests)."""
        alive = self.runner.requests
        if len(self.asked) > 2 * len(alive):
            self.asked = {name: asked for name, asked in self.asked.items() if name in alive}
            self.rules = {asked.rule: asked.rule for asked in self.asked.values()}
        if len(self.numbers) > 2 * len(alive) + FORGOTTEN:
            wanted = {asked.key for name, asked in self.asked.items() if name in alive}
            old = [key for key in self.numbers if key not in wanted]
            for key in old[: len(old) // 2]:
                del self.numbers[key]

    def draw(self, logits: Tensor, rows: list[ROW], want_log_q: bool) -> tuple[Tensor, Tensor | None]:
        """A token a row, int64 [N], and log q* [N, V] if wanted."""
        theta, t = logits.chunk(2, -1)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        log_q = torch.empty_like(theta, dtype=torch.float32) if want_log_q else None
        alike: dict[tuple[int, bool], list[int]] = {}
        for i, (asked, position) in enumerate(rows):
            alike.setdefault((id(asked.rule), position == 0), []).append(i)
        size = max(1, LOGITS // logits.shape[1])
        for (_, first), members in alike.items():
            rule = rows[members[0]][0].rule
            for chunk in (members[start : start + size] for start in range(0, len(members), size)):
                index = torch.tensor(chunk, device=logits.device)
                of_chunk = [rows[i] for i in chunk]
                seeds = torch.tensor([asked.seed for asked, _ in of_chunk], device=logits.device)
                positions = torch.tensor([position for _, position in of_chunk], device=logits.device)
                step = rule.step(theta[index], t[index], first=first, seeds=seeds, positions=positions)
                self.keep(step, of_chunk)
                # a row without a distribution ends here; its status says why
                tokens[index] = torch.where(step.status == Status.OK, step.token, self.pair["eos_ids"][0])
                if want_log_q:
                    log_q[index] = rule.log_q(theta[index], t[index], first=first).float()
        return tokens, log_q

    def keep(self, step: QStarStep, rows: list[ROW]) -> None:
        """Keep the numbers of a step for the requests that want them."""
        for (asked, position), of_row in zip(rows, numbers_of(step).unbind(), strict=True):
            if asked.key is not None:
                kept = self.numbers.setdefault(asked.key, [])
                kept[position:] = [(of_row, self.version)]  # what a prompt's chunk before the last draws is dropped

    def pop(self, keys: list[str]) -> dict[str, tuple[list[list[float]], list[str | None]]]:
        """What is kept under these keys: token, status and `FIELDS` of every token [tokens][2 + F], and the weights.

        The weights are all versions that had a part in it, in their order.
        """
        found = {}
        for key in keys:
            if key in self.numbers:
                rows, versions = zip(*self.numbers.pop(key), strict=True)
                found[key] = torch.stack(rows).tolist(), list(dict.fromkeys(versions))
        return found


class PairWorker(Worker):
    """vLLM's worker for this platform with `PairSampler` in the place of its sampler."""

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        self.model_runner.sampler = PairSampler(self.model_runner, self.vllm_config.model_config.hf_config.qstar)

    def pop_numbers(self, keys: list[str]) -> dict[str, tuple[list[list[float]], list[str | None]]]:
        """`PairSampler.pop`, for `collective_rpc`."""
        return self.model_runner.sampler.pop(keys)

    def load_pair(self, folders: dict[str, str], version: str) -> None:
        """Load new weights of π_θ, π_t or both from folders that `check_update` has passed; no request is running."""
        self.model_runner.sampler.version = None
        loader = get_model_loader(self.vllm_config.load_config)
        for side, folder in folders.items():
            model, config = getattr(self.model_runner.get_model(), side), copy(self.vllm_config.model_config)
            config.model, config.model_weights, config.revision = folder, "", None
            weights = loader.get_all_weights(config, model)
            with set_current_vllm_config(self.vllm_config):
                reload_weights(self.vllm_config, model, weights, weights_path=None, is_checkpoint_format=True)
            for module in model.modules() if current_platform.is_cpu() else ():
                if isinstance(module, ParallelLMHead):  # tied, it has no weights to load, but a packed copy of the old
                    module.quant_method.process_weights_after_loading(module)
        self.model_runner.sampler.version = version

    def start_weight_update(self) -> None:
        """vLLM's own way to new weights (`t:` before the names of π_t's), which tells a worker no version."""
        self.model_runner.sampler.version = None
        super().start_weight_update()

    def reload_weights(self, *args, **kwargs) -> None:
        self.model_runner.sampler.version = None
        super().reload_weights(*args, **kwargs)
