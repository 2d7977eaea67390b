"""A vLLM engine that holds a pair, behind the interface of the transformers backend."""

import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qstar.cache import kept
from qstar.pair import Pair, naming
from qstar.sample import DecodeOptions, Ending, Request, Sample
from qstar.speculate import Tally
from qstar.vllm import ARCHITECTURE, DUAL_PROMPTS, WORKER, register
from qstar.vllm.params import PREFIX, numbers_key, of_any_rank, rule_fields
from qstar.vllm.weights import TORN, Versions, check_update
from qstar_kernels.types import METHODS, READ_BY

CPU_CACHE_BYTES = 2 << 30  # for both KV caches: on a CPU vLLM's own default is nearly all of the memory

# What vLLM reads from its environment. Its V2 model runner, which needs a GPU, was never run with a pair.
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def description(name: str | Path, trust_remote_code: bool):
    """A model without its weights, and its tokenizer: all that is to be known of it outside the engine.

    Raises:
        OSError: it cannot be found.
    """
    with naming(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval()
    with suppress(OSError):  # then it is made from the config, as transformers does
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


class EnginePair(Pair):
    """A pair whose weights are in a vLLM engine; `request`, `stream` and `generate` are as ever.

    Args:
        theta, t: hub names or local folders.
        dtype: of both models: `float32`, `bfloat16`, `float16`, or `auto`: π_θ's checkpoint's, float32 on a CPU.
        max_num_seqs: sequences that are decoded together.
        trust_remote_code: run code that a checkpoint brings along.
        options: further arguments of `vllm.EngineArgs`.

    Raises:
        ValueError: the models do not form a pair, or vLLM refuses an option or a model.
        OSError: a model cannot be found.
    """

    def __init__(
        self,
        theta: str | Path,
        t: str | Path,
        *,
        dtype: str = "auto",
        max_num_seqs: int = 256,
        trust_remote_code: bool = False,
        options: dict[str, Any] | None = None,
    ):
        (model_theta, tokenizer_theta), (model_t, tokenizer_t) = (description(x, trust_remote_code) for x in (theta, t))
        for name, model in (("theta", model_theta), ("t", model_t)):
            if "states" in kept(model):
                kind = f"{name} ({model.config.model_type})"
                raise ValueError(
                    f"{kind} has recurrent layers, whose states a vLLM engine does not hold for two models; the "
                    "transformers backend of qstar.generate does"
                )
        super().__init__(model_theta, model_t, tokenizer_theta, tokenizer_t)
        self.names = {"theta": str(theta), "t": str(t)}
        self.engine_options = engine_options(self, dtype) | {"max_num_seqs": max_num_seqs}
        self.engine_options |= {"trust_remote_code": trust_remote_code} | (options or {})
        self.engine, self.versions = None, Versions()

    def start(self) -> None:
        """Start the engine, which loads the weights; `decoder` does it where it has not been done.

        Raises:
            ValueError: vLLM refuses an option or a model; the message is its own.
        """
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        register()
        # in this process: it starts sooner, dies with the command, and what goes wrong can be said
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        own = {"skip_tokenizer_init": True, "disable_log_stats": True, "use_tqdm_on_load": False}
        try:
            arguments = EngineArgs(**own | self.engine_options)
            check_engine(arguments)
            self.engine, self.versions = LLMEngine.from_engine_args(arguments), Versions()
        except Exception as error:  # vLLM raises all kinds, from its processes bare ones
            raise ValueError(f"vLLM does not start: {error}") from error

    def stop(self) -> None:
        """Give the engine's memory back; another one can then be started in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if self.engine is not None:
            self.engine.engine_core.shutdown()
            self.engine = None
            cleanup_dist_env_and_memory()

    def update_weights(
        self, theta: str | Path | None = None, t: str | Path | None = None, version: str | None = None
    ) -> str:
        """Replace the weights of π_θ, π_t or both in the engine, between two runs; what it has cached is dropped.

        Args:
            theta, t: folders as `save_pretrained` writes them, of models of the same shape.
            version: a name for the new weights; None counts on.

        Returns:
            the name.

        Raises:
            ValueError: a folder is not of the model, samples are being drawn, or the engine is not running; nothing has
                changed.
            RuntimeError: the engine could not load them. It draws nothing until an update succeeds.
        """
        if self.engine is None:
            raise ValueError("the engine is not running: start it with the new weights instead")
        if self.engine.has_unfinished_requests():
            raise ValueError("samples are being drawn; new weights come between two runs")
        folders = {side: str(x) for side, x in (("theta", theta), ("t", t)) if x is not None}
        check_update(self, folders)
        version = self.versions.next(version)
        with self.versions.loading(version):
            self.engine.collective_rpc("load_pair", args=(folders, version))
            self.engine.reset_prefix_cache()
        return version

    def decoder(self, options: DecodeOptions) -> "EngineDecoder":
        if self.engine is None:
            self.start()
        if self.versions.now is None:
            raise ValueError(TORN)
        return EngineDecoder(self, options)


def load(args: Namespace) -> EnginePair:
    """The pair of a command line."""
    return EnginePair(
        args.model_theta,
        args.model_t,
        dtype=args.dtype,
        max_num_seqs=args.batch_size,
        trust_remote_code=args.trust_remote_code,
        options=args.vllm_options,
    )


def engine_options(pair: Pair, dtype: str = "auto", rule: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of `vllm.EngineArgs` that make its model the pair.

    `rule` (`params.rule_fields`) is for requests that say nothing of their own.
    """
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    eos_ids, special_ids = sorted(pair.eos_ids), sorted(pair.special_ids)
    theta, t = pair.names.values()
    told = {"model_t": t, "vocab_size": pair.vocab_size, "eos_ids": eos_ids, "special_ids": special_ids}
    told["rule"] = rule or {}
    told["parameters"] = {side: sum(x.numel() for x in getattr(pair, side).parameters()) for side in pair.names}
    return {
        "model": theta,
        "dtype": "float32" if dtype == "auto" and on_cpu else dtype,
        "max_model_len": pair.context,
        "hf_overrides": {"architectures": [ARCHITECTURE], "vocab_size": pair.vocab_size, "qstar": told},
        "worker_cls": WORKER,
        "logits_processors": ["qstar.vllm.params:PairParams"],
        "generation_config": "vllm",
        "async_scheduling": False,  # never run with a pair: vLLM has it on GPUs only
    } | ({"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enforce_eager": True} if on_cpu else {})


def check_engine(arguments: Any) -> None:
    """Refuse what would start and then not draw from q*, or not say what it has drawn.

    Args:
        arguments: an `EngineArgs`, or the arguments of vLLM's server.

    Raises:
        ValueError: an option is not for a pair.
    """
    if arguments.speculative_config is not None:
        raise ValueError("speculative_config: a pair of models draws without drafts in vLLM")
    if arguments.data_parallel_size > 1:
        raise ValueError("data_parallel_size must be 1: a pair is one engine; start one for each group of devices")


class EngineDecoder:
    """What `qstar.decode.Decoder` is, by a vLLM engine: `run` draws sequences.

    Args:
        pair: with a running engine.
        options: how to draw; `batch_size` of them and as many waiting are in flight.
    """

    names = count()

    def __init__(self, pair: EnginePair, options: DecodeOptions):
        if options.speculate:
            raise ValueError("a vLLM engine draws without drafts: speculate must be 0")
        self.engine, self.options, self.tally = pair.engine, options, Tally()
        self.ending = Ending(pair.eos_ids, pair.tokenizer_theta, options)

    def run(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Generate all requests; samples come as they finish.

        Raises:
            ValueError: a request has two prompts.
            ChildProcessError: the engine died.
        """
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        source, live = iter(requests), {}
        try:
            while True:
                for request in islice(source, 2 * self.options.batch_size - len(live)):
                    sample = Sample(request)
                    if request.ids_theta != request.ids_t:
                        raise ValueError(DUAL_PROMPTS)
                    try:
                        live[self._add(request)] = sample, []
                    except (ValueError, VLLMValidationError) as error:
                        sample.error = str(error)
                        self.ending.finish(sample)
                        yield sample
                if not live:
                    return
                ended = self._step(live)
                numbers = self._numbers(ended)
                for name in ended:
                    sample, _ = live.pop(name)
                    self._fill(sample, numbers.get(numbers_key(name), []))
                    yield sample
        except EngineDeadError as error:
            raise ChildProcessError(f"the vLLM engine died, what is on disk is kept: {error}") from error
        finally:
            if live:  # the caller wants no more
                self.engine.abort_request(list(live))
                self._numbers(list(live))

    def _add(self, request: Request) -> str:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        name, options = f"qstar-{next(self.names)}", self.options
        method, said = options.settings.method, rule_fields(options.settings, options)
        rule = {PREFIX + name: value for name, value in said.items() if method in READ_BY.get(name, METHODS)}
        params = SamplingParams(
            max_tokens=request.max_new_tokens,
            stop_token_ids=sorted(self.ending.eos_ids | self.ending.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if self.ending.stop else RequestOutputKind.FINAL_ONLY,
            extra_args=rule | {"qstar_seed": request.seed, "numbers_key": name},
        )
        self.engine.add_request(name, TokensPrompt(prompt_token_ids=request.ids_theta), params)
        return name

    def _step(self, live: dict[str, tuple[Sample, list[int]]]) -> list[str]:
        """One step of the engine: the names of the requests that have ended."""
        ended, stopped = [], []
        for output in self.engine.step():
            if output.request_id not in live:
                continue
            _, ids = live[output.request_id]
            done = output.finished
            for token in output.outputs[0].token_ids if self.ending.stop and not done else ():
                ids.append(token)
                if self.ending.stops(ids):
                    stopped.append(output.request_id)
                    done = True
                    break
            if done:
                ended.append(output.request_id)
        if stopped:
            self.engine.abort_request(stopped)
        return ended

    def _numbers(self, names: list[str]) -> dict[str, list[list[float]]]:
        """Token, status and `FIELDS` of every token of these requests, by `numbers_key`."""
        if not names:
            return {}
        keys = [numbers_key(name) for name in names]
        popped = of_any_rank(self.engine.collective_rpc("pop_numbers", args=(keys,)))
        return {key: rows for key, (rows, _) in popped.items()}

    def _fill(self, sample: Sample, numbers: list[list[float]]) -> None:
        for token, status, *values in numbers:
            sample.draw(token, status, values)
            self.ending.finish(sample)
            if sample.finish_reason:
                return
        sample.error = f"vLLM ended the request after {len(numbers)} of {sample.request.max_new_tokens} tokens"
        self.ending.finish(sample)
