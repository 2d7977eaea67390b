"""`python -m qstar.plan`: what a pair needs of a GPU, and what many GPUs give: arithmetic that anyone can redo.

Every line is printed with the numbers that go into it. A decoding step takes at least the time to read weights, live KV
caches and logits once, and at least two operations for every row and parameter of the layers. With a data sheet's
figures that is a bound that no run reaches, and not a measurement; `--step-ms` takes a measured step instead.
"""

import argparse
import math
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qstar.run.command import Parser, guarded, number
from qstar.run.options import BLOCK_BATCHES, COUNT, add_model_names, check_models

if TYPE_CHECKING:
    from rich.console import Console

USABLE = 0.9  # of a GPU's memory; the rest is for activations, fragments and the driver
FLEETS = (1, 8, 64, 1000)
# What one run on Ray was measured to take on one core each (python -m bench.feeding, 64 stub workers, a shared
# 2-core x86-64 machine): the driver's loop, in parts a second, and the reader, in samples a second
DRIVER_PARTS, READER_SAMPLES = 70, 29_000


Shape = tuple[int, int]  # heads, and numbers of one of them


@dataclass(frozen=True)
class ModelNeeds:
    """What of a model takes memory and time.

    Attributes:
        parameters: all of the base.
        adapter: those that an adapter adds.
        in_layers: those of both outside the embeddings.
        columns: what is kept of a token: layers by the shapes of their keys and of their values.
        states: numbers that are kept of a row whatever its length, by their bytes, of a model of 2 bytes a number.
        vocab_size: logits of a row.
    """

    parameters: int
    adapter: int
    in_layers: int
    columns: Counter[tuple[Shape, Shape]]
    states: Counter[int]
    vocab_size: int

    def kv(self, size: int) -> int:
        """Bytes of the keys and values of one token, with numbers of `size` bytes."""
        return sum(n * (math.prod(keys) + math.prod(values)) for (keys, values), n in self.columns.items()) * size

    def of_row(self, size: int) -> int:
        """Bytes of the states of one row; numbers of more than 2 bytes are so in a model of any size."""
        return sum(n * (size if own == 2 else own) for own, n in self.states.items())


