"""q* inside vLLM: one engine that holds both models, with a paged KV cache of each.

The pair is an out-of-tree model of vLLM (`model.py`) that hands the logits of both models on. A worker (`worker.py`)
solves for q* there and draws with this package's own noise, so that a sample does not depend on what else is in the
batch. `engine.py` starts such an engine and gives it the interface of the transformers backend; `server.py` adds the
per-token numbers to the responses of vLLM's OpenAI-compatible server.
"""

ARCHITECTURE = "QStarPairForCausalLM"


def register() -> None:
    """Make the pair known to vLLM in this process (entry point of `vllm.general_plugins`)."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "qstar.vllm.model:QStarPairForCausalLM")
