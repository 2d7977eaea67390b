"""Tables and pictures of results, written from their JSON and nothing else.

`python -m qstar.experiments.report README.md results/` writes the tables of a text anew: those between
`<!-- table NAME -->` and `<!-- end -->`.
"""

import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from qstar.experiments.results import load

Results = dict[str, Any]
Spread = dict[str, float | None]

# Columns: what stands above a number, its name in the JSON, and how many decimals it is given
TRAINED = [
    ("held-out KL", "kl", 4),
    ("KL on its own text", "reverse_kl", 3),
    ("accuracy, drawn", "sampled_accuracy", 3),
    ("greedy", "greedy_accuracy", 3),
]
NOISE = [("gradient variance", "gradient_variance", 2)]
DRAWN = [
    ("α", "alpha", 3),
    ("KL(q‖π_θ)", "draw_kl_theta", 4),
    ("KL(q‖π_t)", "draw_kl_t", 4),
    ("ESS_θ", "ess_theta", 3),
    ("ESS_t", "ess_t", 3),
    ("effective tokens", "ess", 3),
]
COUNT = [("tokens", "tokens", 0)]
LIVE = [*TRAINED, *DRAWN[:3], ("tokens drawn", "tokens", 0), ("a second", "tokens_a_second", 0)]

# Tables: the experiment, which of its cells, the first column's title, the other columns
TABLES = {
    "main": ("main", "", "data, weights", [*TRAINED, ("tokens needed", "tokens_needed", 0), *NOISE]),
    "main data": ("main", "(?!.*clipped).*, none", "data, weights", COUNT + DRAWN),
    "ablation": ("ablation", "", "q* but", TRAINED + NOISE),
    "ablation data": (
        "ablation",
        "(?!weights)",
        "q* but",
        [
            *DRAWN,
            ("mean gap of the KLs", "gap_mean", 6),
            ("largest", "gap_max", 4),
            ("same answers", "same_answers", 3),
        ],
    ),
    "pairs": (
        "scaling",
        "pair",
        "pair",
        [
            ("parameters", "parameters", 0),
            ("held-out KL before", "pair_kl", 4),
            ("after π_t's text", "kl_off_policy", 4),
            ("after q*'s, clipped", "kl_qstar", 4),
            ("α", "alpha", 3),
            ("KL(q*‖π)", "draw_kl_theta", 4),
            ("ESS_θ", "ess_theta", 3),
            ("ESS_t", "ess_t", 3),
            ("tokens a second", "tokens_a_second", 0),
        ],
    ),
    "vocabulary": (
        "scaling",
        "vocabulary",
        "entries",
        [("q*, ms a row", "qstar_ms", 3), ("softmax and multinomial of one model, ms a row", "plain_ms", 3)],
    ),
    "speculation": (
        "speculation",
        "",
        "π_t, drafts",
        [
            ("KL(π_t‖π_θ)", "pair_kl", 3),
            ("KL(q*‖π)", "kl", 4),
            ("drafts that were right", "acceptance", 3),
            ("tokens a pass", "tokens_a_pass", 2),
            ("speed-up", "speedup", 2),
            ("same answers", "same_answers", 3),
        ],
    ),
    "distillation": ("distillation", "", "rollouts", LIVE),
    "grpo": (
        "grpo",
        "",
        "rollouts",
        [
            ("reward at the end", "reward", 3),
            ("KL(π_θ'‖π_θ)", "moved", 3),
            *TRAINED[1:],
            ("tokens that were clipped", "clipped", 4),
            ("gradient's norm", "gradient_norm", 2),
            ("tokens drawn", "tokens", 0),
        ],
    ),
}
# Tables with a column for each entry of a list: the experiment, which cells, what is counted, the rows of each cell
LISTS = {
    "budgets": ("scaling", "budget", "point", [("tokens", "curve", 0, 0), ("held-out KL", "curve", 1, 4)]),
    "distillation curves": (
        "distillation",
        "(?!.*rate|untrained)",
        "point",
        [("tokens drawn", "curve", 0, 0), ("KL on its own text", "curve", 2, 4), ("held-out KL", "curve", 1, 4)],
    ),
    "rounds": (
        "long_run",
        "",
        "round",
        [
            ("held-out KL", "kl", None, 4),
            ("greedy accuracy", "greedy_accuracy", None, 3),
            ("α", "alpha", None, 3),
            ("KL(q‖π_θ) of the draw", "draw_kl_theta", None, 4),
            ("KL(q‖π_t) of the draw", "draw_kl_t", None, 4),
            ("ESS_θ", "ess_theta", None, 3),
            ("ESS_t", "ess_t", None, 3),
        ],
    ),
}
# Differences to a cell, seed by seed: the experiment, which cells, that cell, columns with the entry of a list
PAIRED = {
    "distillation differences": (
        "distillation",
        "(?!π_θ|untrained)",
        "π_θ",
        [
            ("KL on its own text, point 2", "curve", (1, 2)),
            ("at the end", "reverse_kl", None),
            ("held-out KL at the end", "kl", None),
            ("accuracy, drawn", "sampled_accuracy", None),
        ],
    ),
    "grpo differences": (
        "grpo",
        "(?!π_θ|untrained)",
        "π_θ",
        [
            ("reward at the end", "reward", None),
            ("accuracy, drawn", "sampled_accuracy", None),
            ("KL(π_θ'‖π_θ)", "moved", None),
        ],
    ),
}
ALL = TABLES | LISTS | PAIRED


