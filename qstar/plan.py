"""`python -m qstar.plan`: what a pair needs of a GPU, and what many GPUs give: arithmetic that anyone can redo.

Every line is printed with the numbers that go into it. A decoding step takes at least the time to read weights, live KV
caches and logits once, and at least two operations for every row and parameter of the layers. With a data sheet's
figures that is a bound that no run reaches, and not a measurement; `--step-ms` takes a measured step instead.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qstar.run.command import Parser, guarded, number
from qstar.run.options import BLOCK_BATCHES, COUNT

if TYPE_CHECKING:
    from rich.console import Console

USABLE = 0.9  # of a GPU's memory; the rest is for activations, fragments and the driver
FLEETS = (1, 8, 64, 1000)
# What one run on Ray was measured to take on one core each (python -m bench.feeding, stub workers, a shared 2-core
# x86-64 machine): the driver's loop, in parts a second, and the reader, in samples a second
DRIVER_PARTS, READER_SAMPLES = 90, 29_000


@dataclass(frozen=True)
class ModelNeeds:
    """What of a model takes memory and time; `in_layers` are the parameters outside the embeddings."""

    parameters: int
    in_layers: int
    layers: int
    kv_heads: int
    head_size: int
    vocab_size: int

    def kv(self, size: int) -> int:
        """Bytes of the keys and values of one token, with numbers of `size` bytes."""
        return 2 * self.layers * self.kv_heads * self.head_size * size


def model_needs(name: str) -> ModelNeeds:
    """Read off a model's configuration; no weights are loaded.

    Raises:
        OSError, ValueError: there is no such model, or it is not a causal language model.
    """
    import torch  # these take seconds, which help and errors do without
    from transformers import AutoConfig, AutoModelForCausalLM

    from qstar.pair import naming

    with naming(name):
        config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    parameters = sum(p.numel() for p in model.parameters())
    embeddings = {e.weight for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    in_layers = parameters - sum(p.numel() for p in embeddings)
    return ModelNeeds(parameters, in_layers, text.num_hidden_layers, heads, head_size, text.vocab_size)


@dataclass(frozen=True)
class Plan:
    """A pair on GPUs of one kind.

    `gpus_a_worker` hold one pair with `rows` sequences at once; a step takes `step` seconds, and a worker finishes a
    sample every `sample` seconds. `lines` are the arithmetic: what, how, and the result.
    """

    gpus_a_worker: int
    rows: int
    step: float
    sample: float
    lines: list[tuple[str, str, str]]

    def samples_a_second(self, gpus: int) -> float:
        return gpus // self.gpus_a_worker / self.sample

    @property
    def workers_fed(self) -> int:
        """Workers that one run can feed, by what its driver and its reader take."""
        return int(min(DRIVER_PARTS * BLOCK_BATCHES * self.rows, READER_SAMPLES) * self.sample)


def plan(
    needs: list[ModelNeeds], *, memory: float, bandwidth: float, operations: float, prompt_tokens: int,
    new_tokens: int, size: int = 2, rows: int | None = None, step: float | None = None,
) -> Plan:  # fmt: skip
    """Place a pair.

    Args:
        needs: of π_θ and π_t; of one alone where both are the same model, whose weights then count once.
        memory, bandwidth, operations: bytes, bytes a second and operations a second of a GPU.
        prompt_tokens, new_tokens: of a row.
        size: bytes of a number.
        rows: sequences of a worker at once; as many as fit by default.
        step: seconds of a measured decoding step with that many rows, in which the time of the prompts is contained.

    Raises:
        ValueError: the rows that are asked for do not fit.
    """
    theta, t = sides = needs * (2 // len(needs))
    weights = sum(n.parameters for n in needs) * size
    kv, logits = sum(n.kv(size) for n in sides), sum(n.vocab_size for n in sides) * size
    row = kv * (prompt_tokens + new_tokens) + logits
    usable = USABLE * memory
    gpus = math.ceil((weights + row) / usable)
    fit = int((gpus * usable - weights) // row)
    if rows is not None and rows > fit:
        raise ValueError(f"{rows} rows do not fit: {gpus} GPU(s) a worker hold the weights and {fit} rows")
    given, rows = rows is not None, rows or fit
    live = prompt_tokens + new_tokens / 2
    read = weights + rows * (kv * live + logits)
    a_token = 2 * sum(n.in_layers for n in sides)
    read_time, compute_time = read / (gpus * bandwidth), a_token * rows / (gpus * operations)
    step_time = step or max(read_time, compute_time)
    prefill = a_token * prompt_tokens / (gpus * operations)
    sample = step_time * new_tokens / rows + (0 if step else prefill)

    def kv_line(name: str, n: ModelNeeds) -> tuple[str, str, str]:
        how = f"2 · {n.layers} layers · {n.kv_heads} heads · {n.head_size} · {size} bytes"
        return f"keys and values of a token, {name}", how, f"{n.kv(size):,} bytes"

    parameters = " + ".join(f"{n.parameters:,}" for n in needs)
    speed = f"({gpus} · {figures(operations / 1e12)} TFLOP/s)"
    lines = [
        ("weights", f"({parameters}) parameters · {size} bytes", gigabytes(weights)),
        kv_line("π_θ", theta),
        kv_line("π_t", t),
        ("logits of a row", f"({theta.vocab_size:,} + {t.vocab_size:,}) · {size} bytes", f"{logits:,} bytes"),
        ("a row", f"{kv:,} bytes · ({prompt_tokens} + {new_tokens}) tokens + {logits:,} bytes", gigabytes(row)),
        ("GPUs of a worker", f"the fewest whose {USABLE:.0%} of {gigabytes(memory)} hold weights and a row", f"{gpus}"),
        ("rows that fit", f"({gpus} · {gigabytes(usable)} − weights) / a row", f"{fit:,}"),
        ("rows", "--batch-size" if given else "as many as fit", f"{rows:,}"),
        ("tokens of a row on average", f"{prompt_tokens} + {new_tokens} / 2", f"{live:g}"),
        ("read in a step", f"weights + {rows:,} · ({kv:,} · {live:g} + {logits:,}) bytes", gigabytes(read)),
        ("time to read that", f"it / ({gpus} · {figures(bandwidth / 1e9)} GB/s)", milliseconds(read_time)),
        ("operations for a token", f"2 · ({theta.in_layers:,} + {t.in_layers:,}) parameters in layers", f"{a_token:,}"),
        ("time to compute a step", f"{a_token:,} · {rows:,} rows / {speed}", milliseconds(compute_time)),
    ]
    if step:
        lines.append(("a step", "--step-ms, measured, prompts and all", milliseconds(step)))
    else:
        lines.append(("a step", "at least the longer of the two", milliseconds(step_time)))
        lines.append(("a prompt", f"at least {a_token:,} · {prompt_tokens} tokens / {speed}", milliseconds(prefill)))
    how = f"a step · {new_tokens} / {rows:,}{'' if step else ' + a prompt'}"
    lines.append(("a sample", how, milliseconds(sample)))
    return Plan(gpus, rows, step_time, sample, lines)


def figures(x: float) -> str:
    """Four digits, and all before the point."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def gigabytes(x: float) -> str:
    return f"{figures(x / 1e9)} GB"


