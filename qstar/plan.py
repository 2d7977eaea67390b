"""`python -m qstar.plan`: what a pair needs of a GPU, and what many GPUs give: arithmetic that anyone can redo.

    weights     Σ over both models of parameters · bytes
    KV caches   Σ over both models of 2 · layers · key-value heads · head size · bytes, for each cached token
    logits      Σ over both models of rows · vocabulary · bytes, for one step
    a step      at least the time to read weights, live KV caches and logits once at the memory's bandwidth

The last is a bound that no run reaches, not a measurement; `--step-ms` takes a measured step in its place.
"""

import argparse
import math
import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from qstar.arguments import COUNT, Parser, number

USABLE = 0.9  # of a GPU's memory; the rest is for activations, fragments and the driver
FLEETS = (1, 8, 64, 1000)
GIB = 1 << 30


@dataclass(frozen=True)
class ModelNeeds:
    """Bytes of one model: its weights, its keys and values a token, and its logits a row."""

    parameters: int
    weights: int
    kv_a_token: int
    logits_a_row: int


def model_needs(name: str, bytes_a_number: int) -> ModelNeeds:
    """Read off a model's configuration; no weights are loaded.

    Raises:
        OSError, ValueError: there is no such model, or it is not a causal language model.
    """
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv = 2 * text.num_hidden_layers * heads * size
    return ModelNeeds(parameters, parameters * bytes_a_number, kv * bytes_a_number, text.vocab_size * bytes_a_number)