def shown(value: Spread | None, decimals: int, seeds: int) -> str:
    """Mean ± standard deviation over the seeds; – where there is none, and of how many seeds where not of all."""
    if value is None or value["mean"] is None:
        return "–"
    text = f"{value['mean']:.{decimals}f}"
    if value["std"]:
        text += f" ± {value['std']:.{decimals}f}"
    return text if value["n"] == seeds else f"{text} ({value['n']} of {seeds} seeds)"


def chosen(results: Results, pattern: str) -> Iterator[tuple[str, dict, int]]:
    """Cells whose name begins like this: name, summary, number of seeds."""
    for name, numbers in results["summary"].items():
        if re.match(pattern, name):
            yield name, numbers, len(results["cells"][name])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("q*", "q\\*") for line in lines)


def differences(name: str, results: Results) -> str:
    """One of `PAIRED` as Markdown: means and 95% intervals of Student's t, – of a single seed."""
    _, pattern, reference, columns = PAIRED[name]

    def values(cell: str, key: str, entry: tuple[int, int] | None) -> list[float]:
        numbers = [results["cells"][cell][seed][key] for seed in sorted(results["cells"][reference], key=int)]
        return numbers if entry is None else [x[min(entry[0], len(x) - 1)][entry[1]] for x in numbers]

    def difference(cell: str, key: str, entry: tuple[int, int] | None) -> str:
        pair = values(cell, key, entry), values(reference, key, entry)
        if len(pair[0]) < 2:
            return "–"
        mean, interval = statistics.fmean(np.subtract(*pair)), ttest_rel(*pair).confidence_interval(0.95)
        return f"{mean:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"

    cells = [cell for cell, _, _ in chosen(results, pattern)]
    rows = [[cell, *(difference(cell, key, entry) for _, key, entry in columns)] for cell in cells]
    return markdown([f"less that of {reference}", *(title for title, _, _ in columns)], rows)


def table(name: str, results: Results) -> str:
    """One of `TABLES`, `LISTS` or `PAIRED` as Markdown."""
    if name in PAIRED:
        return differences(name, results)
    if name in TABLES:
        _, pattern, first, columns = TABLES[name]
        rows = [
            [cell, *(shown(numbers.get(key), decimals, seeds) for _, key, decimals in columns)]
            for cell, numbers, seeds in chosen(results, pattern)
        ]
        return markdown([first, *(title for title, _, _ in columns)], rows)
    _, pattern, counted, measures = LISTS[name]
    rows = []
    for cell, numbers, seeds in chosen(results, pattern):
        for title, key, part, decimals in measures:
            entries = [entry if part is None else entry[part] for entry in numbers[key]]
            rows.append([cell.removeprefix("budget: "), title, *(shown(entry, decimals, seeds) for entry in entries)])
    return markdown(["data, weights", "", *(f"{counted} {i + 1}" for i in range(len(rows[0]) - 2))], rows)


def tables_of(experiment: str) -> list[str]:
    return [name for name, spec in ALL.items() if spec[0] == experiment]


def fill(text: str, folder: Path) -> str:
    """A text with its tables written anew from the results in a folder.

    Raises:
        ResultsError: results are missing.
        KeyError: there is no such table.
    """

    def again(match: re.Match) -> str:
        name = match[1]
        results = load(folder / f"{ALL[name][0]}.json")
        return f"<!-- table {name} -->\n{table(name, results)}\n<!-- end -->"

    return re.sub(r"<!-- table (.*?) -->\n.*?<!-- end -->", again, text, flags=re.DOTALL)


