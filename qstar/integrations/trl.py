"""Rollouts from q* in trl's trainers (extra `trl`): what is drawn, and log q* where the loss uses it.

    from qstar.integrations.trl import QStarGRPO, QStarRollout

    class Trainer(QStarGRPO, GRPOTrainer): ...

    Trainer(model, reward_funcs=reward, train_dataset=data, rollout_func=QStarRollout("./teacher")).train()

The trainer's live model is π_θ, as it is at that step, without a copy; π_t is a teacher, or the base of the trainer's
adapter. trl takes the log-probabilities that a rollout returns and forgets them unless vLLM generates: `QStarGRPO` puts
them into the ratio, which is then π_θ/q*.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request as HTTPRequest
from urllib.request import urlopen

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qstar.adapters import is_peft
from qstar.pair import Pair, sample_seed
from qstar.rule import FORCED
from qstar.sample import DecodeOptions, Request, Sample
from qstar_kernels.types import FIELDS, SETTINGS, Settings, check_read

NUMBERS = tuple(name for name in FIELDS if name != "logq")
LOGGED = tuple(name for name in NUMBERS if not name.startswith("logp"))
IMAGES = "the prompts have images, which both models would have to see; q* is drawn from text alone"
ON_POLICY = {
    "method": "fixed",
    "alpha": 1.0,
    "alpha_min": 0.0,
    "alpha_max": 1.0,
    "target_top_k": 0,
    "target_top_p": 1.0,
}
ON_POLICY |= dict.fromkeys(FORCED, False)


def annealed(start: float, end: float, steps: int) -> Callable[[int], float]:
    """A schedule: from `start` at step 0 in a straight line to `end` at step `steps`, and `end` from there on."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    return lambda step: start + (end - start) * min(step / steps, 1.0)


