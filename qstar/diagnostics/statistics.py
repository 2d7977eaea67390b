"""What the numbers of a data set say: statistics of every field, verdicts, weights and warnings.

A file is read once, and memory does not grow with its tokens: of every field there are running moments and a histogram
over float32, and of a random part of the samples, or of all where they are few, the tokens themselves.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from qstar.run.records import RunFiles
from qstar.weights import BANDS, FAR_APART_KL, WEIGHT, derived, effective_sample_size, top_share
from qstar_kernels.types import BUDGETS, FIELDS

STATISTICS = ("mean", "std", "min", "q25", "median", "q75", "max")
QUARTILES = {"q25": 0.25, "median": 0.5, "q75": 0.75}
LITTLE_ESS = 0.1  # mean ESS of a token below which almost all of a model's mass is where q* has none
HEAVY_SHARE, HEAVY_WEIGHT = 0.01, 0.5  # a data set is lopsided where this share of the samples has this share of weight
AT_CLAMP = 0.01  # share of the tokens with α at its bound that is worth a word
OUTLIERS = 0.01  # the share of the tokens, the farthest on both sides, without which a verdict's mean is told too
CHUNK_TOKENS = 1 << 17  # tokens that are counted at once
KEPT_TOKENS, KEPT_SAMPLES = 1 << 20, 1 << 16  # of a file that stay in memory
BITS = 18  # of a float32, from its sign on, that tell the cells of a histogram apart
CELL = 2.0 ** (9 - BITS)  # the relative width of a cell, and so the largest error of a quantile


@dataclass
class Spread:
    """Moments, extremes and histogram of the finite values of one field, chunk by chunk."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # Σ(x − mean)²
    low: float = np.inf
    high: float = -np.inf
    cells: np.ndarray = field(default_factory=lambda: np.zeros(1 << BITS, dtype=np.int64))

    def add(self, values: np.ndarray) -> None:
        """Take float32 values [N] (Chan, Golub and LeVeque's update of the moments)."""
        values = values[np.isfinite(values)]
        if not len(values):
            return
        wide, count = values.astype(np.float64), self.count + len(values)
        mean = float(wide.mean())
        apart = mean - self.mean
        self.squares += float(((wide - mean) ** 2).sum()) + apart**2 * self.count * len(wide) / count
        self.mean += apart * len(wide) / count
        self.count, self.low, self.high = count, min(self.low, float(wide.min())), max(self.high, float(wide.max()))
        # with the sign turned, and all bits of negative ones, the bits of floats are in the order of their values
        bits = (values + np.float32(0)).view(np.uint32)
        cell = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> np.uint32(32 - BITS)
        self.cells += np.bincount(cell, minlength=1 << BITS)

    def edges(self) -> np.ndarray:
        """The lower edge of every cell, and the upper edge of the last."""
        ordered = (np.arange((1 << BITS) + 1, dtype=np.uint64) << np.uint64(32 - BITS)).clip(0, 2**32 - 1)
        ordered = ordered.astype(np.uint32)
        bits = np.where(ordered >> 31, ordered ^ np.uint32(1 << 31), ~ordered)
        with np.errstate(invalid="ignore"):  # beyond the infinite ones there are NaN
            return np.nan_to_num(bits.view(np.float32).astype(np.float64))

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """As `numpy.quantile`, between two values that are known to within `CELL` of their size."""
        ends, edges = self.cells.cumsum(), self.edges()

        def value(rank: int) -> float:
            i = int(np.searchsorted(ends, rank, side="right"))
            inside = (rank - (ends[i] - self.cells[i]) + 0.5) / self.cells[i]
            return float(np.clip(edges[i] + inside * (edges[i + 1] - edges[i]), self.low, self.high))

        ranks = [share * (self.count - 1) for share in shares]
        pairs = [(value(int(rank)), value(min(int(rank) + 1, self.count - 1))) for rank in ranks]
        return [low + (rank % 1) * (high - low) for rank, (low, high) in zip(ranks, pairs, strict=True)]