def write(experiment: str, results: Results, folder: Path) -> None:
    """Write `<experiment>.md` with the tables and `<experiment>.png` with the picture."""
    seeds = max(len(of_cell) for of_cell in results["cells"].values())
    seconds = sum(s for of_cell in results["seconds"].values() for s in of_cell.values())
    machine = results["machine"]
    text = [
        f"# {experiment.replace('_', ' ').capitalize()}",
        f"Mean ± standard deviation over {seeds} seed(s); KL in nats a token. {seconds / 60:.1f} minutes on "
        f"{machine['cpu']}, {machine['threads']} thread(s), torch {machine['versions']['torch']}, "
        f"trl {machine['versions']['trl']}.",
        *(table(name, results) for name in tables_of(experiment)),
        f"![{experiment}]({experiment}.png)",
    ]
    (folder / f"{experiment}.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    figure = PICTURES[experiment](results)
    figure.savefig(folder / f"{experiment}.png", dpi=100)


def column(results: Results, pattern: str, key: str) -> tuple[list[str], list[float], list[float]]:
    """Names, means and standard deviations of the cells that have this number."""
    found = [(name, numbers[key]) for name, numbers, _ in chosen(results, pattern) if key in numbers]
    found = [(name, value) for name, value in found if value["mean"] is not None]
    return [n for n, _ in found], [v["mean"] for _, v in found], [v["std"] or 0.0 for _, v in found]


def dots(axes: Axes, results: Results, key: str, label: str, reference: str | None = None) -> None:
    """A number of every cell with its spread, the best on top, and a line for the cell `reference`."""
    names, means, stds = column(results, "", key)
    order = sorted(range(len(names)), key=lambda i: -means[i] if "KL" in label else means[i])
    order = [i for i in order if names[i] != reference]
    axes.errorbar(
        [means[i] for i in order], range(len(order)), xerr=[stds[i] for i in order], fmt="o", color="C0", capsize=3
    )
    axes.set_yticks(range(len(order)), [names[i] for i in order])
    if reference in names:
        axes.axvline(means[names.index(reference)], color="0.5", linestyle="--")
        axes.set_title(f"dashed: {reference}", fontsize="medium")
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)


def curve(axes: Axes, x: list[float], points: list[Spread], label: str, **style) -> None:
    means, stds = [p["mean"] for p in points], [p["std"] or 0.0 for p in points]
    axes.errorbar(x, means, yerr=stds, marker="o", capsize=3, label=label, **style)


