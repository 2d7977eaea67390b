"""Figures of a run's numbers: how α, KL and the ESS ratio are spread and move along the text, and who has the weight.

Every function takes plain arrays, several files as a dict by name, and returns a matplotlib Figure of its own: no
pyplot, so nothing is shared or kept alive. The background is transparent, for a page that is light or dark. Numbers
that are not finite are left out, and the figure says how many. The quantities are those of theory/proof.md; KL is in
nats.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from qstar.weights import BANDS

Fields = Mapping[str, np.ndarray]
BINS = 60
LINE, NAME = 0.19, 58  # inches of a legend's line, and the letters that it has room for
POSITION_BINS = 80
KL_FLOOR = 1e-6  # nats: float32 logits say little below it
LABELS = {"alpha": "α, the weight of π_θ", "kl": "KL, the larger of the two (nats)", "ess_ratio": "ESS_θ / ESS_t"}
BAND_OF = {quantity: (low, high) for quantity, low, high in BANDS.values()}
COLORS = ("#3b76d6", "#d9730d", "#2f9e62", "#a34fc4", "#c23b4b", "#0f93a6")
DENSITY = {False: ("#c3d6fb", "#3b76d6", "#0c2450"), True: ("#2d4c86", "#7ba7f7", "#f4f8ff")}  # few to many, by dark
TICKS = {  # of an axis that reaches from 1/key to key
    1.8: (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5),
    2.2: (0.5, 0.6, 0.8, 1, 1.25, 1.6, 2),
    6: (0.25, 0.5, 1, 2, 4),
    40: (0.03, 0.1, 0.3, 1, 3, 10, 30),
    np.inf: (1e-4, 1e-3, 0.01, 0.1, 1, 10, 100, 1e3, 1e4),
}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
INK = {False: ("#1f2328", "#5b6472", "#d6dae0"), True: ("#e6e8eb", "#a5aeb9", "#3a414b")}  # text, ticks, lines by dark


def distribution(files: Mapping[str, Fields], quantity: str, dark: bool = False) -> Figure:
    """The distribution of a quantity over tokens: a step histogram for each file, and the band that is aimed at.

    Args:
        files: by name, the arrays of `LABELS`.
        quantity: a key of `LABELS`.
        dark: colours for a dark page.
    """
    figure, (ax,) = canvas(dark, lines=legend_lines(files))
    values = [fields[quantity] for fields in files.values()]
    drawn = [v[np.isfinite(v) & ((quantity != "ess_ratio") | (v > 0))] for v in values]
    low, high = 0.0, 1.0
    if quantity == "kl":
        low, high = KL_FLOOR, max([10 * KL_FLOOR, *(float(v.max()) for v in drawn if len(v))])
    elif quantity == "ess_ratio":
        low, high = ratio_range(drawn)
    edges = np.linspace(low, high, BINS + 1) if quantity == "alpha" else np.geomspace(low, high, BINS + 1)
    edges[[0, -1]] = low, high
    for color, v in zip(cycle(COLORS), drawn, strict=False):
        share = np.histogram(np.clip(v, low, high), edges)[0] / max(1, len(v))  # the ends hold what lies beyond
        ax.stairs(share, edges, color=color, linewidth=1.6)
        ax.stairs(share, edges, color=color, alpha=0.05 + 0.25 / len(drawn), fill=True)
    if quantity != "alpha":
        ax.set_xscale("log")
    if quantity == "ess_ratio":
        plain_ticks(ax.xaxis, low, high)
    if quantity in BAND_OF:
        ax.axvspan(*BAND_OF[quantity], color=INK[dark][1], alpha=0.1, linewidth=0)
    ax.set(xlabel=LABELS[quantity], ylabel="share of tokens", xlim=(low, high), ylim=(0, None))
    ax.yaxis.set_major_formatter(PERCENT)
    beyond = sum(int(((v < low) | (v > high)).sum()) for v in drawn)
    note_left_out(ax, sum(map(len, values)) - sum(map(len, drawn)), beyond, dark)
    legend(figure, files, dark)
    return figure


def alpha_against_ess_ratio(fields: Fields, dark: bool = False) -> Figure:
    """α against the ESS ratio over the tokens of one file, as a density on a logarithmic colour scale.

    Where the two KLs agree the ESS ratio need not be 1: the two rules for α are not equivalent.
    """
    figure, (ax,) = canvas(dark)
    alpha, ratio = fields["alpha"], fields["ess_ratio"]
    keep = np.isfinite(alpha) & np.isfinite(ratio) & (ratio > 0)
    low, high = ratio_range([ratio[keep]])
    if keep.any():
        colors = LinearSegmentedColormap.from_list("density", DENSITY[dark])
        hexagons = ax.hexbin(
            alpha[keep], np.clip(ratio[keep], low, high), gridsize=40, bins="log", mincnt=1, yscale="log",
            extent=(0, 1, np.log10(low), np.log10(high)), cmap=colors, linewidths=0.1,
        )  # fmt: skip
        bar = figure.colorbar(hexagons, ax=ax, pad=0.02)
        bar.set_label("tokens", color=INK[dark][0])
        bar.ax.tick_params(which="both", colors=INK[dark][1])
        bar.outline.set_edgecolor(INK[dark][2])
    ax.set(xlabel=LABELS["alpha"], ylabel=LABELS["ess_ratio"], xlim=(0, 1), ylim=(low, high), yscale="log")
    plain_ticks(ax.yaxis, low, high)
    ax.axhline(1, color=INK[dark][1], linewidth=0.8, linestyle=":")
    beyond = int(((ratio[keep] < low) | (ratio[keep] > high)).sum())
    note_left_out(ax, len(keep) - int(keep.sum()), beyond, dark)
    return figure


def along_position(files: Mapping[str, Fields], dark: bool = False) -> Figure:
    """Mean and middle half of α and KL by position in the answer, and how many samples reach that far.

    Args:
        files: by name, the arrays of `LABELS`, and `position` from 0, int [tokens].
        dark: colours for a dark page.
    """
    figure, (ax_alpha, ax_kl, ax_count) = canvas(dark, heights=(3, 3, 2), lines=legend_lines(files))
    end = 1 + max(int(fields["position"].max()) for fields in files.values())
    width = -(-end // POSITION_BINS)
    for color, fields in zip(cycle(COLORS), files.values(), strict=False):
        position = fields["position"].astype(np.int64)
        order = np.argsort(position, kind="stable")
        bins = position[order] // width
        cuts = np.flatnonzero(np.diff(bins)) + 1
        x = (bins[np.r_[0, cuts]] + 0.5) * width
        for ax, quantity in ((ax_alpha, "alpha"), (ax_kl, "kl")):
            parts = (v[np.isfinite(v)] for v in np.split(fields[quantity][order], cuts))
            band = [(*np.quantile(v, (0.25, 0.75)), v.mean()) if len(v) else (np.nan,) * 3 for v in parts]
            low, high, mean = np.array(band).T
            ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
            ax.plot(x, mean, color=color, linewidth=1.6)
        reached = np.bincount(position, minlength=end)
        ax_count.stairs(reached, np.arange(end + 1), color=color, linewidth=1.4)
    ax_alpha.set(ylabel="α", ylim=(0, 1))
    ax_kl.set(ylabel="KL (nats)", ylim=(0, None))
    ax_count.set(ylabel="samples", ylim=(0, None), xlabel="position in the answer (tokens)")
    for ax in (ax_alpha, ax_kl):
        ax.tick_params(labelbottom=False)
    for ax in (ax_alpha, ax_kl, ax_count):
        ax.set_xlim(0, end)
        ax.yaxis.set_major_locator(MaxNLocator(3))
    legend(figure, files, dark)
    return figure


def weight_concentration(files: Mapping[str, Fields], dark: bool = False) -> Figure:
    """The share of the total importance weight that the heaviest x% of the samples carry.

    Args:
        files: by name, `log_weights_theta` and `log_weights_t`: Σ log π − log q* of each sample, nats, [samples].
        dark: colours for a dark page.
    """
    styles = {"π_θ/q*": "-", "π_t/q*": "--", "all weights equal": ":"}
    figure, (ax,) = canvas(dark, lines=legend_lines(files) + 1)
    without = 0
    for color, fields in zip(cycle(COLORS), files.values(), strict=False):
        for side, dashes in (("theta", "-"), ("t", "--")):
            log_weights = np.asarray(fields[f"log_weights_{side}"], dtype=np.float64)
            has_one = log_weights < np.inf  # q* has no sample of the others
            without += int((~has_one).sum()) if side == "theta" else 0
            log_weights = log_weights[has_one]
            if not len(log_weights) or not np.isfinite(log_weights.max()):
                continue  # no sample has a weight above 0: nothing to share out
            carried = np.cumsum(np.sort(np.exp(log_weights - log_weights.max()))[::-1])
            share = np.arange(len(carried) + 1) / len(carried)
            ax.plot(share, np.r_[0, carried / carried[-1]], color=color, linestyle=dashes, linewidth=1.6)
    ax.plot([0, 1], [0, 1], color=INK[dark][1], linewidth=0.8, linestyle=":")
    ax.set(xlabel="heaviest samples", ylabel="share of the total weight", xlim=(0, 1), ylim=(0, 1.02))
    ax.xaxis.set_major_formatter(PERCENT)
    ax.yaxis.set_major_formatter(PERCENT)
    if without:
        note(ax, [f"{without} samples outside q*'s support have no weight"], dark)
    handles = [Line2D([], [], color=INK[dark][1], linestyle=dashes) for dashes in styles.values()]
    figure.add_artist(placed_legend(figure, handles, list(styles), dark, legend_lines(files), len(styles)))
    legend(figure, files, dark)
    return figure


def all_plots(files: Mapping[str, Fields]) -> Iterator[tuple[str, str, Callable[[bool], Figure]]]:
    """Every figure on some files, by name: what a file of it is called, its caption, and the function that draws it,
    light or dark.

    Args:
        files: what the functions above take; `position` too, and the log weights where samples have any.
    """
    for quantity, caption in (("alpha", "α"), ("kl", "the KL"), ("ess_ratio", "the ESS ratio")):
        draw = partial(distribution, files, quantity)
        yield f"distribution-{quantity.replace('_', '-')}", f"Distribution of {caption}", draw
    for number, (name, fields) in enumerate(files.items(), 1):
        stem, of = (f"-{number}", f", {name}") if len(files) > 1 else ("", "")
        yield f"alpha-ess-ratio{stem}", f"α against the ESS ratio{of}", partial(alpha_against_ess_ratio, fields)
    yield "along-position", "Along the answer: mean and middle half", partial(along_position, files)
    weighted = {name: fields for name, fields in files.items() if "log_weights_theta" in fields}
    if weighted:
        yield "weight-concentration", "Concentration of the importance weights", partial(weight_concentration, weighted)


def png(figure: Figure, dpi: int = 160, transparent: bool = True) -> bytes:
    """The figure as a PNG, its background transparent or white; the same bytes for the same numbers."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a file's name may be in any script
        figure.savefig(buffer, format="png", dpi=dpi, transparent=transparent, metadata={"Software": None})
    return buffer.getvalue()


