"""`python -m theory.measure`: the measured tables of proof.md and computation.md, in Markdown.

`interpolation`: how far the α of the first sweep of rows.c is from the rule. `one_sweep`: which rows the kernels settle
after one sweep. `rules`: how far apart KL symmetry and ESS balance are. `far`: q* and what else one could draw from.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch

from qstar_kernels import qstar_logprobs, qstar_stats
from theory import direct
from theory.direct import kl, log_ess, log_softmax
from theory.families import demo_rows, sharp, zipf_pair
from theory.one_sweep import Sweep

ROWS = 64
PROMPTS = 32  # of the demo pair's problems
TILE, VECTOR = 256, 8  # how rows.c goes over a row in float32


def summed(x: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> float:
    """Σ x [V] with partial sums in the type of x, as the code takes them: x as blocks of `shape`, zeros appended,
    summed along `axes` in turn, the blocks' sums in float64."""
    size = int(np.prod(shape))
    blocks = np.zeros((-(-len(x) // size), *shape), dtype=x.dtype)
    blocks.reshape(-1)[: len(x)] = x
    for axis in axes:
        blocks = np.add.reduce(blocks, axis=axis)
    return float(blocks.sum(dtype=np.float64))


def quartic_guess(theta: np.ndarray, t: np.ndarray, dtype: type) -> float:
    """α of one row after the first sweep of rows.c, with exponentials and short sums in `dtype`.

    F′ − s as the quartic that matches F′ and F″ at the ends of [0, ½] or [½, 1] and ∫F′ between them.
    """
    a, b = ((x - x.max()).astype(dtype) for x in (theta, t))
    d = a - b
    root_one, root_zero = np.exp(a / 2), np.exp(b / 2)
    f, slope, curvature = [], [], []
    for w in (root_zero**2, root_zero * root_one, root_one**2):
        m0, m1, m2 = (summed(x, (TILE // VECTOR, VECTOR), (1, 1)) for x in (w, w * d, w * d * d))
        f.append(np.log(m0))
        slope.append(m1 / m0)
        curvature.append(m2 / m0 - (m1 / m0) ** 2)
    s = f[2] - f[0]
    c = int(slope[1] < s)
    g0, g1, k0, k1 = slope[c] - s, slope[c + 1] - s, curvature[c] / 2, curvature[c + 1] / 2
    e = 30 * (2 * (f[c + 1] - f[c]) - s - (g0 + g1) / 2 - (k0 - k1) / 12)
    quartic = np.polynomial.Polynomial([g0, k0, 3 * (g1 - g0) - 2 * k0 - k1 + e, 2 * (g0 - g1) + k0 + k1 - 2 * e, e])
    u = np.clip(g0 / (g0 - g1), 0, 1)
    for _ in range(3):
        rise = quartic.deriv()(u)
        u = np.clip(u - quartic(u) / rise, 0, 1) if rise > 0 else u
    return (c + u) / 2 if curvature[1] > 1e-5 else 0.5


def gap_at(theta: np.ndarray, t: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """|KL(q_α‖π_θ) − KL(q_α‖π_t)| [B] by the definition."""
    log_theta, log_t = log_softmax(theta), log_softmax(t)
    q = direct.log_q(log_theta, log_t, alpha)
    return np.abs(kl(q, log_theta) - kl(q, log_t))


def spread(x: np.ndarray) -> str:
    return f"{np.median(x):.0e} / {np.max(x):.0e}"


def interpolation() -> Iterator[tuple[str, ...]]:
    """Median / maximum of the residual before the second sweep of rows.c; Zipf-like rows of 50,000 float32 logits."""
    yield "noise", "float32", "float64"
    for noise in (0.5, 1.0, 2.0, 4.0, 8.0):
        theta, t = (x.astype(np.float32).astype(np.float64) for x in zipf_pair(ROWS, 50_000, noise, seed=11))
        cells = []
        for dtype in (np.float32, np.float64):
            alpha = np.array([quartic_guess(*row, dtype) for row in zip(theta, t, strict=True)])
            cells.append(spread(gap_at(theta, t, alpha)))
        yield f"{noise:g}", *cells


def one_sweep() -> Iterator[tuple[str, ...]]:
    """Rows that one sweep settles, and two; what α and the KLs' difference are off by then, and the bounds."""
    yield (
        "pair",
        "temperature",
        "median F″",
        "one sweep",
        "two",
        "α, greatest error",
        "difference of KLs, error",
        "its bound",
    )
    named = [(f"Zipf, noise {noise:g}", *zipf_pair(ROWS, 50_000, noise, 11)) for noise in (0.01, 0.1, 0.5, 1, 2, 4, 8)]
    rows = demo_rows(PROMPTS)
    named.append((f"demo pair, {len(rows.theta)} tokens", rows.theta, rows.t))
    for name, theta, t in named:
        for temperature in (1.0, 0.6):
            a, b = (x.astype(np.float32) / np.float32(temperature) for x in (theta, t))
            found = [settled(*row) for row in zip(a, b, strict=True)]
            step = qstar_stats(*(torch.from_numpy(x.astype(np.float64)) for x in (a, b)), impl="reference")
            fit = [i for i, (_, sweeps, _, _) in enumerate(found) if sweeps <= 2]
            steep = np.array([curvature for _, _, curvature, _ in found])
            off = np.array([abs(found[i][0] - step.alpha[i].item()) for i in fit if steep[i] > 1e-6])
            alpha = np.array([found[i][0] for i in fit])
            yield (
                name,
                f"{temperature:g}",
                f"{np.median(steep):.2g}",
                *(f"{np.mean([sweeps <= most for _, sweeps, _, _ in found]):.0%}" for most in (1, 2)),
                f"{off.max(initial=0):.0e}",
                f"{gap_at(a[fit].astype(np.float64), b[fit].astype(np.float64), alpha).max(initial=0):.0e}",
                f"{max((found[i][3] for i in fit), default=0.0):.0e}",
            )


def settled(theta: np.ndarray, t: np.ndarray) -> tuple[float, int, float, float]:
    """α of a float32 row, the sweeps it took (3: more than two), F″, and the bound of F′ by rounding and otherwise."""
    center = 0.5
    for sweeps in (1, 2):
        sweep = Sweep(theta, t, center, np.float32, sweeps == 2)
        center, fit = sweep.solve()
        if fit:
            return center, sweeps, sweep.at(center)[2], sweep.left_out(center)[1] + sweep.rounding(center)
    return center, 3, sweep.at(center)[2], np.inf


def pairs() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The pairs of the last two tables, from near to far: a name and logits [B, V]."""
    for noise in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0):
        yield f"Zipf, noise {noise:g}", *zipf_pair(ROWS, 5000, noise, seed=12)
    for height in (10.0, 20.0, 40.0):
        yield f"each sharp on its own token, {height:g} nats", *sharp(ROWS, 5000, height, seed=13)
    rows = demo_rows(PROMPTS)
    yield f"demo pair, {len(rows.theta)} tokens", rows.theta, rows.t


def rules() -> Iterator[tuple[str, ...]]:
    """KL symmetry and ESS balance: medians, with the greatest in brackets, or the range."""
    yield (
        "pair",
        "c, nats",
        "α_KL",
        "difference of both α",
        "its leading term",
        "ESS_θ/ESS_t at α_KL",
    )
    for name, theta, t in pairs():
        by_kl, by_ess = (
            qstar_stats(torch.from_numpy(theta), torch.from_numpy(t), method=method, impl="reference")
            for method in ("kl_symmetry", "ess_balance")
        )
        _, second, third = direct.cumulants_of_d(theta, t, 0.5)
        apart = (by_ess.alpha - by_kl.alpha).abs().numpy()
        leading = np.abs(third / second) / 12
        c, alpha, ratio = (x.numpy() for x in (by_kl.kl_theta, by_kl.alpha, by_kl.ess_theta / by_kl.ess_t))
        yield (
            name,
            f"{np.median(c):.3g} ({c.max():.3g})",
            f"{np.median(alpha):.2f}, {alpha.min():.2f} to {alpha.max():.2f}",
            *(f"{np.median(x):.2g} ({x.max():.2g})" for x in (apart, leading)),
            f"{np.median(ratio):.3g}, {ratio.min():.2g} to {ratio.max():.2g}",
        )


def far() -> Iterator[tuple[str, ...]]:
    """q*, the mixture (π_θ + π_t)/2 and the best ESS of any q (Claim 1.5): medians, with the worst row in brackets."""
    yield (
        "pair",
        "c: greater KL(q\\*‖π)",
        "of the mixture",
        "smaller ESS of q\\*",
        "of the mixture",
        "best possible",
        "q\\* on tokens both find unlikely",
        "π_θ, π_t there",
    )
    for name, theta, t in pairs():
        q = qstar_logprobs(torch.from_numpy(theta), torch.from_numpy(t), impl="reference")[0].numpy()
        log_theta, log_t = log_softmax(theta), log_softmax(t)
        mixture = np.logaddexp(log_theta, log_t) - np.log(2)
        unlikely = np.logical_and(*(x < x.max(1, keepdims=True) - np.log(100) for x in (log_theta, log_t)))
        best = [1 / direct.least_worst_second_moment(*row)[0] for row in zip(log_theta, log_t, strict=True)]
        columns = (
            np.maximum(kl(q, log_theta), kl(q, log_t)),
            np.maximum(kl(mixture, log_theta), kl(mixture, log_t)),
            np.exp(np.minimum(log_ess(log_theta, q), log_ess(log_t, q))),
            np.exp(np.minimum(log_ess(log_theta, mixture), log_ess(log_t, mixture))),
            np.array(best),
        )
        masses = [np.median(np.sum(np.exp(x) * unlikely, axis=1)) for x in (q, log_theta, log_t)]
        yield (
            name,
            *(f"{np.median(x):.2g} ({x.max():.2g})" for x in columns[:2]),
            *(f"{np.median(x):.2g} ({x.min():.2g})" for x in columns[2:]),
            f"{masses[0]:.0%}",
            f"{masses[1]:.0%}, {masses[2]:.0%}",
        )


TABLES: dict[str, Callable[[], Iterator[tuple[str, ...]]]] = {
    f.__name__: f for f in (interpolation, one_sweep, rules, far)
}


def main(argv: list[str] | None = None) -> int:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser(prog="python -m theory.measure", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tables", nargs="+", choices=tuple(TABLES), default=list(TABLES), help="default: all")
    for name in parser.parse_args(argv).tables:
        print(f"{TABLES[name].__doc__.splitlines()[0]}\n")
        for i, row in enumerate(TABLES[name]()):
            print(f"| {' | '.join(row)} |")
            if i == 0:
                print("|" + "---|" * len(row), flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
