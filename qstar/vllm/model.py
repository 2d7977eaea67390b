"""The pair as one vLLM model: two sub-models of any architectures vLLM has, on the same tokens and block tables."""

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.transformers_utils.config import get_config

from qstar.vllm import WORKER

SIDES = ("theta", "t")


def sliding_window(config) -> int | None:
    """The window of all layers of a model; None where there is none, or where its layers differ."""
    alike = {"sliding_attention"}.issuperset(getattr(config, "layer_types", None) or ())
    return getattr(config, "sliding_window", None) or None if alike else None


class QStarPairForCausalLM(nn.Module):
    """π_θ and π_t side by side.

    The engine's model is π_θ's folder; `hf_overrides["qstar"]` names π_t's (`model_t`) and the length that both rows
    of logits are cut to (`vocab_size`).

    Raises:
        ValueError: the engine would sample from these logits as if they were one model's, or vLLM's own model leaves
            out parameters of a checkpoint, as its Qwen2 does where heads have a width of their own.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        if vllm_config.parallel_config.worker_cls != WORKER:
            raise ValueError(f"a pair of models needs worker_cls={WORKER}")
        if vllm_config.use_v2_model_runner:
            raise ValueError("a pair of models needs vLLM's V1 model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
        model, pair = vllm_config.model_config, vllm_config.model_config.hf_config.qstar
        self.vocab_size = pair["vocab_size"]
        self.secondary_weights = [DefaultModelLoader.Source(pair["model_t"], None, prefix="t:")]
        # compiled pieces are cached by tag, so each model needs its own
        for name, folder in zip(SIDES, (model.model, pair["model_t"]), strict=True):
            config = get_config(folder, model.trust_remote_code)
            # what vLLM knows of the whole engine's model, and takes for every layer that says nothing of its own
            vllm_config.cache_config.sliding_window = sliding_window(config.get_text_config())
            with set_model_tag(name):
                sub_model = init_vllm_registered_model(vllm_config, hf_config=config, prefix=maybe_prefix(prefix, name))
            setattr(self, name, sub_model)
            held = vllm_config.parallel_config.tensor_parallel_size * sum(x.numel() for x in sub_model.parameters())
            if vllm_config.quant_config is None and held < pair["parameters"][name]:
                raise ValueError(
                    f"vLLM's {type(sub_model).__name__} holds {held} of the {pair['parameters'][name]} parameters of "
                    f"{folder}; the transformers backend holds all"
                )
        self.width_theta = self.theta.config.get_text_config().hidden_size

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return torch.cat([self.theta.embed_input_ids(input_ids), self.t.embed_input_ids(input_ids)], -1)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors=None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Hidden states of both, beside each other: [tokens, width of θ + width of t]."""
        return torch.cat([self.theta(input_ids, positions), self.t(input_ids, positions)], -1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of both, beside each other: [rows, 2 · vocab_size]; None where another rank gathers them."""
        hidden = hidden_states.split([self.width_theta, hidden_states.shape[-1] - self.width_theta], -1)
        logits = self.theta.compute_logits(hidden[0].contiguous()), self.t.compute_logits(hidden[1].contiguous())
        if logits[0] is None or logits[1] is None:
            return None
        return torch.cat([of_model[:, : self.vocab_size] for of_model in logits], -1)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for of_t, its in groupby(weights, key=lambda weight: weight[0].startswith("t:")):  # π_θ's come first
            name = SIDES[of_t]
            parameters = getattr(self, name).load_weights((key.removeprefix("t:"), tensor) for key, tensor in its)
            loaded |= {f"{name}.{parameter}" for parameter in parameters}
        return loaded