def model_needs(name: str, adapter: str | None) -> ModelNeeds:
    """Read off the configurations of a model and of its adapter; no weights are loaded.

    Raises:
        OSError, ValueError: there is no such model, it is not a causal language model, or it cannot be run without its
            weights, by which what its cache keeps is found.
    """
    import torch  # these take seconds, which help and errors do without
    from transformers import AutoConfig, AutoModelForCausalLM

    from qstar.pair import naming

    with naming(name):
        config = AutoConfig.from_pretrained(name)
    text = config.get_text_config()
    text.pad_token_id = None  # transformers would look for it among the tokens
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    columns, states = kept_by(model, name)
    parameters = sum(p.numel() for p in model.parameters())
    embeddings = {e.weight for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    in_embeddings = sum(p.numel() for p in embeddings)
    if adapter is not None:
        from peft import PeftConfig, get_peft_model

        with naming(adapter):
            config = PeftConfig.from_pretrained(adapter)
        with torch.device("meta"):
            model = get_peft_model(model, config)
    both = sum(p.numel() for p in model.parameters())
    return ModelNeeds(parameters, both - parameters, both - in_embeddings, columns, states, text.vocab_size)


def kept_by(model: Any, name: str) -> tuple[Counter[tuple[Shape, Shape]], Counter[int]]:
    """`ModelNeeds.columns` and `ModelNeeds.states` of a model without weights: of a pass that computes nothing, in the
    cache that decoding has.

    Raises:
        ValueError: it looks at numbers in its forward pass.
    """
    import torch

    from qstar.cache import cache_argument, new_cache, places_of
    from qstar.slots import IDS, Slots

    slots, ids = Slots(), torch.zeros(1, 4, dtype=torch.int64, device="meta")
    slots.move(1, 0, ids.shape[1])
    slots.begin(1)
    try:
        cache = new_cache(model, slots)
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
    except Exception as error:  # whatever a model may do with a number that is not there
        raise ValueError(f"what the cache of {name} keeps cannot be told without its weights: {error}") from error
    shapes = {place: (x.shape[1], x.shape[3]) for place, x in slots.memory.items() if place != IDS}
    layers = dict.fromkeys(layer for layer, _ in shapes)
    columns = Counter((shapes[layer, "keys"], shapes[layer, "values"]) for layer in layers)
    states: Counter[int] = Counter()
    for holder, key in places_of(cache):
        states[holder[key].element_size()] += holder[key].numel()
    return columns, states


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
    theta: ModelNeeds, t: ModelNeeds, weights: list[int], *, memory: float, bandwidth: float, operations: float,
    prompt_tokens: int, new_tokens: int, size: int = 2, rows: int | None = None, step: float | None = None,
) -> Plan:  # fmt: skip
    """Place a pair.

    Args:
        theta, t: what each side needs.
        weights: parameters of what is loaded; a model or an adapter that both sides have counts once.
        memory, bandwidth, operations: bytes, bytes a second and operations a second of a GPU.
        prompt_tokens, new_tokens: of a row.
        size: bytes of a number.
        rows: sequences of a worker at once; as many as fit by default.
        step: seconds of a measured decoding step with that many rows, in which the time of the prompts is contained.

    Raises:
        ValueError: the rows that are asked for do not fit.
    """
    sides = theta, t
    loaded = sum(weights) * size
    kv, logits = sum(n.kv(size) for n in sides), sum(n.vocab_size for n in sides) * size
    fixed = logits + sum(n.of_row(size) for n in sides)  # of a row, whatever its length
    row = kv * (prompt_tokens + new_tokens) + fixed
    usable = USABLE * memory
    gpus = math.ceil((loaded + row) / usable)
    fit = int((gpus * usable - loaded) // row)
    if rows is not None and rows > fit:
        raise ValueError(f"{rows} rows do not fit: {gpus} GPU(s) a worker hold the weights and {fit} rows")
    given, rows = rows is not None, rows or fit
    live = prompt_tokens + new_tokens / 2
    read = loaded + rows * (kv * live + fixed)
    a_token = 2 * sum(n.in_layers for n in sides)
    read_time, compute_time = read / (gpus * bandwidth), a_token * rows / (gpus * operations)
    step_time = step or max(read_time, compute_time)
    prefill = a_token * prompt_tokens / (gpus * operations)
    sample = step_time * new_tokens / rows + (0 if step else prefill)

    parameters = " + ".join(f"{count:,}" for count in weights)
    speed = f"({gpus} · {figures(operations / 1e12)} TFLOP/s)"
    lines = [
        ("weights", f"({parameters}) parameters · {size} bytes", gigabytes(loaded)),
        *cache_lines("π_θ", theta, size),
        *cache_lines("π_t", t, size),
        ("logits of a row", f"({theta.vocab_size:,} + {t.vocab_size:,}) · {size} bytes", f"{logits:,} bytes"),
        ("a row", f"{kv:,} bytes · ({prompt_tokens} + {new_tokens}) tokens + {fixed:,} bytes", gigabytes(row)),
        ("GPUs of a worker", f"the fewest whose {USABLE:.0%} of {gigabytes(memory)} hold weights and a row", f"{gpus}"),
        ("rows that fit", f"({gpus} · {gigabytes(usable)} − weights) / a row", f"{fit:,}"),
        ("rows", "--batch-size" if given else "as many as fit", f"{rows:,}"),
        ("tokens of a row on average", f"{prompt_tokens} + {new_tokens} / 2", f"{live:g}"),
        ("read in a step", f"weights + {rows:,} · ({kv:,} · {live:g} + {fixed:,}) bytes", gigabytes(read)),
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


def cache_lines(name: str, needs: ModelNeeds, size: int) -> list[tuple[str, str, str]]:
    """The lines of what a side keeps of a token and of a row."""
    terms, lines = [], []
    for (keys, values), layers in needs.columns.items():
        shapes = [f"{heads} heads · {numbers}" for heads, numbers in (keys, values)]
        same = f"2 · {layers} layers · {shapes[0]}"
        terms.append(same if keys == values else f"{layers} layers · ({shapes[0]} + {shapes[1]})")
    how = f"({' + '.join(terms)})" if len(terms) > 1 else "".join(terms)
    if terms:
        lines.append((f"keys and values of a token, {name}", f"{how} · {size} bytes", f"{needs.kv(size):,} bytes"))
    if needs.states:
        states = [f"{n:,} · {size if own == 2 else own} bytes" for own, n in needs.states.items()]
        lines.append((f"states of a row, {name}", " + ".join(states), f"{needs.of_row(size):,} bytes"))
    return lines


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
    add_model_names(parser)
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
    with parser.refusing():
        check_models(args)
    from rich.console import Console

    sides = (args.model_theta, args.adapter_theta), (args.model_t, args.adapter_t)
    needs = {side: model_needs(*side) for side in dict.fromkeys(sides)}
    weights = list({base: n.parameters for (base, _), n in needs.items()}.values())
    weights += [n.adapter for (_, adapter), n in needs.items() if adapter is not None]
    placed = plan(
        *(needs[side] for side in sides),
        weights,
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
