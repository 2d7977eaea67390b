"""Time steps of state spaces that are kept within limits.

A Mamba-2 layer whose time step has a least value (Nemotron-H, Zamba2) keeps to it where transformers reads several
tokens at once, and not where it reads one, so that what it generates is not what its own forward pass says. Here every
pass keeps to it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor


class TimeSteps:
    """The layers of a model whose time steps have limits."""

    def __init__(self, model: torch.nn.Module):
        self.layers = []
        for layer in model.modules():
            low, high = getattr(layer, "time_step_limit", None) or (0.0, torch.inf)
            if (low > 0 or high < torch.inf) and hasattr(layer, "in_proj") and hasattr(layer, "dt_bias"):
                # the time step is softplus(x + dt_bias), x being the last outputs of the projection
                bounds = torch.tensor([low, high], dtype=torch.float64).expm1().log()
                self.layers.append((layer, bounds.tolist()))

    def limited(self) -> AbstractContextManager[None]:
        """Forward passes inside keep to the limits, whatever they read."""
        return self._hooked() if self.layers else nullcontext()

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        def hook_of(layer: torch.nn.Module, low: float, high: float):
            def hook(module: torch.nn.Module, args: tuple, out: Tensor) -> Tensor:
                bias = layer.dt_bias.to(out.dtype)
                x = out[..., -len(bias) :]
                return torch.cat([out[..., : -len(bias)], x.clamp(low - bias, high - bias)], -1)

            return hook

        with ExitStack() as stack:
            for layer, bounds in self.layers:
                stack.callback(layer.in_proj.register_forward_hook(hook_of(layer, *bounds)).remove)
            yield
