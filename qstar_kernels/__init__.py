"""Exact, fused sampling from q* ∝ π_θ^α · π_t^(1−α), for any decoding loop; needs torch, and triton on a GPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qstar_kernels.types import METHODS, QStarStep, Status

if TYPE_CHECKING:
    from qstar_kernels.api import qstar_logprobs, qstar_sample, qstar_stats

__all__ = ["METHODS", "QStarStep", "Status", "qstar_logprobs", "qstar_sample", "qstar_stats"]


def __getattr__(name: str) -> Any:
    # so that the settings, which a command line has its options from, are there without torch
    if name in __all__:
        return getattr(import_module("qstar_kernels.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