def legend_outside(figure: Figure, axes: Axes) -> None:
    """Below the pictures, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))


def main_picture(results: Results) -> Figure:
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    dots(left, results, "kl", "held-out KL(π_t‖π_θ') after training (nats a token)", "untrained")
    for name in ("off-policy, none", "q*, clipped", "q*, none", "arithmetic, clipped", "on-policy, clipped", "DPO"):
        points = results["summary"][name]["curve"]
        curve(right, [p[0]["mean"] for p in points], [p[1] for p in points], name)
    right.set_xlabel("drawn tokens seen")
    right.set_ylabel("held-out KL(π_t‖π_θ') (nats a token)")
    right.grid(alpha=0.3)
    legend_outside(figure, right)
    return figure


def ablation_picture(results: Results) -> Figure:
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    dots(left, results, "kl", "held-out KL(π_t‖π_θ') after training (nats a token)")
    dots(right, results, "greedy_accuracy", "share of right greedy answers")
    return figure


def scaling_picture(results: Results) -> Figure:
    figure = Figure(figsize=(15, 5), layout="constrained")
    sizes, budgets, cost = figure.subplots(1, 3)
    _, parameters, _ = column(results, "pair", "parameters")
    series = {"pair_kl": "before", "kl_off_policy": "after π_t's text", "kl_qstar": "after q*'s, clipped"}
    for beside, (key, label) in zip((0.95, 1.0, 1.05), series.items(), strict=True):
        _, means, stds = column(results, "pair", key)
        sizes.errorbar([beside * n for n in parameters], means, yerr=stds, marker="o", capsize=3, label=label)
    sizes.set(xscale="log", xlabel="parameters of each model", ylabel="held-out KL(π_t‖π_θ') (nats a token)")
    for name, numbers, _ in chosen(results, "budget"):
        points = numbers["curve"]
        curve(budgets, [p[0]["mean"] for p in points], [p[1] for p in points], name.removeprefix("budget: "))
    budgets.set(xscale="log", xlabel="drawn tokens seen", ylabel="held-out KL(π_t‖π_θ') (nats a token)")
    names, _, _ = column(results, "vocabulary", "qstar_ms")
    entries = [int(name.split()[-1]) for name in names]
    for key, label in (("qstar_ms", "q*"), ("plain_ms", "softmax and multinomial of one model")):
        _, means, stds = column(results, "vocabulary", key)
        cost.errorbar(entries, means, yerr=stds, marker="o", capsize=3, label=label)
    cost.set(xscale="log", yscale="log", xlabel="entries of the vocabulary", ylabel="draw (ms a row)")
    for axes in (sizes, budgets, cost):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def speculation_picture(results: Results) -> Figure:
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    titles = {"acceptance": "drafts that were right (share)", "speedup": "speed-up over plain decoding"}
    for row, (key, title) in zip(axes, titles.items(), strict=True):
        for i, times in enumerate(dict.fromkeys(name.split(",")[0] for name, _, _ in chosen(results, "π_t"))):
            names, means, stds = column(results, re.escape(times) + ",", key)
            drafts = [int(name.split()[-1]) for name in names]
            # the drafts that are right do not depend on the cost: the later points lie on the earlier, larger ones
            size = max(4, 10 - 5 * i)
            row[0].errorbar(
                drafts, means, yerr=stds, marker="o", markersize=size, capsize=size, label=f"{times} as costly"
            )
        _, kls, _ = column(results, "distance", "pair_kl")
        _, means, stds = column(results, "distance", key)
        row[1].errorbar(
            kls, means, yerr=stds, marker="o", capsize=3, color="C2", label="K = 4, π_t moved away from π_θ"
        )
        row[0].set(xlabel="drafts a round, K", ylabel=title)
        row[1].set(xlabel="KL(π_t‖π_θ) of the pair (nats a token)", ylabel=title, xscale="log")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def long_run_picture(results: Results) -> Figure:
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    measures = {
        "kl": "held-out KL(π_t‖π_θ') (nats a token)",
        "alpha": "mean α of the draw (q* only)",
        "draw_kl_theta": "KL(q‖π_θ) of the draw (nats a token)",
        "ess_t": "mean ESS_t of the draw (share)",
    }
    for ax, (key, title) in zip(axes.flat, measures.items(), strict=True):
        for i, (name, numbers, _) in enumerate(chosen(results, "")):
            if key == "alpha" and not name.startswith("q*"):
                continue  # 1 and 0 by definition
            curve(ax, list(range(1, len(numbers[key]) + 1)), numbers[key], name, color=f"C{i}")
        ax.set(xlabel="round", ylabel=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    legend_outside(figure, axes[0][0])
    return figure


def live_picture(results: Results) -> Figure:
    """Curves by drawn tokens, of every cell but those of other learning rates."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    measures = {
        2: "KL(π_θ'‖π_t) on its own text (nats a token)",
        1: "held-out KL(π_t‖π_θ') (nats a token)",
        3: "share of right answers, drawn",
    }
    axes, before = figure.subplots(1, 3), results["summary"]["untrained"]
    for ax, (entry, title) in zip(axes, measures.items(), strict=True):
        for name, numbers, _ in chosen(results, "(?!.*rate|untrained)"):
            points = [[{"mean": 0.0}, *(before[key] for key in ("kl", "reverse_kl", "sampled_accuracy"))]]
            points += numbers["curve"]
            curve(ax, [p[0]["mean"] for p in points], [p[entry] for p in points], name, alpha=0.8)
        ax.set(xlabel="drawn tokens", ylabel=title)
        ax.grid(alpha=0.3)
    legend_outside(figure, axes[0])
    return figure


PICTURES = {
    "main": main_picture,
    "ablation": ablation_picture,
    "scaling": scaling_picture,
    "speculation": speculation_picture,
    "long_run": long_run_picture,
    "distillation": live_picture,
    "grpo": live_picture,
}


if __name__ == "__main__":
    readme, folder = map(Path, sys.argv[1:])
    readme.write_text(fill(readme.read_text(encoding="utf-8"), folder), encoding="utf-8")
