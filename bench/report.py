"""`python -m bench.report`: one page from the runs that `pytest bench/ --benchmark` saved.

Compares with an earlier run of the same kind of machine and marks what moved by more than the spread of both.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).with_name("results")
PAGE = RESULTS / "report.md"  # the one that the project keeps
OURS = ("qstar", "qstar_sample")  # what is timed beside these in a step or a decoding loop is other people's
KINDS = ("step", "scaling", "memory", "decode", "generation", "speculation", "twin")
SHAPE_OF_TARGET = (8, 131072, "float32")
AXES = {"vocab_size": "vocabulary", "batch": "rows", "noise": "standard deviation of the pair's difference, nats"}


class ReportError(Exception):
    """A file is not what the benchmarks save; the message is one line."""


def load(path: Path) -> dict[str, Any]:
    """A saved run.

    Raises:
        ReportError: the file is missing, torn, or of something else.
    """
    try:
        run = json.loads(path.read_text())
        names = [case["name"] for case in run["benchmarks"]]
        kinds = {case["extra_info"]["kind"] for case in run["benchmarks"]}
        run["machine_info"]["versions"], run["commit_info"]["id"], run["datetime"]
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError:
        raise ReportError(f"{path} is no JSON file, or torn") from None
    except (KeyError, TypeError):
        raise ReportError(f"{path} was not saved by `pytest bench/ --benchmark`") from None
    if not names or not kinds <= set(KINDS):
        raise ReportError(f"{path} has no benchmark that this report knows")
    return run


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios round by round: both were timed in every round, so that drift of the machine cancels."""
    return median([value / other for value, other in zip(values, others, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def milliseconds(values: Sequence[float]) -> str:
    low, high = quartiles(values)
    digits = 2 if median(values) < 0.1 else 0
    return f"{median(values) * 1e3:.{digits}f} ({low * 1e3:.{digits}f}–{high * 1e3:.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [" | ".join(("", *row, "")).strip() for row in (head, ["---"] * len(head), *rows)] + [""]


def of_kind(run: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [case["extra_info"] for case in run["benchmarks"] if case["extra_info"]["kind"] == kind]


def shape(case: dict[str, Any]) -> tuple[int, int, str]:
    return case["batch"], case["vocab_size"], case["dtype"]


def steps(run: dict[str, Any]) -> list[str]:
    cases = of_kind(run, "step")
    if not cases:
        return []
    names = list(dict.fromkeys(name for case in cases for name in case["seconds"]))
    ours, others = names[0], names[1:]
    rows = []
    for case in cases:
        batch, vocab_size, dtype = shape(case)
        seconds = case["seconds"]
        cells = [f"[{batch}, {vocab_size}] {dtype}", milliseconds(seconds[ours]), f"{case['floor'] * 1e3:.2f}"]
        for name in others:
            known = name in seconds
            cells.append(
                f"{milliseconds(seconds[name])}, **{ratio(seconds[ours], seconds[name]):.2f}**" if known else ""
            )
        rows.append(cells)
    return [
        "## One step",
        "",
        "Milliseconds, median and quartiles of rounds in which all were timed in turns; in bold ours over the other, "
        "the median of the ratios round by round. The floor is the time to read both rows once at the bandwidth of a "
        "large copy.",
        "",
        *table(("logits", ours, "floor", *others), rows),
    ]


def scaling(run: dict[str, Any], folder: Path) -> list[str]:
    lines = []
    for case in of_kind(run, "scaling"):
        against = case["against"]
        x = [float(name) for name in case["seconds"]]
        y = [median(values) * 1e3 for values in case["seconds"].values()]
        spread = [quartiles(values) for values in case["seconds"].values()]
        bars = [[m - low * 1e3 for m, (low, _) in zip(y, spread, strict=True)]]
        bars.append([high * 1e3 - m for m, (_, high) in zip(y, spread, strict=True)])
        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        axes.errorbar(x, y, yerr=bars, marker="o", capsize=3)
        axes.set(xscale="log", xlabel=AXES[against], ylabel="milliseconds a step")
        axes.set(**({"ylim": (0, None)} if against == "noise" else {"yscale": "log"}))
        axes.grid(alpha=0.3)
        name = f"scaling-{against.replace('_', '-')}.png"
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        lines += [f"![milliseconds a step against {AXES[against]}]({name})", ""]
    return ["## Scaling", "", *lines] if lines else []


def decoding(run: dict[str, Any], folder: Path) -> list[str]:
    lines = []
    for case in of_kind(run, "decode"):
        rows = []
        for name, values in case["seconds"].items():
            low, high = (case["tokens"] / s for s in reversed(quartiles(values)))
            rate = case["tokens"] / median(values)
            faster = ratio(values, case["seconds"]["qstar"])
            rows.append((name, f"{rate:.0f} ({low:.0f}–{high:.0f})", f"{faster:.2f}"))
        lines += [f"### {case['pair'][0]} and {case['pair'][1]}, batch {case['batch']}", ""]
        lines += table(("loop", "tokens/s", "qstar is faster by"), rows)
        parts = {name: median(values) for name, values in case["split"].items()}
        share = {name: value / sum(parts.values()) for name, value in parts.items()}
        rows = [(name, f"{parts[name] * 1e3:.1f}", f"{share[name]:.1%}") for name in parts]
        lines += table(("of qstar's time", "milliseconds", "share"), rows)
        figure, axes = plt.subplots(figsize=(6, 1.3), layout="constrained")
        left = 0.0
        for name, value in share.items():
            axes.barh([""], [value], left=left, label=f"{name} {value:.1%}")
            left += value
        axes.set(xlim=(0, 1), xticks=[])
        axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.05), fontsize="small", frameon=False)
        name = f"decode-{'-'.join(case['pair']).replace(' ', '-')}-{case['batch']}.png"
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        lines += [f"![where the time goes]({name})", ""]
    for case in of_kind(run, "generation"):
        rates = generation_rates(case)
        rows = [(name, f"{rate:.0f}", f"{rates['qstar'] / rate:.2f}") for name, rate in rates.items()]
        lines += [f"### {case['samples']} samples to their ends, batch {case['batch']}", ""]
        lines += [
            "Tokens up to EOS. Ours fills the rows of finished samples; the loop goes on until its batch has ended.",
            "",
        ]
        lines += table(("loop", "tokens/s", "qstar is faster by"), rows)
    note = "But for the last table every loop draws the same number of tokens for the same prompts, past EOS."
    return ["## Decoding", "", note, "", *lines] if lines else []


def generation_rates(case: dict[str, Any]) -> dict[str, float]:
    """Tokens a second by loop; each draws its own samples, so their numbers of tokens differ."""
    return {name: case["tokens"][name] / median(values) for name, values in case["seconds"].items()}


def speculation(run: dict[str, Any]) -> list[str]:
    lines = []
    for case in of_kind(run, "speculation"):
        rows = []
        for name, values in case["seconds"].items():
            drafts = name.split()[0]
            known = drafts in case["predicted"]
            rows.append(
                (
                    drafts,
                    f"{case['tokens'] / median(values):.0f}",
                    f"{ratio(case['seconds']['0 drafts'], values):.2f}",
                    f"{case['predicted'][drafts]:.2f}" if known else "",
                    f"{case['acceptance'][drafts]:.3f}" if known else "",
                )
            )
        size = "of equal size" if case["times"] == 1 else f"with a π_t of {case['times']} times π_θ's layers"
        lines += [f"### The demo pair {size}, batch {case['batch']}", ""]
        lines += table(("drafts", "tokens/s", "over plain", "predicted", "accepted"), rows)
    rows = []
    for case in of_kind(run, "twin"):
        one, two = (case["seconds"][name] for name in ("one pass", "two passes"))
        rates = (f"{case['tokens'] / median(values):.0f}" for values in (one, two))
        rows.append((str(case["batch"]), *rates, f"{ratio(two, one):.2f}"))
    if rows:
        lines += ["### One model with two prompts", ""]
        lines += table(("batch", "one pass for both, tokens/s", "two passes, tokens/s", "ratio"), rows)
    return ["## Speculation", "", *lines] if lines else []


def targets(run: dict[str, Any]) -> list[str]:
    """What the package has set itself, as far as this run measured it."""
    rows = []

    def add(what: str, value: float, bound: str, met: bool) -> None:
        rows.append((what, f"{value:.3g}", bound, "yes" if met else "**no**"))

    for case in of_kind(run, "step"):
        if shape(case) == SHAPE_OF_TARGET:
            seconds = case["seconds"]
            ours = ratio(seconds["qstar_sample"], seconds["ordinary sampling, one model"])
            add("[8, 131072]: ours over ordinary sampling", ours, "at most 0.8", ours <= 0.8)
            theirs = ratio(seconds["research code"], seconds["qstar_sample"])
            add("[8, 131072]: research code over ours", theirs, "at least 11", theirs >= 11)
    for case in of_kind(run, "memory"):
        peak = case["peak"] / case["buffer"]
        add("peak memory over one float32 [B, V]", peak, "below 1", peak < 1)
    for case in of_kind(run, "scaling"):
        medians = {float(name): median(values) for name, values in case["seconds"].items()}
        if case["against"] == "batch":
            a_row = [value / batch for batch, value in medians.items()]
            most = a_row[-1] / min(a_row)
            add(f"cost of a row, {max(medians):.0f} rows over the cheapest", most, "at most 1.1", most <= 1.1)
        if case["against"] == "noise":
            most = medians[8.0] / min(medians.values())
            add("a pair 8 nats apart over the cheapest", most, "at most 2", most <= 2)
    for case in of_kind(run, "decode"):
        parts = {name: median(values) for name, values in case["split"].items()}
        rest = 1 - (parts["theta"] + parts["t"]) / sum(parts.values())
        if case["batch"] == 16:
            bound = 0.15 if case["pair"][0] == "demo theta" else 0.05
            name = f"{case['pair'][0]} and {case['pair'][1]}, batch 16"
            add(f"{name}: all but the forward passes", rest, f"at most {bound}", rest <= bound)
            faster = ratio(case["seconds"]["cached loop, 20 bisections"], case["seconds"]["qstar"])
            if bound == 0.15:
                add(f"{name}: tokens/s over the cached loop, equal lengths", faster, "at least 1.5", faster >= 1.5)
    for case in of_kind(run, "generation"):
        rates = generation_rates(case)
        faster = rates["qstar"] / rates["cached loop, 20 bisections"]
        add(f"{case['samples']} samples to EOS: tokens/s over the cached loop", faster, "at least 1.5", faster >= 1.5)
    return ["## Targets", "", *table(("", "measured", "wanted", "met"), rows)] if rows else []


def missing(run: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What a page of this run would be without: kinds of benchmarks, and cases that the run before it had."""
    kinds = {case["extra_info"]["kind"] for case in run["benchmarks"]}
    names = {case["name"] for case in run["benchmarks"]}
    earlier = [case["name"] for case in before["benchmarks"]] if before else []
    return [kind for kind in KINDS if kind not in kinds] + [name for name in earlier if name not in names]


def changes(run: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What moved since `before` by more than the spread: the quartiles of the two runs do not meet.

    What is timed beside ours moves with the machine and its packages, and gets no verdict.
    """
    old = {case["name"]: case["extra_info"].get("seconds", {}) for case in before["benchmarks"]}
    rows = []
    for case in run["benchmarks"]:
        for name, values in case["extra_info"].get("seconds", {}).items():
            earlier = old.get(case["name"], {}).get(name)
            if not earlier or len(earlier) < 2:
                continue
            (low, high), (old_low, old_high) = quartiles(values), quartiles(earlier)
            if low > old_high or high < old_low:
                ratio = median(values) / median(earlier)
                compared = any(ours in case["extra_info"]["seconds"] for ours in OURS) and name not in OURS
                verdict = "not ours" if compared else "**slower**" if ratio > 1 else "faster"
                rows.append((case["name"], name, milliseconds(earlier), milliseconds(values), f"{ratio:.2f}", verdict))
    since = f"## Since {before['datetime'][:16]} ({before['commit_info']['id'][:10]})"
    if not rows:
        return [since, "", "Nothing moved by more than the spread.", ""]
    return [since, "", *table(("case", "what", "before, ms", "now, ms", "ratio", ""), rows)]


def page(run: dict[str, Any], before: dict[str, Any] | None, folder: Path) -> str:
    """The whole report in Markdown; its plots are written to `folder`."""
    machine, commit = run["machine_info"], run["commit_info"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    gpu = machine["gpu"] or "none: not measured on a GPU"
    lines = [
        "# Benchmarks",
        "",
        f"{run['datetime'][:16]} UTC, commit {commit['id'][:10]}{' with changes' if commit['dirty'] else ''}.",
        f"{machine['cpu']}, {machine['system']}, {machine['threads']} of {machine['cores']} threads; GPU: {gpu}. "
        f"Python {machine['python']}, {versions}.",
        "",
        *targets(run),
        *steps(run),
        *scaling(run, folder),
        *decoding(run, folder),
        *speculation(run),
        *(changes(run, before) if before else []),
    ]
    return "\n".join(lines)


def same_machine(run: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(run["machine_info"][key] == other["machine_info"][key] for key in ("cpu", "gpu", "threads"))


def main(argv: list[str] | None = None) -> int:
    """Write the report; 0, or 1 with one line on stderr if there is nothing to report on."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="a saved run (default: the newest in bench/results)")
    parser.add_argument("--before", type=Path, help="the run to compare with (default: the one before on this machine)")
    parser.add_argument(
        "--output", type=Path, help=f"where to write (default: {PAGE}, and a partial run beside the file that it is in)"
    )
    args = parser.parse_args(argv)
    try:
        saved = sorted(RESULTS.glob("*/*.json"), key=lambda path: path.name)
        if args.run is None and not saved:
            raise ReportError("no run is saved; `pytest bench/ --benchmark` saves one")
        path = args.run or saved[-1]
        run = load(path)
        before = load(args.before) if args.before else None
        if before is None:
            earlier = [load(p) for p in saved if p.name < path.name and p.parent == path.parent]
            before = next((other for other in reversed(earlier) if same_machine(run, other)), None)
        output, partial = args.output or PAGE, missing(run, before)
        if partial and args.output is None:
            output = path.with_suffix("") / "report.md"
            print(f"{path.name} is a partial run, without {', '.join(partial)}; {PAGE.name} stays as it is")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page(run, before, output.parent), encoding="utf-8")
    except (ReportError, OSError) as error:
        print(f"python -m bench.report: error: {error}", file=sys.stderr)
        return 1
    print(f"{path} -> {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
