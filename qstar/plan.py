"""`python -m qstar.plan`: what a pair needs of a GPU, and what many GPUs give, as arithmetic that anyone can redo.

    weights     parameters · bytes, of both models
    KV caches   2 · layers · key-value heads · head size · bytes for every token of a row, of both models
    logits      vocabulary · bytes for every row, of both models
    a step      at least one reading of the weights, of the rows' KV caches and of their logits

The last is an estimate by the data sheet, and a bound: no run is faster. A step that was measured takes its place with
`--step-ms`. What a prompt costs before its first token is left out.
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
GB = 1e9


@dataclass(frozen=True)
class Size:
    """One model in numbers: its parameters, those of its KV cache a token, and its logits a row."""

    parameters: int
    layers: int
    heads: int
    head_size: int
    vocab_size: int

    @classmethod
    def of(cls, name: str) -> "Size":
        """By a model's configuration; no weights are loaded.

        Raises:
            OSError, ValueError: there is no such model, or it is not a causal language model.
        """
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        parameters = sum(p.numel() for p in model.parameters())
        return cls(parameters, text.num_hidden_layers, heads, head_size, text.vocab_size)

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds for a token."""
        return 2 * self.layers * self.heads * self.head_size


@dataclass(frozen=True)
class Plan:
    """A pair on GPUs of one kind. All sizes in bytes, `step` in seconds.

    `models` are π_θ and π_t, or one model that is both: it has one copy of the weights, and two KV caches.
    """

    models: tuple[Size, ...]
    number_bytes: int
    memory: float
    bandwidth: float
    prompt_tokens: int
    new_tokens: int
    asked_rows: int | None = None
    measured_step: float | None = None

    @property
    def sides(self) -> tuple[Size, ...]:
        return self.models if len(self.models) == 2 else self.models * 2

    @property
    def weights(self) -> int:
        return self.number_bytes * sum(model.parameters for model in self.models)

    @property
    def cache_a_token(self) -> int:
        return self.number_bytes * sum(side.cached for side in self.sides)

    @property
    def logits(self) -> int:
        """Of a row."""
        return self.number_bytes * sum(side.vocab_size for side in self.sides)

    @property
    def row(self) -> int:
        """At its longest."""
        return (self.prompt_tokens + self.new_tokens) * self.cache_a_token + self.logits

    @property
    def gpus(self) -> int:
        """That hold one pair and at least one row."""
        return math.ceil((self.weights + self.row) / (USABLE * self.memory))

    @property
    def fit(self) -> int:
        """Rows there is room for."""
        return int((self.gpus * USABLE * self.memory - self.weights) // self.row)

    @property
    def rows(self) -> int:
        """That are decoded together."""
        return self.asked_rows or self.fit

    @property
    def live_tokens(self) -> float:
        """Of a row that is half done, as rows are on average."""
        return self.prompt_tokens + self.new_tokens / 2

    @property
    def read(self) -> float:
        """In one step, once."""
        return self.weights + self.rows * (self.live_tokens * self.cache_a_token + self.logits)

    @property
    def step(self) -> float:
        """The layers of a pair that is spread over several GPUs wait for one another: one GPU reads at a time."""
        return self.measured_step or self.read / self.bandwidth

    @property
    def samples_a_second(self) -> float:
        """Of one worker: every row takes a step for each new token."""
        return self.rows / (self.step * self.new_tokens)


def lines(plan: Plan) -> list[tuple[str, str, str]]:
    """The arithmetic of one worker: what, how, and how much."""
    names = ("π_θ", "π_t") if len(plan.models) == 2 else ("π_θ and π_t, one model",)
    found = [
        (f"weights of {name}", f"{m.parameters:,} parameters · {plan.number_bytes} bytes",
         f"{m.parameters * plan.number_bytes / GB:.4g} GB")
        for name, m in zip(names, plan.models, strict=True)
    ]  # fmt: skip
    cached = " + ".join(f"2 · {s.layers} layers · {s.heads} heads · {s.head_size}" for s in plan.sides)
    vocabularies = " + ".join(f"{s.vocab_size:,}" for s in plan.sides)
    length = plan.prompt_tokens + plan.new_tokens
    held = f"{plan.gpus} · {USABLE:g} · {plan.memory / GB:g} GB"
    row = f"{plan.row / GB:.4g} GB"
    rows = ("rows at once", f"({held} − {plan.weights / GB:.4g} GB) / {row}", f"{plan.fit}")
    if plan.asked_rows:
        rows = ("rows at once", f"as asked for; {plan.fit} fit", f"{plan.rows}")
    found += [
        ("KV caches of a token", f"({cached}) · {plan.number_bytes} bytes", f"{plan.cache_a_token:,} bytes"),
        ("logits of a row", f"({vocabularies}) · {plan.number_bytes} bytes", f"{plan.logits:,} bytes"),
        ("a row", f"{length} tokens · {plan.cache_a_token:,} bytes + {plan.logits:,} bytes", row),
        ("GPUs", f"({plan.weights / GB:.4g} GB + {row}) / ({USABLE:g} · {plan.memory / GB:g} GB), rounded up",
         f"{plan.gpus}"),
        rows,
    ]  # fmt: skip
    if plan.measured_step:
        found.append(("a step", "measured, as you say", f"{plan.step * 1e3:.4g} ms"))
    else:
        live = f"{plan.live_tokens:g} tokens · {plan.cache_a_token:,} bytes + {plan.logits:,} bytes"
        found += [
            ("read in a step", f"{plan.weights / GB:.4g} GB + {plan.rows} rows · ({live})", f"{plan.read / GB:.4g} GB"),
            (
                "a step, at least",
                f"{plan.read / GB:.4g} GB / {plan.bandwidth / GB:g} GB/s",
                f"{plan.step * 1e3:.4g} ms",
            ),
        ]
    most = "" if plan.measured_step else ", at most"
    found.append(
        (f"samples a second{most}", f"{plan.rows} rows / ({plan.new_tokens} tokens · {plan.step * 1e3:.4g} ms)",
         f"{plan.samples_a_second:.4g}")
    )  # fmt: skip
    return found


def show(plan: Plan, fleets: set[int], samples: int, console: Console) -> None:
    """One worker, and as many as there are GPUs for."""
    table = Table("", "how", "one worker", title="one worker, with a pair of its own", title_justify="left")
    table.columns[-1].justify = "right"
    for line in lines(plan):
        table.add_row(*line)
    console.print(table)
    most = "" if plan.measured_step else ", at most"
    title = f"workers · {plan.samples_a_second:.4g} samples a second{most}"
    table = Table(title=title, title_justify="left")
    for column in ("GPUs", "workers", "samples/s", "tokens/s", f"{samples:,} samples"):
        table.add_column(column, justify="right")
    for gpus in sorted(fleets):
        workers = gpus // plan.gpus
        rate = workers * plan.samples_a_second
        hours = f"{samples / rate / 3600:.3g} hours" if rate else "too few GPUs"
        table.add_row(
            f"{gpus:,}",
            f"{workers:,}",
            f"{rate:,.4g}" if rate < 1e4 else f"{rate:,.0f}",
            f"{rate * plan.new_tokens:,.0f}",
            hours,
        )
    console.print(table)
    if not plan.measured_step:
        console.print(
            "An estimate by the data sheet, not a measurement, and a bound: no run is faster. "
            "`pytest bench/ --benchmark --pair` measures a step on your machine, for --step-ms."
        )


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
    parser.add_argument("--gpu-memory", type=positive, default=80.0, help="GB of a GPU, by its data sheet")
    parser.add_argument(
        "--bandwidth", type=positive, default=3350.0, help="GB/s of its memory, by its data sheet (that of an H100 SXM)"
    )
    parser.add_argument("--bytes", type=COUNT, default=2, help="of a number: 2 for bfloat16, 4 for float32")
    parser.add_argument("--prompt-tokens", type=COUNT, default=512, help="of a prompt")
    parser.add_argument("--new-tokens", type=COUNT, default=512, help="of a sample")
    parser.add_argument("--batch-size", type=COUNT, help="rows of a worker (default: as many as fit)")
    parser.add_argument("--step-ms", type=positive, help="a decoding step that was measured, with --batch-size rows")
    parser.add_argument("--num-samples", type=COUNT, default=1_000_000, help="a data set to say the hours of")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the plan; 0, or 1 with one line on stderr."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.step_ms and not args.batch_size:
        parser.error("--step-ms needs the --batch-size that it was measured with")
    try:
        models = tuple(Size.of(name) for name in dict.fromkeys((args.model_theta, args.model_t)))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    plan = Plan(
        models, args.bytes, args.gpu_memory * GB, args.bandwidth * GB, args.prompt_tokens, args.new_tokens,
        args.batch_size, args.step_ms and args.step_ms / 1e3,
    )  # fmt: skip
    if plan.rows > plan.fit:
        print(
            f"{parser.prog}: error: --batch-size {plan.rows}: {plan.gpus} GPUs hold a pair and {plan.fit} rows",
            file=sys.stderr,
        )
        return 1
    show(plan, {*FLEETS, args.gpus}, args.num_samples, Console(soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