class QStarRollout:
    """`GRPOTrainer(rollout_func=QStarRollout(teacher))`: completions from q* of the trainer's model and a teacher.

    In training they are drawn from q*; in evaluation from π_θ alone, whose reward is wanted there. Lengths, temperature
    and truncation are those of the trainer's config. Noise follows from the config's seed, the step and the row.

    Args:
        teacher: π_t: a model, or the name or folder of one. By default the trainer's own teacher, or the base of its
            adapter.
        tokenizer_t: the teacher's; by default the one where the teacher was loaded from, else the trainer's.
        adapter_t: another adapter of the trainer's peft model as π_t, in place of its base.
        prompt_t: makes of a prompt what π_t sees of it; the prompt itself by default.
        schedule: numeric settings that follow the trainer's step, as `{"alpha": annealed(0.0, 1.0, 100)}`.
        batch_size: sequences that are decoded together.
        **options: the rule for α, and how to draw (fields of `qstar.sample.DecodeOptions`), as for `Pair.generate`.

    Raises:
        ValueError: an option is unknown or outside its range, or has no effect; while training: the models are no pair,
            or the trainer asks for what q* does not have.
    """

    def __init__(
        self,
        teacher: str | PreTrainedModel | None = None,
        *,
        tokenizer_t=None,
        adapter_t: str | None = None,
        prompt_t: Callable[[Any], Any] | None = None,
        schedule: Mapping[str, Callable[[int], float]] | None = None,
        batch_size: int = 32,
        **options,
    ):
        if adapter_t is not None and teacher is not None:
            raise ValueError("teacher and adapter_t are both given; π_t is one of them")
        self.teacher, self.tokenizer_t, self.adapter_t = teacher, tokenizer_t, adapter_t
        self.prompt_t, self.schedule, self.options = (
            prompt_t,
            dict(schedule or {}),
            {"batch_size": batch_size} | options,
        )
        for name in self.schedule:
            if name not in SETTINGS or name == "method":
                raise ValueError(
                    f"schedule has {name!r}; it may have {', '.join(n for n in SETTINGS if n != 'method')}"
                )
        check_read(self.schedule, options.get("method", Settings.method))
        DecodeOptions.of(**self.options, **self.scheduled(0))
        self.pair: Pair | None = None
        self._model: torch.nn.Module | None = None
        self._calls = (-1, 0)  # the step of the last call, and how many there were in that step

    def scheduled(self, step: int) -> dict[str, float]:
        """The settings of the schedule at a step."""
        return {name: value(step) for name, value in self.schedule.items()}

    def __call__(self, prompts: list, trainer) -> dict[str, list]:
        """trl's protocol: for each prompt one completion, with log q* as `logprobs`, and its tokens' other numbers as
        `qstar_alpha`, `qstar_kl_theta` and so on, which reach the reward functions by these names."""
        if getattr(trainer, "tools", None) or getattr(trainer, "environments", None):
            raise ValueError("with tools or environments trl itself draws the turns behind the first; leave them out")
        ids_theta = text_ids(trainer, prompts)
        ids_t = ids_theta if self.prompt_t is None else text_ids(trainer, [self.prompt_t(x) for x in prompts])
        samples = self.draw(trainer, ids_theta, ids_t)
        return {
            "prompt_ids": ids_theta,
            "completion_ids": [s.token_ids for s in samples],
            "logprobs": [s.fields["logq"] for s in samples],
            **{f"qstar_{name}": [s.fields[name] for s in samples] for name in NUMBERS},
        }

    def draw(self, trainer, ids_theta: list[list[int]], ids_t: list[list[int]] | None = None) -> list[Sample]:
        """A sample for each prompt, by the trainer's models as they are now."""
        step, mode = trainer.state.global_step, "train" if trainer.model.training else "eval"
        pair = self.of_trainer(trainer)
        options = {name: getattr(trainer, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        options = {name: value for name, value in options.items() if value is not None} | self.options
        options |= self.scheduled(step) if mode == "train" else ON_POLICY
        options = DecodeOptions.of(**options)
        count = self._calls[1] + 1 if self._calls[0] == step else 0
        self._calls, rank = (step, count), trainer.accelerator.process_index
        requests = []
        for i, (theta, t) in enumerate(zip(ids_theta, ids_t or ids_theta, strict=True)):
            room = pair.context - max(len(theta), len(t))
            if room < 1:
                raise ValueError(f"a prompt has {max(len(theta), len(t))} tokens; the pair has room for {pair.context}")
            seed = sample_seed(trainer.args.seed, step, (rank << 32) + i, count)
            requests.append(Request(i, list(theta), list(t), seed, min(trainer.max_completion_length, room)))
        with pair.in_evaluation():
            samples = sorted(pair.decoder(options).run(requests), key=lambda s: s.request.key)
        for sample in samples:
            if sample.error is not None:
                raise ValueError(f"completion {sample.request.key} of step {step}: {sample.error}")
        self._log(trainer, mode, samples)
        return samples

    def of_trainer(self, trainer) -> Pair:
        """The pair of the trainer's model and π_t, which is made once."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.pair is None or self._model is not model:
            refuse(trainer)
            self.pair, self._model = self._pair(trainer, model), model
            self.pair.eos_ids |= set(trainer.eos_token_ids)
        return self.pair

    def _pair(self, trainer, model: torch.nn.Module) -> Pair:
        tokenizer, teacher = trainer._tokenizer, self.teacher
        if teacher is None and self.adapter_t is None and getattr(trainer, "teacher_model", None) is not None:
            teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        if teacher is None:
            if not is_peft(model):
                raise ValueError("teacher is missing, and the trainer's model has no adapter whose base would be π_t")
            return Pair.with_adapter(model, tokenizer, adapter_t=self.adapter_t)
        teacher, tokenizer_t = self._teacher(trainer, teacher, tokenizer)
        return Pair(model, teacher, tokenizer, tokenizer_t, live=True)

    def _teacher(self, trainer, teacher: str | PreTrainedModel, others) -> tuple[PreTrainedModel, Any]:
        """π_t's model and tokenizer, which is the trainer's (`others`) where a model comes from nowhere."""
        device, is_name = trainer.accelerator.device, isinstance(teacher, (str, os.PathLike))
        tokenizer = self.tokenizer_t
        if tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(teacher if is_name else teacher.name_or_path)
            except (OSError, ValueError):
                if is_name:
                    raise
                tokenizer = others
        if is_name:
            dtype = torch.float32 if device.type == "cpu" else "auto"
            teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype).to(device).eval()
        return teacher, tokenizer

    @staticmethod
    def _log(trainer, mode: str, samples: list[Sample]) -> None:
        """Add the means over all tokens of all processes to the trainer's metrics."""
        count = sum(len(s.token_ids) for s in samples)
        sums = [sum(sum(s.fields[name]) for s in samples) for name in LOGGED]
        totals = trainer.accelerator.gather(torch.tensor([[count, *sums]], device=trainer.accelerator.device))
        count, *sums = totals.double().sum(0).tolist()
        for name, total in zip(LOGGED, sums, strict=True):
            trainer._metrics[mode][f"qstar/{name}"].append(total / count)


def text_ids(trainer, prompts: list) -> list[list[int]]:
    """The trainer's own token ids of prompts, texts or conversations."""
    ids, images, _ = trainer._tokenize_prompts(prompts)
    if images is not None:
        raise ValueError(IMAGES)
    return ids


def refuse(trainer) -> None:
    """Refuse a trainer whose config asks for what q* does not have, or whose weights are not whole in one process.

    Raises:
        ValueError: one line that says what.
    """
    if trainer.repetition_penalty not in (None, 1.0):
        raise ValueError(f"repetition_penalty is {trainer.repetition_penalty}, which q* does not have; leave it at 1")
    if trainer.args.generation_kwargs:
        raise ValueError(f"generation_kwargs has {', '.join(trainer.args.generation_kwargs)}, which q* does not have")
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError(
            "the weights are sharded (FSDP, ZeRO-3); q* is drawn where they are whole: DDP, or ZeRO-1 and 2"
        )


class QStarGRPO:
    """`class Trainer(QStarGRPO, GRPOTrainer)`: the ratio of the loss is π_θ/q*, with log q* as the rollout returned it.

    trl's ratio without vLLM is π_θ/π_θ as it was when the completions were drawn, whoever drew them. With vLLM and its
    importance correction trl uses them itself, and this class changes nothing.
    """

    def _compute_loss(self, model, inputs):
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            if inputs.get("sampling_per_token_logps") is None:
                raise ValueError("the completions came without log-probabilities; give rollout_func=QStarRollout(...)")
            inputs = {**inputs, "old_per_token_logps": inputs["sampling_per_token_logps"]}
        return super()._compute_loss(model, inputs)


class QStarDistillation:
    """`class Trainer(QStarDistillation, DistillationTrainer)`: the completions come from q*; the loss is trl's.

    Args:
        rollout: what draws them; `QStarRollout()`, of the trainer's model and its teacher, by default.
    """

    def __init__(self, *args, rollout: QStarRollout | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollout = rollout or QStarRollout()
        if self.rollout.prompt_t is not None:
            raise ValueError("the loss of distillation has the teacher on π_θ's prompts; leave prompt_t out")

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        if images is not None:
            raise ValueError(IMAGES)
        return [sample.token_ids for sample in self.rollout.draw(self, prompt_ids)]


class QStarWeights:
    """`AsyncGRPOTrainer(weight_transfer=QStarWeights(url, folder))`: the policy's weights for a server of q*.

    The server is `python -m qstar.serve --allow-weight-updates`, at trl's `vllm_server_base_url`, and has the policy's
    name as `--served-model-name`. trl's own worker gets log q* of the tokens from it, and the ratio is π_θ/q*.

    Args:
        url: of the server, as trl has it: `http://localhost:8000`.
        folder: where the weights are while they change hands; the server must read it by the same name.
        api_key: the server's, if it has one.
        timeout: seconds that the server may take to start, and an update to come in.
    """

    def __init__(self, url: str, folder: str | Path, *, api_key: str | None = None, timeout: float = 600.0):
        self.url, self.folder, self.timeout = f"{url.rstrip('/')}/v1/qstar/weights", Path(folder), timeout
        self.headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def init_weight_transfer(self) -> None:
        """Wait for the server.

        Raises:
            ValueError: it does not take weights.
            TimeoutError: it does not answer.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + self.timeout
        while True:
            try:
                return self._ask(None)
            except URLError as error:
                if time.monotonic() > until:
                    raise TimeoutError(f"no answer from {self.url} in {self.timeout:g} s: {error.reason}") from None
            time.sleep(0.5)

    def _ask(self, body: dict[str, str] | None) -> None:
        data = None if body is None else json.dumps(body).encode()
        try:
            urlopen(HTTPRequest(self.url, data, self.headers), timeout=self.timeout).close()
        except HTTPError as error:
            said = error.read().decode(errors="replace")
            if error.code == 404:
                said = "start the server with --allow-weight-updates"
            raise ValueError(f"{self.url} answered {error.code}: {said}") from None

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Give the server new weights of π_θ; requests that are running end with the old ones.

        Args:
            iterator: all tensors by their names in the checkpoint.

        Raises:
            ValueError: they are not those of its π_θ; nothing has changed.
        """
        with TemporaryDirectory(dir=self.folder) as new:
            save_torch_state_dict({name: x.detach().to("cpu").contiguous() for name, x in iterator}, new)
            self._ask({"theta": new})

    def pause(self) -> None:
        """The server lets the requests that are running end by itself."""

    def resume(self) -> None:
        """It goes on by itself."""

    def destroy(self) -> None:
        """There is nothing to let go of."""