@dataclass
class Kept:
    """A random part of a file's samples, each as likely as any other, or all where they are few."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    heap: list[tuple[float, int, dict[str, np.ndarray]]] = field(default_factory=list)  # the highest lot first
    tokens: int = 0

    def add(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        """Take a sample's arrays, and drop those with the highest lots while there are too many."""
        heappush(self.heap, (-self.rng.random(), number, arrays))
        self.tokens += len(arrays["alpha"])
        while len(self.heap) > 1 and (self.tokens > KEPT_TOKENS or len(self.heap) > KEPT_SAMPLES):
            self.tokens -= len(heappop(self.heap)[2]["alpha"])


@dataclass
class Numbers:
    """The numbers of one file.

    `spreads` are of all tokens, by field and by what is `derived`; `inside` counts the tokens in each of `BANDS`,
    `at_bound` those with α at the option's bound. `tokens` has float32 arrays with one entry a token of `kept` of the
    samples: the fields, what is derived, and `position` in the sample. `samples` has float64 arrays with one entry a
    sample, of all: `num_tokens` and both log weights of the whole.
    """

    name: str
    settings: dict[str, Any]
    drawn: bool
    notes: list[str] = field(default_factory=list)
    spreads: dict[str, Spread] = field(default_factory=lambda: defaultdict(Spread))
    inside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BANDS, 0))
    at_bound: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("--alpha-min", "--alpha-max"), 0))
    count: int = 0
    kept: int = 0
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    samples: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether all samples were kept, and so quantiles are exact and plots of all."""
        return self.kept == len(self.samples["num_tokens"])

    def bound(self, option: str) -> float:
        """The bound of α that an option sets."""
        return self.settings.get(option, 0.0 if option == "--alpha-min" else 1.0)

    def add(self, tokens: dict[str, np.ndarray]) -> None:
        """Count a chunk of tokens with all that is derived."""
        self.count += len(tokens["alpha"])
        for name, values in tokens.items():
            self.spreads[name].add(values)
        for name, (quantity, low, high) in BANDS.items():
            values = tokens[quantity]
            self.inside[name] += int(((values >= np.float32(low)) & (values <= np.float32(high))).sum())
        for option in self.at_bound:
            self.at_bound[option] += int((np.abs(tokens["alpha"] - np.float32(self.bound(option))) < 1e-6).sum())

    def exact_values(self, name: str) -> np.ndarray:
        """The finite values of a field in the tokens that were kept, float64."""
        values = self.tokens[name]
        return values[np.isfinite(values)].astype(np.float64)

    def statistics(self, name: str) -> dict[str, float | None]:
        """`STATISTICS` of a field over all tokens with a finite value; None where there is none."""
        if self.exact:
            return statistics(self.exact_values(name))
        spread = self.spreads[name]
        if not spread.count:
            return dict.fromkeys(STATISTICS)
        quartiles = dict(zip(QUARTILES, spread.quantiles(list(QUARTILES.values())), strict=True))
        std = float(np.sqrt(spread.squares / spread.count))
        found = {"mean": spread.mean, "std": std, "min": spread.low, "max": spread.high} | quartiles
        return {statistic: found[statistic] for statistic in STATISTICS}

    def middle_mean(self, name: str) -> float | None:
        """The mean of a field without the `OUTLIERS`, half of them on either side."""
        if self.exact:
            values = np.sort(self.exact_values(name))
            counts = np.ones(len(values))
        else:
            spread = self.spreads[name]
            edges, there = spread.edges(), np.flatnonzero(spread.cells)
            values, counts = (edges[there] + edges[there + 1]) / 2, spread.cells[there].astype(np.float64)
        ends = counts.cumsum()
        if not len(ends):
            return None
        low, high = ends[-1] * OUTLIERS / 2, ends[-1] * (1 - OUTLIERS / 2)
        left = (np.minimum(ends, high) - np.maximum(ends - counts, low)).clip(0)
        return float((values * left).sum() / left.sum())


def read_numbers(files: RunFiles, name: str, tell: Callable[[int], Any] = lambda read: None) -> Numbers:
    """Read one run, `tell`ing how many bytes of it were read.

    Raises:
        RecordError: it is empty, torn in the middle or foreign.
    """
    numbers, kept = Numbers(name, files.settings, files.drawn), Kept()
    lengths, weights = array("q"), {side: array("d") for side in WEIGHT}
    waiting: list[dict[str, np.ndarray]] = []

    def flush() -> None:
        counts = np.array([len(arrays["alpha"]) for arrays in waiting])
        tokens = {name: np.concatenate([arrays[name] for arrays in waiting]) for name in FIELDS}
        tokens |= derived(tokens)
        numbers.add(tokens)
        starts = counts.cumsum() - counts
        for side in WEIGHT:
            sums = np.add.reduceat(tokens[f"log_weight_{side}"].astype(np.float64), starts)
            weights[side].frombytes(sums.tobytes())
        lengths.extend(counts.tolist())
        waiting.clear()
        tell(files.read)

    tokens = 0
    for number, record in enumerate(files):
        waiting.append(record.arrays)
        kept.add(number, record.arrays)
        tokens += len(record.arrays["alpha"])
        if tokens >= CHUNK_TOKENS:
            flush()
            tokens = 0
    if waiting:
        flush()
    numbers.notes += files.notes
    arrays = [arrays for _, _, arrays in sorted(kept.heap, key=lambda entry: entry[1])]
    numbers.kept = len(arrays)
    numbers.tokens = {name: np.concatenate([of_sample[name] for of_sample in arrays]) for name in FIELDS}
    numbers.tokens |= derived(numbers.tokens)
    positions = [np.arange(len(of_sample["alpha"]), dtype=np.float32) for of_sample in arrays]
    numbers.tokens["position"] = np.concatenate(positions)
    numbers.samples = {"num_tokens": np.frombuffer(lengths, dtype=np.int64).astype(np.float64)}
    numbers.samples |= {f"log_weight_{side}": np.frombuffer(weights[side], dtype=np.float64) for side in WEIGHT}
    return numbers


def read_all(runs: list[RunFiles], names: list[str], console: Console) -> list[Numbers]:
    """The numbers of several runs, with a bar on a terminal."""
    with reading(console, sum(run.size for run in runs), "reading") as bar:
        task, before, found = bar.task_ids[0], 0, []
        for run, name in zip(runs, names, strict=True):
            found.append(read_numbers(run, name, lambda read, before=before: bar.update(task, completed=before + read)))
            before += run.size
        return found


def reading(console: Console, size: int, what: str) -> Progress:
    """A bar over so many bytes, on a terminal; it goes when it is done."""
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar.add_task("", total=size)
    return bar


def statistics(values: np.ndarray) -> dict[str, float | None]:
    """Mean, deviation, extremes and quartiles of what is finite; None where nothing is."""
    values = values[np.isfinite(values)].astype(np.float64)
    if not len(values):
        return dict.fromkeys(STATISTICS)
    quartiles = np.quantile(values, list(QUARTILES.values())).tolist()
    found = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    found |= dict(zip(QUARTILES, quartiles, strict=True))
    return {statistic: float(found[statistic]) for statistic in STATISTICS}


def analysis(numbers: Numbers) -> dict[str, Any]:
    """What `--json` prints of a file: statistics of every field, `verdicts`, `weights` and `warnings`.

    `quantile_error` is the largest relative error of the fields' quartiles: 0 where all tokens are in memory. All else
    is exact. Of answers that q* did not draw there are no `weights`.
    """
    samples = numbers.samples
    fields = {name: numbers.statistics(name) for name in numbers.tokens if name != "position"}
    verdicts = {}
    for name, (quantity, low, high) in BANDS.items():
        mean, middle = fields[quantity]["mean"], numbers.middle_mean(quantity)
        verdicts[name] = {
            "low": low,
            "high": high,
            "mean": mean,
            "mean_without_outliers": middle,
            "tokens_inside": numbers.inside[name] / numbers.count,
            "met": mean is not None and low <= mean <= high,
            "met_without_outliers": middle is not None and low <= middle <= high,
        }
    weights = {}
    for side in WEIGHT if numbers.drawn else ():
        log_w = torch.from_numpy(samples[f"log_weight_{side}"])
        log_w = log_w[log_w < torch.inf]  # q* has no such sample: it is no draw from q*, and has no weight
        usable = bool(log_w.isfinite().any())
        weights[side] = {
            "samples": len(log_w),
            "effective_samples": effective_sample_size(log_w) if usable else 0.0,
            "top_1_percent": top_share(log_w, HEAVY_SHARE) if usable else None,
            "top_10_percent": top_share(log_w, 0.1) if usable else None,
        }
    return {
        "file": numbers.name,
        "samples": len(samples["num_tokens"]),
        "tokens": numbers.count,
        "drawn_from_q": numbers.drawn,
        "quantile_error": 0.0 if numbers.exact else CELL,
        "verdicts": verdicts,
        "weights": weights,
        "warnings": warnings(numbers, fields, verdicts, weights),
        "fields": fields,
        "of_samples": {name: statistics(values) for name, values in samples.items()},
    }


def warnings(numbers: Numbers, fields: dict, verdicts: dict, weights: dict) -> list[str]:
    """What ought to be looked at before training on this file, a line each."""
    found, samples = list(numbers.notes), len(numbers.samples["num_tokens"])
    kl = fields["kl"]["mean"]
    if kl is not None and kl > FAR_APART_KL:
        found.append(f"the pair is far apart: {kl:.2f} nats a token, above {FAR_APART_KL:g}; q* may be poor text")
    for name, verdict in verdicts.items():
        if verdict["met"] != verdict["met_without_outliers"]:
            found.append(
                f"{name}: the mean {verdict['mean']:.3g} is what a few outliers make it; without the farthest "
                f"{OUTLIERS:.0%} of the tokens it is {verdict['mean_without_outliers']:.3g}, and "
                f"{verdict['tokens_inside']:.1%} of the tokens are inside the band"
            )
    for side, weight in weights.items():
        ess = fields[f"ess_{side}"]["mean"]
        if ess is not None and ess < LITTLE_ESS:
            found.append(
                f"ESS_{side} is {ess:.3f} a token on average, below {LITTLE_ESS:g}: its weights are of little use"
            )
        heavy = weight["top_1_percent"]
        if samples >= 1 / HEAVY_SHARE and heavy is not None and heavy > HEAVY_WEIGHT:
            found.append(
                f"1% of the samples carry {heavy:.0%} of the weight {WEIGHT[side]}; "
                "clip it, or weigh tokens, not samples"
            )
        if (missing := samples - weight["samples"]) and side == "theta":
            found.append(f"{missing} samples have a token outside q*'s support; they are no draws from this q*")
    method = numbers.settings.get("--alpha-method", "kl_symmetry")
    for option, count in numbers.at_bound.items():
        share, bound = count / numbers.count, numbers.bound(option)
        inside = method in BUDGETS and bound in (0.0, 1.0)  # where one model is within the budget α is at an end
        if share > AT_CLAMP and method != "fixed" and not inside:
            found.append(f"α is at its bound {bound:g} ({option}) at {share:.1%} of the tokens")
    return found


def about(result: dict[str, Any]) -> list[str]:
    """What a reader of an `analysis` has to know of it, a line each."""
    said = []
    if result["quantile_error"]:
        said.append(
            f"quartiles are within {result['quantile_error']:.1%} of their size, and plots are of samples drawn at "
            "random; everything else is exact, and of all tokens"
        )
    if not result["drawn_from_q"]:
        said.append("q* did not draw these answers: π/q* of them are ratios of densities, and no importance weights")
    return said


def plotted(numbers: list[Numbers]) -> dict[str, dict[str, np.ndarray]]:
    """The arrays as `qstar.diagnostics.plots` takes them, by file."""
    return {
        n.name: n.tokens | {f"log_weights_{side}": n.samples[f"log_weight_{side}"] for side in WEIGHT if n.drawn}
        for n in numbers
    }
