"""The sampler as one operator of torch, so that `torch.compile(fullgraph=True)` and `torch.export` pass through it.

A call through the dispatcher costs some 30 µs of host time, so `qstar_kernels.api` takes this way only while tracing.
"""

import dataclasses

import torch
from torch import Tensor

from qstar_kernels.types import QStarStep, Settings, output_dtype


@torch.library.custom_op("qstar_kernels::step", mutates_args=())
def step_op(
    theta: Tensor,
    t: Tensor,
    seeds: Tensor | None,
    positions: Tensor | None,
    tokens: Tensor | None,
    want_log_q: bool,
    impl: str,
    method: str,
    alpha: float,
    alpha_min: float,
    alpha_max: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    target_top_k: int,
    target_top_p: float,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers [8, B] (five of the row, three of the token), status [B], the drawn token [B], log q [B, V].

    What was not asked for has no elements.
    """
    from qstar_kernels.api import implementation

    settings = Settings(
        method, alpha, alpha_min, alpha_max, temperature, top_k, top_p, min_p, target_top_k, target_top_p, tol
    )
    step, log_q = implementation(impl, theta, t)(theta, t, settings, seeds, positions, tokens, want_log_q)
    dtype = output_dtype(theta, t)
    numbers = [step.alpha, step.kl_theta, step.kl_t, step.ess_theta, step.ess_t]
    if step.token is not None:
        numbers += [step.logq, step.logp_theta, step.logp_t]
    return (
        torch.stack(numbers).to(dtype),
        step.status,
        step.token if seeds is not None else step.status.new_empty(0),
        log_q.to(dtype) if want_log_q else theta.new_empty(0, dtype=dtype),
    )


@step_op.register_fake
def _(theta, t, seeds, positions, tokens, want_log_q, *settings):
    rows, dtype = theta.shape[0], output_dtype(theta, t)
    drawn = theta.new_empty(rows if seeds is not None else 0, dtype=torch.int64)
    count = 5 if seeds is None and tokens is None else 8
    return (
        theta.new_empty(count, rows, dtype=dtype),
        theta.new_empty(rows, dtype=torch.int64),
        drawn,
        theta.new_empty(theta.shape if want_log_q else 0, dtype=dtype),
    )


def traced_step(
    impl: str,
    theta: Tensor,
    t: Tensor,
    settings: Settings,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    want_log_q: bool = False,
) -> tuple[QStarStep, Tensor | None]:
    """`qstar_reference` by whatever `impl` names, through the operator."""
    values = [getattr(settings, field.name) for field in dataclasses.fields(settings)]
    numbers, status, drawn, log_q = step_op(theta, t, seeds, positions, tokens, want_log_q, impl, *values)
    step = QStarStep(*numbers[:5], status=status)
    if seeds is not None or tokens is not None:
        step.token = drawn if seeds is not None else tokens
        step.logq, step.logp_theta, step.logp_t = numbers[5:]
    return step, log_q if want_log_q else None
