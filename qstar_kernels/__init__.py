"""Exact, fused sampling from q* ∝ π_θ^α · π_t^(1−α), for any decoding loop; needs torch, and triton on a GPU."""

from qstar_kernels.api import qstar_logprobs, qstar_sample, qstar_stats
from qstar_kernels.types import METHODS, QStarStep, Status

__all__ = ["METHODS", "QStarStep", "Status", "qstar_logprobs", "qstar_sample", "qstar_stats"]
