"""The three public functions: sample from q*, its whole distribution, its diagnostics.

All take the logits of both models for the same positions and agree with each other to rounding. α is always the weight
of π_θ (`theta`); π_t (`t`) is the target or teacher.
"""

from torch import Tensor

from qstar_kernels import dispatch
from qstar_kernels.types import QStarStep


def qstar_sample(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    seeds: Tensor,
    positions: Tensor,
    vocab_size: int | None = None,
    impl: str = "auto",
    **settings,
) -> QStarStep:
    """Draw one token a row from q* ∝ π_θ^α π_t^(1−α), with its log-probabilities and the diagnostics of the row.

    The token is a pure function of the row's logits, `seeds[i]` and `positions[i]`: neighbours, batch size, device and
    `impl` do not enter (theory/computation.md, «The draw», says where truncation on a GPU may leave a rounding).

    Args:
        logits_theta, logits_t: [B, V] floating point, any strides. A token that a model forbids is marked by −inf or
            by the least finite number of the logits' own type: −65504 in float16, anything from −1e15 down in bfloat16,
            float32 and float64. Any other number is a logit, −1e4 too; from 1e15 up it is refused as +inf is.
        seeds: int64 [B], the seed of each sequence.
        positions: int64 [B], index of the token that is being drawn, the same token never twice for one seed.
        vocab_size: cut both rows to this length (models padded differently for one tokenizer).
        impl: `auto` (`triton` on a GPU, `cpu` on a CPU), or one of `triton`, `cpu` (compiled C) and `reference` (plain
            PyTorch in float64, which `auto` takes for float64 logits on a GPU, on other devices, and in place of `cpu`
            where no C compiler was found at installation).
        **settings: the fields of `qstar_kernels.types.Settings`, with its defaults:
            method: the rule for α, one of `METHODS`: `kl_symmetry` (KL(q*‖π_θ) = KL(q*‖π_t), the minimax point),
                `kl_budget` (KL(q*‖π_θ) = `kl_budget`, or π_t where it is nearer than that), `kl_budget_t` (the same
                around π_t), `fixed` with `alpha`, or another of the guide's table.
            alpha: of `fixed`, from −100 to 100. Outside [0, 1] it extrapolates, and there, too, a token that either
                model forbids has no probability (theory/proof.md, part 9).
            alpha_min, alpha_max: α is clamped to this range after the solve; 0 and 1 do not bind a given α.
            kl_budget: of the two budget rules, in nats; up to 1e-15 is α = 1 (of `kl_budget_t`, 0).
            temperature: divides both rows before they are mixed, 1e-6 to 1e6; 0 takes the most probable token that is
                left of q* at temperature 1.
            target_top_k, target_top_p: restrict q* to the tokens that π_t's top-k and top-p keep, after the α solve.
            top_k, top_p, min_p: truncate q* after that, in this order; the token that crosses `top_p` is kept, and so
                are ties of the last token kept.
            tol: in nats, what KL(q*‖π_θ) − KL(q*‖π_t) under `kl_symmetry`, or a KL less its budget, may be off 0.
            `alpha`, `alpha_min`, `alpha_max` and `kl_budget` may be one number a row: float32 or float64 [B] beside
            the logits. A row has the same bits then as in a call of its own with its numbers, and other numbers
            compile nothing anew. One that is NaN or outside its range refuses its row (`Status.BAD_SETTING`).

    Returns:
        `QStarStep` with every field set. A row that cannot be sampled from has `status` ≠ 0, token −1 and NaN numbers.
        So has a row (`Status.INEXACT`) whose numbers contradict one another to the end: α outside its range, a negative
        KL, a residual of the rule above its tolerance, log q above 0. The fast ways are looked at like this too, and
        the row is solved again in float64 where they fail.

    Raises:
        ValueError: shapes, vocabularies or settings that do not fit; the message says what would.
        TypeError: there is no setting of that name.
    """
    index = {"seeds": seeds, "positions": positions}
    settings, per_row = dispatch.parted(settings)
    return dispatch.step(impl, logits_theta, logits_t, settings, vocab_size, per_row=per_row, **index)[0]


def qstar_logprobs(
    logits_theta: Tensor, logits_t: Tensor, *, vocab_size: int | None = None, impl: str = "auto", **settings
) -> tuple[Tensor, QStarStep]:
    """The whole distribution log q* after temperature and truncation, for other people's loops.

    Args:
        logits_theta, logits_t, vocab_size, impl: as in `qstar_sample`.
        **settings: as in `qstar_sample`.

    Returns:
        log q [B, V] in nats, normalised, −inf where cut, NaN where `status` ≠ 0; and `QStarStep` without a token.

    Raises:
        ValueError: as `qstar_sample`.
    """
    settings, per_row = dispatch.parted(settings)
    stats, log_q = dispatch.step(impl, logits_theta, logits_t, settings, vocab_size, True, per_row)
    return log_q, stats


def qstar_stats(
    logits_theta: Tensor,
    logits_t: Tensor,
    *,
    tokens: Tensor | None = None,
    vocab_size: int | None = None,
    impl: str = "auto",
    **settings,
) -> QStarStep:
    """α and the diagnostics without sampling; with `tokens`, also the three log-probabilities of the given tokens.

    Args:
        logits_theta, logits_t, vocab_size, impl: as in `qstar_sample`.
        tokens: int64 [B]; a token outside [0, V), such as padding of −1, gets NaN log-probabilities.
        **settings: as in `qstar_sample`.

    Returns:
        `QStarStep`; its `token` is `tokens`.

    Raises:
        ValueError: as `qstar_sample`.
    """
    index = {} if tokens is None else {"tokens": tokens}
    settings, per_row = dispatch.parted(settings)
    return dispatch.step(impl, logits_theta, logits_t, settings, vocab_size, per_row=per_row, **index)[0]
