"""`python -m qstar.analyze`: what the numbers of a data set say, before anyone trains on it.

Everything is read from `x.jsonl` and `x.diagnostics.jsonl`. A token takes 4 bytes a field in memory.
"""

import argparse
import json
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qstar.run.options import Parser, failed
from qstar.run.records import NULL, RecordError, RunFiles
from qstar.run.run import BANDS, FAR_APART_KL
from qstar.weights import effective_sample_size, top_share
from qstar_kernels.types import FIELDS

STATISTICS = ("mean", "std", "min", "q25", "median", "q75", "max")
WEIGHT = {"theta": "π_θ/q*", "t": "π_t/q*"}
MIN_WIDTH = 116
LITTLE_ESS = 0.1  # mean ESS of a token below which almost all of a model's mass is where q* has none
HEAVY_SHARE, HEAVY_WEIGHT = 0.01, 0.5  # a data set is lopsided where this share of the samples has this share of weight
AT_CLAMP = 0.01  # share of the tokens with α at its bound that is worth a word


@dataclass(frozen=True)
class Numbers:
    """All numbers of one file.

    `tokens` has float32 arrays with one entry a token: those of the diagnostics; `kl`, the larger of the two KLs, and
    `kl_gap`, their distance; `ess_ratio` (NaN where ESS_t is 0); `log_weight_theta` and `log_weight_t`; and `position`
    in the sample. `samples` has float64 arrays with one entry a sample: `num_tokens` and both log weights of the whole.
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
    tokens["kl"] = np.maximum(tokens["kl_theta"], tokens["kl_t"])
    with np.errstate(divide="ignore", invalid="ignore"):
        tokens["kl_gap"] = np.abs(tokens["kl_theta"] - tokens["kl_t"])
        ratio = tokens["ess_theta"] / tokens["ess_t"]
        tokens["ess_ratio"] = np.where(np.isfinite(ratio), ratio, np.nan).astype(np.float32)
        for side in ("theta", "t"):
            tokens[f"log_weight_{side}"] = tokens[f"logp_{side}"] - tokens["logq"]
    tokens["position"] = (np.arange(len(tokens["alpha"])) - np.repeat(ends - counts, counts)).astype(np.float32)
    samples = {"num_tokens": counts.astype(np.float64)}
    for side in ("theta", "t"):
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
    of_band = {"ESS ratio": "ess_ratio", "|ΔKL|": "kl_gap", "α": "alpha"}
    verdicts = {}
    for name, (low, high) in BANDS.items():
        values, mean = tokens[of_band[name]], fields[of_band[name]]["mean"]
        inside = float(((values >= np.float32(low)) & (values <= np.float32(high))).mean())
        verdicts[name] = {
            "low": low,
            "high": high,
            "mean": mean,
            "tokens_inside": inside,
            "met": mean is not None and low <= mean <= high,
        }
    weights = {}
    for side in ("theta", "t"):
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
    for side in ("theta", "t"):
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
        if share > AT_CLAMP and numbers.settings.get("--alpha-method", "kl_symmetry") != "fixed":
            found.append(f"α is at its bound {limit:g} ({bound}) at {share:.1%} of the tokens")
    return found


def plotted(numbers: list[Numbers]) -> dict[str, dict[str, np.ndarray]]:
    """The arrays as `qstar.diagnostics.plots` takes them, by file."""
    return {
        n.name: n.tokens | {f"log_weights_{side}": n.samples[f"log_weight_{side}"] for side in ("theta", "t")}
        for n in numbers
    }


def save_plots(numbers: list[Numbers], folder: Path) -> None:
    """Draw all plots as PNG files into a folder, which is made.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the folder cannot be written to.
    """
    from qstar.diagnostics.plots import all_plots, png  # matplotlib is an extra

    folder.mkdir(parents=True, exist_ok=True)
    for name, _, draw in all_plots(plotted(numbers)):
        (folder / f"{name}.png").write_bytes(png(draw(False), transparent=False))


def show(results: list[dict[str, Any]], console: Console) -> None:
    """The tables of one file, or of several side by side."""
    single = len(results) == 1
    table = Table(title="all files" if not single else results[0]["file"], title_justify="left")
    names = [""] + (list(STATISTICS) if single else [result["file"] for result in results])
    for name in names:
        table.add_column(name, justify="right" if name else "left", overflow="fold", no_wrap=not name)

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    for group in ("fields", "of_samples"):
        for field in results[0][group]:
            label = field if group == "fields" else f"{field}, a sample"
            if single:
                table.add_row(label, *(number(results[0][group][field][name]) for name in STATISTICS))
            else:
                cells = (result[group][field] for result in results)
                table.add_row(label, *(f"{number(c['mean'])} ± {number(c['std'])}" for c in cells))
        table.add_section()
    console.print(table)
    table = Table(title="verdicts: mean, and tokens inside the band", title_justify="left")
    for name in ("", "band", *(result["file"] for result in results)):
        table.add_column(name, justify="right" if name else "left", overflow="fold", no_wrap=not name)
    for name, (low, high) in BANDS.items():
        cells = []
        for result in results:
            verdict = result["verdicts"][name]
            cells.append(f"{number(verdict['mean'])} {'✓' if verdict['met'] else '✗'} {verdict['tokens_inside']:.1%}")
        table.add_row(name, f"{low:g} to {high:g}", *cells)
    for side in ("theta", "t"):
        cells = []
        for result in results:
            weight = result["weights"][side]
            cells.append(f"{weight['effective_samples']:.1f} of {result['samples']}")
        table.add_row(f"effective samples, {WEIGHT[side]}", "", *cells)
    console.print(table)
    for result in results:
        for warning in result["warnings"]:
            console.print(f"[bold]Warning:[/] {result['file']}: ", end="")
            console.print(warning, markup=False, highlight=False)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m qstar.analyze",
        description="What the numbers of generated or scored samples say: statistics, verdicts and warnings.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="x.jsonl that was written with its diagnostics")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the plots there, as PNG")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the analysis; 0, or 1 with one line on stderr if a file cannot be read."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        numbers = [read_numbers(path) for path in args.files]
        results = [analysis(n) for n in numbers]
        if args.plots is not None:
            save_plots(numbers, args.plots)
    except (RecordError, OSError, ImportError) as error:
        return failed(parser.prog, error)
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        console = Console(soft_wrap=True)
        console.width = max(console.width, MIN_WIDTH)  # numbers that are broken in two cannot be read
        show(results, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
