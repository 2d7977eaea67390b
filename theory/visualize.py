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
RULES = {
    "kl_symmetry": ("KL symmetry (q*)", "*", Q, 340),
    "ess_balance": ("ESS balance", "D", "#CC79A7", 80),
    "reverse_kl_symmetry": ("reverse KL symmetry", "^", "#E69F00", 110),
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
        shown = ((theta, THETA, "-", "π_θ"), (t, T, "--", "π_t"), (direct.gaussian_q(theta, t, alpha), Q, "-", "q*"))
        means = np.stack([g.mean for g, *_ in shown])
        reach = 2.4 * max(np.sqrt(np.linalg.eigvalsh(g.cov).max()) for g, *_ in shown)
        low, high = means.min(0) - reach, means.max(0) + reach
        x = np.stack(np.meshgrid(*(np.linspace(low[i], high[i], 240) for i in (0, 1)), indexing="ij"), -1)
        for g, colour, style, label in shown:
            away = -2 * (g.log_density(x) - g.log_density(g.mean))
            width = 2.8 if label == "q*" else 1.8
            axes.contour(x[..., 0], x[..., 1], away, levels=[1, 4], colors=colour, linestyles=style, linewidths=width)
            axes.plot([], [], color=colour, linestyle=style, linewidth=width, label=label)
        axes.set(aspect="equal", xlabel="x, standard units", ylabel="y, standard units", title="contours at 1σ and 2σ")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)

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
        for i, (log_p, colour, label) in enumerate(((log_theta, THETA, "π_θ"), (log_q, Q, "q*"), (log_t, T, "π_t"))):
            axes.bar(np.arange(len(top)) + 0.27 * (i - 1), np.exp(log_p[top]), 0.25, color=colour, label=label)
        axes.set_xticks(range(len(top)), [repr(rows.tokens[i])[1:-1].replace(" ", "␣") for i in top], rotation=30)
        axes.set(xlabel="token", ylabel="probability", title="the eight likeliest tokens")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.26), ncols=3, frameon=False)

    return Subject(f"The demo pair after “{rows.contexts[most]}”", theta, t, at, draw)


def library(theta: np.ndarray, t: np.ndarray, **settings):
    """The library's step for one pair of rows [V]."""
    return qstar_stats(torch.from_numpy(theta)[None], torch.from_numpy(t)[None], impl="reference", **settings)


def draw_curve(axes: Axes, alphas: np.ndarray, f: np.ndarray, alpha: float, c: float) -> None:
    """F with its secant and the tangent at α*, which are parallel and c apart."""
    axes.plot(alphas, f, color="black", linewidth=2.4, label="F")
    axes.plot([0, 1], [f[0], f[-1]], color=GREY, linestyle="--", label="secant, slope s")
    axes.plot([0, 1], [-c, -c], color=Q, linestyle="-.", label="tangent at α*, slope s")
    axes.plot([alpha], [-c], marker="*", color=Q, markersize=17, linestyle="")
    depth = max(c, 0.05)
    if c > 1e-6:
        axes.annotate("", (alpha, 0), (alpha, -c), arrowprops={"arrowstyle": "<->", "color": GREY})
        axes.text(alpha + 0.02, -0.35 * c, f"c = {c:.3g} nats", color="black")
    axes.set(ylim=(-1.2 * depth, 0.25 * depth), title="log-partition curve of the normalised pair")
    axes.set(xlabel="α, weight of π_θ", ylabel="F(α), nats")


def draw_frontier(axes: Axes, subject: Subject, numbers: list[Numbers], marks: dict[str, Numbers]) -> None:
    """The family in the plane of both KLs, the mixtures for comparison, the rules."""
    x, y = ([getattr(n, name) for n in numbers] for name in ("kl_theta", "kl_t"))
    axes.plot(x, y, color="black", linewidth=2.4, label="q_α, the Pareto frontier")
    log_theta, log_t = log_softmax(subject.theta), log_softmax(subject.t)
    mixtures = [np.logaddexp(log_theta + np.log(w), log_t + np.log1p(-w)) for w in np.linspace(1e-6, 1 - 1e-6, 201)]
    axes.plot(
        [kl(m, log_theta) for m in mixtures], [kl(m, log_t) for m in mixtures],
        color=GREY, linestyle=":", linewidth=2, label="mixtures wπ_θ + (1−w)π_t",
    )  # fmt: skip
    top = 1.08 * max(*x, *y, 0.05)
    axes.plot([0, top], [0, top], color=GREY, linewidth=0.8, linestyle="--", label="equal KLs")
    for method, at in marks.items():
        _, marker, colour, size = RULES[method]
        axes.scatter(at.kl_theta, at.kl_t, size, colour, marker, edgecolors="black", zorder=3, clip_on=False)
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="KL(q‖π_θ), nats", ylabel="KL(q‖π_t), nats")
    axes.set(title="both divergences at once")


