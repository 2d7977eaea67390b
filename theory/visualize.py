"""`python -m theory.visualize`: what theory/proof.md says, as pictures: pairs of Gaussians and a row of the demo pair.

Every picture shows the pair and its q*, the curve F with secant and tangent, the Pareto frontier, and both KLs and both
ESS against α. The rules' α are the library's, on the rows that the pair makes; the Gaussians' curves are closed forms.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from qstar_kernels import qstar_stats
from theory import direct
from theory.direct import kl, log_softmax
from theory.families import GAUSSIANS, demo_rows, gaussians

PICTURES = Path(__file__).with_name("pictures")
PROMPTS = 8  # of the demo pair's problems; the row shown is the one on which the two differ most

# Okabe and Ito's colours, which all kinds of colour vision tell apart
THETA, T, Q, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
PI_THETA, PI_T, Q_ALPHA = r"$\pi_\theta$", r"$\pi_t$", r"$q_\alpha$"
RULES = {
    "kl_symmetry": ("KL symmetry, q*", "*", Q, 340),
    "ess_balance": ("ESS balance", "D", "#CC79A7", 80),
    "reverse_kl_symmetry": ("reverse KL", "^", "#E69F00", 110),
    "entropy": ("entropy rule", "s", "#56B4E9", 80),
    "fixed": ("α = ½", "o", "black", 60),
}
PLOT = {"font.size": 13, "axes.titlesize": 14, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Numbers:
    """What belongs to one α: F of the normalised pair, the divergences in nats, the ESS."""

    f: float
    kl_theta: float
    kl_t: float
    ess_theta: float
    ess_t: float


@dataclass(frozen=True)
class Subject:
    """A pair: its name, its rows [V] of logits, its numbers at any α in [0, 1], and how to draw the three of it."""

    title: str
    theta: np.ndarray
    t: np.ndarray
    at: Callable[[float], Numbers]
    draw: Callable[[Axes, float], None]


def of_gaussians(name: str) -> Subject:
    """One pair of GAUSSIANS; its rows are its log densities on the grid."""
    theta, t = GAUSSIANS[name]
    row = list(GAUSSIANS).index(name)

    def at(alpha: float) -> Numbers:
        q = direct.gaussian_q(theta, t, alpha)
        ess = np.exp(direct.gaussian_log_ess(theta, t, alpha))
        return Numbers(direct.gaussian_log_integral(theta, t, alpha), q.kl(theta), q.kl(t), *ess)

    def draw(axes: Axes, alpha: float) -> None:
        q = direct.gaussian_q(theta, t, alpha)
        shown = ((q, Q, "-", "q*", 4.0), (theta, THETA, "-", PI_THETA, 1.8), (t, T, "--", PI_T, 1.8))
        means = np.stack([g.mean for g, *_ in shown])
        reach = 2.4 * max(np.sqrt(np.linalg.eigvalsh(g.cov).max()) for g, *_ in shown)
        low, high = means.min(0) - reach, means.max(0) + reach
        x = np.stack(np.meshgrid(*(np.linspace(low[i], high[i], 240) for i in (0, 1)), indexing="ij"), -1)
        for g, colour, style, label, width in shown:
            away = -2 * (g.log_density(x) - g.log_density(g.mean))
            axes.contour(x[..., 0], x[..., 1], away, levels=[1, 4], colors=colour, linestyles=style, linewidths=width)
            axes.plot([], [], color=colour, linestyle=style, linewidth=width, label=label)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xlabel="x, units of σ = 1", ylabel="y, units of σ = 1", title="Contours at 1σ and 2σ")

    return Subject(f"Two Gaussians, {name}", gaussians().theta[row], gaussians().t[row], at, draw)


def of_demo_row() -> Subject:
    """The row of the demo pair with the greatest common KL."""
    rows = demo_rows(PROMPTS)
    most = int(qstar_stats(torch.from_numpy(rows.theta), torch.from_numpy(rows.t), impl="reference").kl_t.argmax())
    theta, t = rows.theta[most], rows.t[most]
    log_theta, log_t = log_softmax(theta), log_softmax(t)

    def at(alpha: float) -> Numbers:
        step = library(theta, t, method="fixed", alpha=alpha)
        f = np.logaddexp.reduce(alpha * log_theta + (1 - alpha) * log_t)
        return Numbers(float(f), *(getattr(step, x).item() for x in ("kl_theta", "kl_t", "ess_theta", "ess_t")))

    def draw(axes: Axes, alpha: float) -> None:
        log_q = log_softmax(alpha * log_theta + (1 - alpha) * log_t)
        top = np.argsort(-np.maximum(log_theta, log_t))[:8]
        shown = ((log_theta, THETA, PI_THETA), (log_q, Q, "q*"), (log_t, T, PI_T))
        for i, (log_p, colour, label) in enumerate(shown):
            axes.bar(np.arange(len(top)) + 0.27 * (i - 1), np.exp(log_p[top]), 0.25, color=colour, label=label)
        names = [repr(rows.tokens[i].strip())[1:-1] for i in top]
        axes.set_xticks(range(len(top)), names, rotation=30, fontsize=11)
        axes.set(xlabel="token", ylabel="probability", title="The eight likeliest tokens")

    return Subject(f"The demo pair after “{rows.contexts[most]}”", theta, t, at, draw)


def library(theta: np.ndarray, t: np.ndarray, **settings):
    """The library's step for one pair of rows [V]."""
    return qstar_stats(torch.from_numpy(theta)[None], torch.from_numpy(t)[None], impl="reference", **settings)