def milliseconds(seconds: float) -> str:
    return f"{figures(seconds * 1e3)} ms"


def show(args: argparse.Namespace, placed: Plan, console: "Console") -> None:
    """The arithmetic of one worker line by line, and a table of many."""
    from rich.table import Table

    for what, how, result in placed.lines:
        console.print(f"{what}: {how} = {result}", markup=False, highlight=False)
    table = Table(title=f"\nworkers share nothing{'' if args.step_ms else '; at most'}", title_justify="left")
    for column in ("GPUs", "workers", "samples/s", "tokens/s", f"hours for {args.num_samples:,}"):
        table.add_column(column, justify="right")
    for gpus in sorted({*FLEETS, *args.gpus}):
        rate = placed.samples_a_second(gpus)
        hours = figures(args.num_samples / rate / 3600) if rate else "too few GPUs"
        workers = gpus // placed.gpus_a_worker
        table.add_row(f"{gpus:,}", f"{workers:,}", figures(rate), figures(rate * args.new_tokens), hours)
    console.print(table)
    of_driver = f"{DRIVER_PARTS} parts/s of the driver · {BLOCK_BATCHES} batches · {placed.rows:,} rows"
    rates = f"{of_driver} = {DRIVER_PARTS * BLOCK_BATCHES * placed.rows:,}, {READER_SAMPLES:,} of the reader"
    said = f"one run feeds {placed.workers_fed:,} workers: min({rates}) samples/s · a sample"
    console.print(said, markup=False, highlight=False)
    if not args.step_ms:
        console.print(
            "An estimate from a data sheet, and a bound: no run is as quick. For --step-ms divide --batch-size by the "
            "tokens/s of a run on one worker."
        )
    if placed.gpus_a_worker > 1 and not args.step_ms:
        console.print(
            f"A pair spread over {placed.gpus_a_worker} GPUs by --device-map uses one of them at a time, and takes "
            f"{placed.gpus_a_worker} times as long as this."
        )