def draw_sides(axes: Axes, alphas: np.ndarray, theta: list[float], t: list[float], lines: list[tuple]) -> None:
    """A quantity of both models against α, with dotted verticals at (α, colour)."""
    axes.plot(alphas, theta, color=THETA, linewidth=2.4)
    axes.plot(alphas, t, color=T, linewidth=2.4, linestyle="--")
    for alpha, colour in lines:
        axes.axvline(alpha, color=colour, linestyle=":", linewidth=2.2)
    axes.set(xlim=(0, 1), xlabel="α, weight of π_θ")


def picture(subject: Subject, path: Path) -> None:
    """Draw one subject."""
    alphas = np.linspace(0, 1, 201)
    numbers = [subject.at(float(alpha)) for alpha in alphas]
    alpha_of = {method: library(subject.theta, subject.t, method=method).alpha.item() for method in RULES}
    marks = {method: subject.at(alpha) for method, alpha in alpha_of.items()}
    alpha, c = alpha_of["kl_symmetry"], marks["kl_symmetry"].kl_t
    lines = [(alpha_of[method], RULES[method][2]) for method in ("kl_symmetry", "ess_balance")]
    with plt.rc_context(PLOT):
        figure, ((pair, curve, frontier), (kls, ess, table)) = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
        figure.suptitle(subject.title, fontsize=18)
        subject.draw(pair, alpha)
        draw_curve(curve, alphas, np.array([n.f for n in numbers]), alpha, c)
        draw_frontier(frontier, subject, numbers, marks)
        draw_sides(kls, alphas, [n.kl_theta for n in numbers], [n.kl_t for n in numbers], lines)
        kls.set(ylabel="KL, nats", ylim=(0, None), title="KL(q_α‖π)")
        kls.set_ylim(0, max(0.05, kls.get_ylim()[1]))
        esses = [[n.ess_theta for n in numbers], [n.ess_t for n in numbers]]
        draw_sides(ess, alphas, *esses, lines)
        if 0 < np.maximum(*esses).min() < 0.02:
            ess.set(yscale="log", ylim=(max(1e-20, np.minimum(*esses).min()), 3))
        else:
            ess.set(ylim=(0, 1.05))
        ess.set(ylabel="ESS per draw", title="ESS = 1/Σ π²/q_α")
        draw_table(table, alpha_of, marks)
        for axes in (curve, frontier):
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=11)
        for axes in (kls, ess):
            axes.plot([], [], color=THETA, linewidth=2.4, label="to π_θ")
            axes.plot([], [], color=T, linewidth=2.4, linestyle="--", label="to π_t")
            axes.plot([], [], color=lines[0][1], linestyle=":", linewidth=2.2, label="KL symmetry")
            axes.plot([], [], color=lines[1][1], linestyle=":", linewidth=2.2, label="ESS balance")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False, fontsize=11)
        figure.savefig(path, dpi=90)
        plt.close(figure)


def draw_table(axes: Axes, alpha_of: dict[str, float], marks: dict[str, Numbers]) -> None:
    """The rules with their markers and numbers."""
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    head = ("", "α", "KL_θ", "KL_t", "ESS_θ", "ESS_t")
    columns = (0.07, 0.56, 0.68, 0.80, 0.92, 1.04)
    for i, method in enumerate([None, *alpha_of]):
        y = 0.9 - 0.13 * i
        if method is None:
            cells = head
        else:
            label, marker, colour, size = RULES[method]
            n = marks[method]
            axes.scatter(0.0, y, size, colour, marker, edgecolors="black", clip_on=False)
            values = (alpha_of[method], n.kl_theta, n.kl_t, n.ess_theta, n.ess_t)
            cells = (label, *(f"{x:.3f}" if x == 0 or x >= 5e-4 else f"{x:.0e}" for x in values))
        for x, cell in zip(columns, cells, strict=True):
            axes.text(x, y, cell, va="center", ha="left" if x == columns[0] else "right", fontsize=12, clip_on=False)


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