def draw_curve(axes: Axes, alphas: np.ndarray, f: np.ndarray, alpha: float, c: float) -> None:
    """F with its secant and the tangent at α*, which are parallel and c apart."""
    axes.plot(alphas, f, color="black", linewidth=2.4, label="F")
    axes.plot([0, 1], [f[0], f[-1]], color=GREY, linestyle="--", label="secant")
    axes.plot([0, 1], [-c, -c], color=Q, linestyle="-.", label="tangent at α*")
    axes.plot([alpha], [-c], marker="*", color=Q, markersize=17, linestyle="")
    depth = max(c, 0.05)
    if c > 1e-6:
        axes.annotate("", (alpha, 0), (alpha, -c), arrowprops={"arrowstyle": "<->", "color": GREY})
    axes.set(ylim=(-1.2 * depth, 0.25 * depth), title=f"F of the normalised pair: c = {abs(c):.3g} nats")
    axes.set(xlabel=f"α, weight of {PI_THETA}", ylabel="F(α), nats")


def draw_frontier(axes: Axes, subject: Subject, numbers: list[Numbers], marks: dict[str, Numbers]) -> None:
    """The family in the plane of both KLs, the mixtures for comparison, the rules."""
    x, y = ([getattr(n, name) for n in numbers] for name in ("kl_theta", "kl_t"))
    axes.plot(x, y, color="black", linewidth=2.4, label=f"{Q_ALPHA}, the frontier")
    log_theta, log_t = log_softmax(subject.theta), log_softmax(subject.t)
    mixtures = [np.logaddexp(log_theta + np.log(w), log_t + np.log1p(-w)) for w in np.linspace(1e-6, 1 - 1e-6, 201)]
    of_mixtures = [[kl(m, log_p) for m in mixtures] for log_p in (log_theta, log_t)]
    axes.plot(*of_mixtures, color=GREY, linestyle=":", linewidth=2, label="mixtures")
    right, top = (1.06 * max(*side, 0.05) for side in (x, y))
    axes.plot([0, min(right, top)], [0, min(right, top)], color=GREY, linewidth=0.8, linestyle="--", label="equal KLs")
    for method, at in reversed(marks.items()):  # q* on top
        _, marker, colour, size = RULES[method]
        axes.scatter(at.kl_theta, at.kl_t, size, colour, marker=marker, edgecolors="black", zorder=3, clip_on=False)
    axes.set(xlim=(-0.04 * right, right), ylim=(-0.04 * top, top), title="Both divergences")
    axes.set(xlabel=f"KL(q‖{PI_THETA}), nats", ylabel=f"KL(q‖{PI_T}), nats")


