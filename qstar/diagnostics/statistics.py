"""What the numbers of a data set say: statistics of every field, verdicts, weights and warnings.

A token takes 4 bytes a field in memory.
"""

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qstar.run.records import NULL, RunFiles
from qstar.weights import BANDS, FAR_APART_KL, WEIGHT, derived, effective_sample_size, top_share
from qstar_kernels.types import BUDGETS, FIELDS

STATISTICS = ("mean", "std", "min", "q25", "median", "q75", "max")
LITTLE_ESS = 0.1  # mean ESS of a token below which almost all of a model's mass is where q* has none
HEAVY_SHARE, HEAVY_WEIGHT = 0.01, 0.5  # a data set is lopsided where this share of the samples has this share of weight
AT_CLAMP = 0.01  # share of the tokens with α at its bound that is worth a word


@dataclass(frozen=True)
class Numbers:
    """All numbers of one file.

    `tokens` has float32 arrays with one entry a token: those of the diagnostics, what is `derived` from them, and
    `position` in the sample. `samples` has float64 arrays with one entry a sample: `num_tokens` and both log weights of
    the whole.
    """

    name: str
    settings: dict[str, Any]
    notes: list[str]
    tokens: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]


def read_numbers(path: str | Path) -> Numbers:
    """Read one file.

    Raises:
        RecordError: it is missing, empty, torn in the middle or foreign.
    """
    files = RunFiles(path)
    columns, lengths = {name: array("f") for name in FIELDS}, array("q")
    for record in files:
        lengths.append(len(record.tokens["id"]))
        for name in FIELDS:
            columns[name].extend(NULL.get(name, np.nan) if x is None else x for x in record.tokens[name])
    tokens = {name: np.frombuffer(column, dtype=np.float32) for name, column in columns.items()}
    counts = np.frombuffer(lengths, dtype=np.int64)
    ends = counts.cumsum()
    tokens |= derived(tokens)
    tokens["position"] = (np.arange(len(tokens["alpha"])) - np.repeat(ends - counts, counts)).astype(np.float32)
    samples = {"num_tokens": counts.astype(np.float64)}
    for side in WEIGHT:
        samples[f"log_weight_{side}"] = np.add.reduceat(tokens[f"log_weight_{side}"].astype(np.float64), ends - counts)
    return Numbers(files.name, files.settings, list(files.notes), tokens, samples)


def statistics(values: np.ndarray) -> dict[str, float | None]:
    """Mean, deviation, extremes and quartiles of what is finite; None where nothing is."""
    values = values[np.isfinite(values)].astype(np.float64)
    if not len(values):
        return dict.fromkeys(STATISTICS)
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "q25": float(low),
        "median": float(middle),
        "q75": float(high),
        "max": float(values.max()),
    }


def analysis(numbers: Numbers) -> dict[str, Any]:
    """What `--json` prints of a file: statistics of every field, `verdicts`, `weights` and `warnings`."""
    tokens, samples = numbers.tokens, numbers.samples
    fields = {name: statistics(values) for name, values in tokens.items() if name != "position"}
    verdicts = {}
    for name, (quantity, low, high) in BANDS.items():
        values, mean = tokens[quantity], fields[quantity]["mean"]
        inside = float(((values >= np.float32(low)) & (values <= np.float32(high))).mean())
        verdicts[name] = {
            "low": low,
            "high": high,
            "mean": mean,
            "tokens_inside": inside,
            "met": mean is not None and low <= mean <= high,
        }
    weights = {}
    for side in WEIGHT:
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
        "tokens": len(tokens["alpha"]),
        "verdicts": verdicts,
        "weights": weights,
        "warnings": warnings(numbers, fields, weights),
        "fields": fields,
        "of_samples": {name: statistics(values) for name, values in samples.items()},
    }


def warnings(numbers: Numbers, fields: dict, weights: dict) -> list[str]:
    """What ought to be looked at before training on this file, a line each."""
    found = list(numbers.notes)
    tokens = numbers.tokens
    kl = fields["kl"]["mean"]
    if kl is not None and kl > FAR_APART_KL:
        found.append(f"the pair is far apart: {kl:.2f} nats a token, above {FAR_APART_KL:g}; q* may be poor text")
    for side in WEIGHT:
        ess = fields[f"ess_{side}"]["mean"]
        if ess is not None and ess < LITTLE_ESS:
            found.append(
                f"ESS_{side} is {ess:.3f} a token on average, below {LITTLE_ESS:g}: its weights are of little use"
            )
        heavy = weights[side]["top_1_percent"]
        if len(numbers.samples["num_tokens"]) >= 1 / HEAVY_SHARE and heavy is not None and heavy > HEAVY_WEIGHT:
            found.append(
                f"1% of the samples carry {heavy:.0%} of the weight {WEIGHT[side]}; "
                "clip it, or weigh tokens, not samples"
            )
        missing = len(numbers.samples["num_tokens"]) - weights[side]["samples"]
        if missing and side == "theta":
            found.append(f"{missing} samples have a token outside q*'s support; they are no draws from this q*")
    for bound, edge in (("--alpha-min", 0.0), ("--alpha-max", 1.0)):
        limit = numbers.settings.get(bound, edge)
        share = float((np.abs(tokens["alpha"] - np.float32(limit)) < 1e-6).mean())
        method = numbers.settings.get("--alpha-method", "kl_symmetry")
        inside = method in BUDGETS and limit == edge  # where one model is within the budget α is at an end
        if share > AT_CLAMP and method != "fixed" and not inside:
            found.append(f"α is at its bound {limit:g} ({bound}) at {share:.1%} of the tokens")
    return found


def plotted(numbers: list[Numbers]) -> dict[str, dict[str, np.ndarray]]:
    """The arrays as `qstar.diagnostics.plots` takes them, by file."""
    return {
        n.name: n.tokens | {f"log_weights_{side}": n.samples[f"log_weight_{side}"] for side in WEIGHT} for n in numbers
    }