@dataclass(frozen=True)
class Plan:
    """A pair on GPUs of one kind: what fits, and what a step takes.

    `gpus_a_worker` hold one pair, with `rows` sequences at once; `step` is in seconds, a bound unless it is `measured`.
    """

    weights: int
    kv_a_row: int
    logits_a_row: int
    gpus_a_worker: int
    rows: int
    step: float
    measured: bool

    def prompts_a_second(self, gpus: int, new_tokens: int) -> float:
        """Finished samples a second of so many GPUs, each row taking `new_tokens` steps."""
        return (gpus // self.gpus_a_worker) * self.rows / (self.step * new_tokens)


def plan(
    needs: list[ModelNeeds], memory: float, bandwidth: float, prompt_tokens: int, new_tokens: int,
    rows: int | None = None, step: float | None = None,
) -> Plan:  # fmt: skip
    """Place a pair.

    Args:
        needs: of π_θ and π_t; of one alone where both are the same model, whose KV caches and logits count twice.
        memory: bytes of a GPU.
        bandwidth: bytes a second that a GPU reads its memory at.
        prompt_tokens, new_tokens: of a row.
        rows: sequences of a worker at once; as many as fit by default.
        step: seconds of a measured decoding step with that many rows.

    Raises:
        ValueError: the rows that are asked for do not fit.
    """
    sides = needs if len(needs) == 2 else needs * 2
    weights = sum(n.weights for n in needs)
    kv_a_row = sum(n.kv_a_token for n in sides) * (prompt_tokens + new_tokens)
    logits_a_row = sum(n.logits_a_row for n in sides)
    gpus = max(1, math.ceil((weights + kv_a_row + logits_a_row) / (USABLE * memory)))
    fit = int((gpus * USABLE * memory - weights) // (kv_a_row + logits_a_row))
    if rows is not None and rows > fit:
        raise ValueError(f"{rows} rows do not fit: {gpus} GPU(s) a worker hold the weights and {fit} rows")
    rows = rows or fit
    live = sum(n.kv_a_token for n in sides) * (prompt_tokens + new_tokens / 2)  # a row is half done on average
    bound = (weights + rows * (live + logits_a_row)) / (gpus * bandwidth)
    return Plan(weights, kv_a_row, logits_a_row, gpus, rows, step or bound, step is not None)


def show(args: argparse.Namespace, needs: list[ModelNeeds], placed: Plan, console: Console) -> None:
    """The plan in two tables."""
    table = Table(title="one worker", title_justify="left", show_header=False)
    names = ("π_θ", "π_t") if len(needs) == 2 else ("π_θ and π_t, one model",)
    for name, n in zip(names, needs, strict=True):
        table.add_row(
            f"weights of {name}", f"{n.weights / GIB:.2f} GiB", f"{n.parameters / 1e9:.3g} billion parameters"
        )
    tokens = args.prompt_tokens + args.new_tokens
    table.add_row("KV caches of both, a row", f"{placed.kv_a_row / GIB:.3f} GiB", f"{tokens} tokens")
    table.add_row("logits of both, a row", f"{placed.logits_a_row / GIB:.4f} GiB", "")
    table.add_row("GPUs", str(placed.gpus_a_worker), f"{args.gpu_memory:g} GiB each, {USABLE:.0%} of it used")
    used = placed.weights + placed.rows * (placed.kv_a_row + placed.logits_a_row)
    table.add_row("rows at once", str(placed.rows), f"{used / GIB:.1f} GiB in all")
    what = "measured, as you say" if placed.measured else f"at least: one reading at {args.bandwidth:g} GB/s"
    table.add_row("a decoding step", f"{placed.step * 1e3:.2f} ms", what)
    console.print(table)
    limit = "" if placed.measured else ", at most"
    table = Table(title=f"{args.new_tokens} new tokens a sample{limit}", title_justify="left")
    for column in ("GPUs", "workers", "samples/s", "tokens/s", f"{args.num_samples:,} samples"):
        table.add_column(column, justify="right")
    for gpus in sorted({*FLEETS, args.gpus}):
        rate = placed.prompts_a_second(gpus, args.new_tokens)
        hours = f"{args.num_samples / rate / 3600:.3g} hours" if rate else "too few GPUs"
        tokens_a_second = f"{rate * args.new_tokens:,.0f}"
        table.add_row(f"{gpus:,}", f"{gpus // placed.gpus_a_worker:,}", f"{rate:,.3g}", tokens_a_second, hours)
    console.print(table)
    if not placed.measured:
        console.print("A bound, not a measurement. `pytest bench/ --benchmark --pair` measures a step, for --step-ms.")


def make_parser() -> Parser:
    """The command line."""
    positive = number(float, 1e-9, "a number above 0")
    parser = Parser(
        prog="python -m qstar.plan",
        description="What a pair needs of a GPU and what many GPUs give, as arithmetic; no weights are loaded.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model-theta", required=True, help="π_θ: hub name or folder")
    parser.add_argument("--model-t", required=True, help="π_t; the same name shares the weights")
    parser.add_argument("--gpus", type=COUNT, default=8, help="a fleet to show beside the usual ones")
    parser.add_argument("--gpu-memory", type=positive, default=80.0, help="GiB of a GPU")
    parser.add_argument("--bandwidth", type=positive, default=3350.0, help="GB/s of a GPU's memory, by its data sheet")
    parser.add_argument("--bytes", type=COUNT, default=2, help="of a number: 2 for bfloat16, 4 for float32")
    parser.add_argument("--prompt-tokens", type=COUNT, default=512, help="of a prompt")
    parser.add_argument("--new-tokens", type=COUNT, default=512, help="of a sample")
    parser.add_argument("--batch-size", type=COUNT, help="rows of a worker (default: as many as fit)")
    parser.add_argument("--step-ms", type=positive, help="a measured decoding step with that many rows")
    parser.add_argument("--num-samples", type=COUNT, default=1_000_000, help="a data set to say the hours of")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the plan; 0, or 1 with one line on stderr."""
    args = make_parser().parse_args(argv)
    try:
        names = dict.fromkeys((args.model_theta, args.model_t))
        needs = [model_needs(name, args.bytes) for name in names]
        step = args.step_ms and args.step_ms / 1e3
        memory, bandwidth = args.gpu_memory * GIB, args.bandwidth * 1e9
        placed = plan(needs, memory, bandwidth, args.prompt_tokens, args.new_tokens, args.batch_size, step)
    except (OSError, ValueError) as error:
        print(f"python -m qstar.plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    show(args, needs, placed, Console(soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
