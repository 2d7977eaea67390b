"""q* inside vLLM: one engine that holds both models, with a paged KV cache of each.

The pair is an out-of-tree model of vLLM (`model.py`) that hands the logits of both models on. A worker (`worker.py`)
solves for q* there and draws with this package's own noise, so that a sample does not depend on what else is in the
batch; `params.py` is what a request says. `engine.py` starts such an engine and gives it the interface of the
transformers backend; `server.py` adds the per-token numbers to the responses of vLLM's OpenAI-compatible server.
"""

import multiprocessing
import os
import signal
import threading
from argparse import Namespace

ARCHITECTURE = "QStarPairForCausalLM"
WORKER = "qstar.vllm.worker.PairWorker"
DUAL_PROMPTS = "with --backend vllm both models see one prompt; use --backend transformers for prompts that differ"
SERVER = "QSTAR_SERVER"  # set in the environment of a server and so of its engine
# arguments of vLLM's engine that say where it runs and how much at once
PLACEMENT = frozenset(
    "block_size cpu_offload_gb distributed_executor_backend enable_chunked_prefill enable_prefix_caching enforce_eager "
    "gpu_memory_utilization kv_cache_memory_bytes max_num_batched_tokens max_num_seqs num_gpu_blocks_override "
    "tensor_parallel_size".split()
)


def refuse(args: Namespace) -> None:
    """Refuse the command line of a pair with adapters, or whose models see different prompts.

    Raises:
        ValueError: it has, or they would.
    """
    refuse_adapters(args)
    if args.t_hint_field is not None:
        raise ValueError(f"--t-hint-field: {DUAL_PROMPTS}")
    if args.theta_system_prompt != args.t_system_prompt:
        raise ValueError(f"--theta-system-prompt and --t-system-prompt differ: {DUAL_PROMPTS}")
    if (args.theta_template_kwargs or {}) != (args.t_template_kwargs or {}):
        raise ValueError(f"--theta-template-kwargs and --t-template-kwargs differ: {DUAL_PROMPTS}")


def refuse_adapters(args: Namespace) -> None:
    """Refuse a pair with adapters. Raises ValueError."""
    for side in ("theta", "t"):
        if getattr(args, f"adapter_{side}") is not None:
            raise ValueError(
                f"--adapter-{side}: a vLLM engine holds a pair without adapters; use qstar.generate --backend "
                "transformers, or merge the adapter into its base"
            )


def register() -> None:
    """Make the pair known to vLLM in this process (entry point of `vllm.general_plugins`)."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "qstar.vllm.model:QStarPairForCausalLM")
    parent = multiprocessing.parent_process()
    if SERVER in os.environ and parent is not None:
        # a server that is killed would leave vLLM's engine behind, with the memory of its device
        threading.Thread(target=die_with, args=(parent,), daemon=True).start()


def die_with(parent) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