def make_parser() -> Parser:
    """The command line."""
    positive = number(float, 1e-9, "a number above 0")
    parser = Parser(
        "plan",
        description="What a pair needs of a GPU and what many GPUs give, as arithmetic; no weights are loaded. "
        "The defaults for the GPU are the data sheet's of an NVIDIA H100 SXM.",
    )
    parser.add_argument("--model-theta", required=True, help="π_θ: hub name or folder")
    parser.add_argument("--model-t", required=True, help="π_t; the same name shares the weights")
    parser.add_argument("--gpus", type=COUNT, nargs="+", default=[], help=f"fleets to show beside {FLEETS}")
    parser.add_argument("--gpu-memory", type=positive, default=80.0, help="GB of a GPU")
    parser.add_argument("--bandwidth", type=positive, default=3350.0, help="GB/s of a GPU's memory")
    parser.add_argument("--tflops", type=positive, default=989.0, help="10^12 operations a second of a GPU, dense")
    parser.add_argument("--bytes", type=COUNT, default=2, help="of a number: 2 for bfloat16, 4 for float32")
    parser.add_argument("--prompt-tokens", type=COUNT, default=512, help="of a prompt")
    parser.add_argument("--new-tokens", type=COUNT, default=512, help="of a sample")
    parser.add_argument("--batch-size", type=COUNT, help="rows of a worker (default: as many as fit)")
    parser.add_argument("--step-ms", type=positive, help="a measured step: rows / tokens/s of a run")
    parser.add_argument("--num-samples", type=COUNT, default=1_000_000, help="a data set to say the hours of")
    return parser


def run(argv: list[str] | None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.step_ms and not args.batch_size:
        parser.error("--step-ms is of a number of rows: give --batch-size, too")
    from rich.console import Console

    needs = [model_needs(name) for name in dict.fromkeys((args.model_theta, args.model_t))]
    placed = plan(
        needs,
        memory=args.gpu_memory * 1e9,
        bandwidth=args.bandwidth * 1e9,
        operations=args.tflops * 1e12,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        size=args.bytes,
        rows=args.batch_size,
        step=args.step_ms and args.step_ms / 1e3,
    )
    show(args, placed, Console(soft_wrap=True))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Print the plan; 0, 1 with one line on stderr if it cannot be made, 2 for a wrong command line, 130 if it was
    interrupted."""
    return guarded("qstar plan", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