def draw_sides(axes: Axes, alphas: np.ndarray, theta: list[float], t: list[float], alpha_of: dict[str, float]) -> None:
    """A quantity of both models against α, and where KL symmetry and ESS balance are."""
    axes.plot(alphas, theta, color=THETA, linewidth=2.4, label=f"of {PI_THETA}")
    axes.plot(alphas, t, color=T, linewidth=2.4, linestyle="--", label=f"of {PI_T}")
    for method, style in (("kl_symmetry", ":"), ("ess_balance", "-.")):
        label, _, colour, _ = RULES[method]
        axes.axvline(alpha_of[method], color=colour, linestyle=style, linewidth=2, label=label.split(",")[0])
    axes.set(xlim=(0, 1), xlabel=f"α, weight of {PI_THETA}")


def draw_table(axes: Axes, alpha_of: dict[str, float], marks: dict[str, Numbers]) -> None:
    """The rules with their markers and numbers."""
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    right = (0.53, 0.66, 0.79, 0.93, 1.07)
    for x, head in zip(right, ("α", r"KL$_\theta$", r"KL$_t$", r"ESS$_\theta$", r"ESS$_t$"), strict=True):
        axes.text(x, 0.9, head, va="center", ha="right", fontsize=12)
    for i, (method, alpha) in enumerate(alpha_of.items()):
        y, n = 0.77 - 0.13 * i, marks[method]
        label, marker, colour, size = RULES[method]
        axes.scatter(-0.07, y, size, colour, marker=marker, edgecolors="black", clip_on=False)
        axes.text(-0.03, y, label, va="center", fontsize=12)
        for x, value in zip(right, (alpha, n.kl_theta, n.kl_t, n.ess_theta, n.ess_t), strict=True):
            cell = "0" if abs(value) < 1e-12 else f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"
            axes.text(x, y, cell, va="center", ha="right", fontsize=12)


def picture(subject: Subject, path: Path) -> None:
    """Draw one subject."""
    alphas = np.linspace(0, 1, 201)
    numbers = [subject.at(float(alpha)) for alpha in alphas]
    alpha_of = {method: library(subject.theta, subject.t, method=method).alpha.item() for method in RULES}
    marks = {method: subject.at(alpha) for method, alpha in alpha_of.items()}
    with plt.rc_context(PLOT):
        figure, ((pair, curve, frontier), (kls, ess, table)) = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        figure.suptitle(subject.title, fontsize=18)
        subject.draw(pair, alpha_of["kl_symmetry"])
        draw_curve(curve, alphas, np.array([n.f for n in numbers]), alpha_of["kl_symmetry"], marks["kl_symmetry"].kl_t)
        draw_frontier(frontier, subject, numbers, marks)
        draw_sides(kls, alphas, [n.kl_theta for n in numbers], [n.kl_t for n in numbers], alpha_of)
        kls.set(ylim=(0, max(0.05, kls.get_ylim()[1])), ylabel="KL, nats", title=f"KL({Q_ALPHA}‖π)")
        of_theta, of_t = [n.ess_theta for n in numbers], [n.ess_t for n in numbers]
        draw_sides(ess, alphas, of_theta, of_t, alpha_of)
        if 0 < np.minimum(of_theta, of_t).max() < 0.02:
            ess.set(yscale="log", ylim=(1e-3 * np.minimum(of_theta, of_t).max(), 3))
        else:
            ess.set(ylim=(0, 1.05))
        ess.set(ylabel="ESS per draw", title=rf"ESS = $1/\Sigma\,\pi^2/$ {Q_ALPHA}")
        draw_table(table, alpha_of, marks)
        for axes in (pair, curve, frontier, kls, ess):
            columns = 2 if axes in (kls, ess) else 3
            below = -0.3 if axes is pair and axes.patches else -0.17
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=columns, frameon=False, fontsize=12)
        figure.savefig(path, dpi=84, pil_kwargs={"optimize": True})
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(prog="python -m theory.visualize", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=PICTURES, help="folder for the pictures (default: %(default)s)")
    folder = parser.parse_args(argv).output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in GAUSSIANS:
            picture(of_gaussians(name), folder / f"gaussians-{name.replace(' ', '-')}.png")
        picture(of_demo_row(), folder / "demo-row.png")
    except OSError as error:
        print(f"python -m theory.visualize: error: {error}", file=sys.stderr)
        return 1
    for path in sorted(folder.glob("*.png")):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