def canvas(dark: bool, heights: Sequence[float] = (1,), lines: int = 0) -> tuple[Figure, list[Axes]]:
    """A figure with one column of axes, in the page's colours, all of one size, to stand side by side; above them there
    is room for two lines, and below for `lines` of a legend."""
    text, ticks, rules = INK[dark]
    height = 3.6 + LINE * lines
    figure = Figure(figsize=(4.6, height))
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0].tolist()
    bottom, top = (0.55 + LINE * lines) / height, 1 - 0.36 / height
    figure.subplots_adjust(left=0.15, right=0.955, bottom=bottom, top=top, hspace=0.2)
    figure.align_ylabels(axes)
    for ax in axes:
        ax.grid(color=rules, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(which="both", colors=ticks, labelsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(rules)
        for axis in (ax.xaxis, ax.yaxis):
            axis.label.set_color(text)
    return figure, axes


def ratio_range(values: Iterable[np.ndarray]) -> tuple[float, float]:
    """An interval about 1, symmetric on a logarithmic scale, that holds all but one in a thousand of the ratios."""
    far = [np.quantile(np.abs(np.log(v)), 0.999) for v in values if len(v)]
    reach = float(np.clip(max(far, default=0), np.log(1.5), np.log(1e4)))
    return float(np.exp(-reach)), float(np.exp(reach))


def plain_ticks(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis from 1/high to high as plain numbers, at most nine."""
    ticks = next(ticks for reach, ticks in TICKS.items() if high <= reach)
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def note(ax: Axes, lines: list[str], dark: bool) -> None:
    """Say something above the axes."""
    ax.set_title("\n".join(lines), fontsize=8, color=INK[dark][1], loc="left")


def note_left_out(ax: Axes, count: int, beyond: int, dark: bool) -> None:
    """Say how many tokens are not drawn, and how many are at the ends of an axis that does not reach them."""
    lines = [f"{count} tokens are not drawn: not a finite number"] if count else []
    lines += [f"{beyond} tokens beyond the axis are drawn at its ends"] if beyond else []
    if lines:
        note(ax, lines, dark)


def legend_lines(files: Mapping[str, Fields]) -> int:
    """How many lines `legend` takes."""
    return len(files) if len(files) > 1 else 0


def legend(figure: Figure, files: Mapping[str, Fields], dark: bool) -> None:
    """The files' names beside their colours, below the axes, where there is more than one."""
    if len(files) > 1:
        handles = [Line2D([], [], color=color) for color, _ in zip(cycle(COLORS), files, strict=False)]
        names = [name if len(name) <= NAME else f"…{name[1 - NAME :]}" for name in files]
        figure.add_artist(placed_legend(figure, handles, names, dark, 0, 1))


def placed_legend(
    figure: Figure, handles: list[Line2D], names: list[str], dark: bool, lines: int, columns: int
) -> Legend:
    """A legend that many lines above the figure's lower edge; names are text, not mathematics."""
    place = (0.02, LINE * lines / figure.get_figheight())
    box = Legend(
        figure, handles, names, loc="lower left", bbox_to_anchor=place, ncols=columns, labelcolor=INK[dark][0],
        frameon=False, fontsize=9, borderaxespad=0.1, borderpad=0.1, labelspacing=0.3, handlelength=1.6,
    )  # fmt: skip
    for text in box.get_texts():
        text.set_parse_math(False)
    return box
