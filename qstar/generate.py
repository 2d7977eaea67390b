"""`python -m qstar.generate`: prompts in, samples from q* on disk.

Samples are decoded in blocks of a fixed number of consecutive samples, each block from an empty batch. A resumed run
decodes an unfinished block again and writes what is missing of it: the same rows then meet in the same batches, and
every line comes out bit for bit as it would have without the interruption.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qstar.data import DataError, Prompt, PromptSource, load_prompts
from qstar.demo import PROMPTS, THETA, T
from qstar.output import FORMATS, Finished, Output, OutputError, openai_line, sample_line
from qstar.prompting import HINT_TEMPLATE, PromptError, PromptFormat
from qstar_kernels.types import METHODS, Settings

BLOCK_BATCHES = 16  # a block's length in batches: a longer one drains its last batch less often, a resume repeats more
FAR_APART_KL = (
    0.5  # nats a token: above it q* lies where both models find little (docs/guide.md, «When the pair is far apart»)
)
BANDS = {"ESS ratio": (0.9, 1.1), "|ΔKL|": (0.0, 0.05), "α": (0.2, 0.8)}


class Parser(argparse.ArgumentParser):
    """One line an error, and option names with underscores as well as hyphens."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)

        def hyphenated(arg: str) -> str:
            name, equals, value = arg.partition("=")
            return name.replace("_", "-") + equals + value if arg.startswith("--") else arg

        return super().parse_known_args([hyphenated(a) for a in args], namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind: type, low: float, text: str):
    """An argparse type: a number of at least `low`."""

    def parse(value: str):
        try:
            parsed = kind(value)
        except ValueError:
            parsed = None
        if parsed is None or not parsed >= low:
            raise argparse.ArgumentTypeError(f"{value!r} must be {text}")
        return parsed

    return parse


def make_parser() -> Parser:
    """The command line, in groups."""
    parser = Parser(
        prog="python -m qstar.generate",
        description="Sample from q* ∝ π_θ^α · π_t^(1−α) between two language models. Without arguments: the demo pair "
        "on its bundled prompts. Every option is explained in docs/guide.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count = number(int, 1, "a whole number of at least 1")

    group = parser.add_argument_group("models")
    group.add_argument("--model-theta", help="π_θ, the policy: hub name or folder (default: the demo pair's)")
    group.add_argument("--model-t", help="π_t, the target; the same name as --model-theta shares the weights")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: the checkpoint's, float32 on a CPU",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    group.add_argument("--device-map", help="placement over several devices, e.g. auto")
    group.add_argument("--attn-implementation", help="sdpa, eager, flash_attention_2, …")
    group.add_argument("--load-in-4bit", action="store_true", help="quantise both models (pip install 'qstar[4bit]')")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")

    group = parser.add_argument_group("data in")
    group.add_argument(
        "--dataset", help="hub name, or JSON, JSONL, Parquet, CSV or text file (default: the demo's prompts)"
    )
    group.add_argument("--dataset-split", help="split of a hub dataset")
    group.add_argument("--dataset-config", help="configuration of a hub dataset")
    group.add_argument("--prompt-field", help="column that holds the prompt, where it is not recognised")
    group.add_argument("--num-samples", type=count, help="number of prompts (default: all)")
    group.add_argument("--samples-per-prompt", type=count, default=1, help="samples of each prompt")

    group = parser.add_argument_group("prompts")
    for side in ("theta", "t"):
        group.add_argument(f"--{side}-chat-template", default="auto", help=f"for {side}: auto, none, or a Jinja file")
        group.add_argument(f"--{side}-system-prompt", help=f"system prompt that {side} sees")
    group.add_argument("--t-hint-field", help="column whose text only π_t sees, with the last user message")
    group.add_argument("--t-hint-template", default=HINT_TEMPLATE, help="how the hint is added")

    defaults = Settings()
    group = parser.add_argument_group("rule for α (the weight of π_θ)")
    group.add_argument(
        "--alpha-method", default=defaults.method, choices=METHODS, help="condition that α meets at every token"
    )
    group.add_argument("--alpha", type=float, default=defaults.alpha, help="α of method fixed")
    group.add_argument("--alpha-min", type=float, default=defaults.alpha_min, help="lower clamp")
    group.add_argument("--alpha-max", type=float, default=defaults.alpha_max, help="upper clamp")
    group.add_argument("--tol", type=float, default=defaults.tol, help="bound on |KL(q*‖π_θ) − KL(q*‖π_t)| in nats")

    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        help="of both models, before they are mixed; 0 is greedy",
    )
    group.add_argument(
        "--top-k", type=int, default=defaults.top_k, help="keep the k most probable tokens of q* (0: all)"
    )
    group.add_argument(
        "--top-p", type=float, default=defaults.top_p, help="keep the most probable tokens with this mass of q*"
    )
    group.add_argument(
        "--min-p", type=float, default=defaults.min_p, help="drop tokens below this share of q*'s most probable one"
    )
    group.add_argument(
        "--target-top-k", type=int, default=defaults.target_top_k, help="restrict q* to π_t's top k (0: all)"
    )
    group.add_argument(
        "--target-top-p", type=float, default=defaults.target_top_p, help="restrict q* to π_t's top-p set"
    )
    group.add_argument(
        "--force-t-first-token",
        "--force-target-for-first-token",
        action="store_true",
        help="draw the first token from π_t",
    )
    group.add_argument(
        "--force-t-special-tokens",
        "--force-target-for-special-tokens",
        action="store_true",
        help="give special tokens π_t's probability",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the run; each sample's own follows from it")

    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=count, default=256, help="token limit of a sample")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends a sample; may be repeated"
    )
    group.add_argument("--batch-size", type=count, default=16, help="sequences decoded together")

    group = parser.add_argument_group("data out")
    group.add_argument(
        "--output",
        type=Path,
        help="file to write; an interrupted run goes on where it was (default: a new file in qstar-out/)",
    )
    group.add_argument("--output-format", default="jsonl", choices=list(FORMATS), help="what to write")
    group.add_argument(
        "--save-diagnostics", action="store_true", help="write x.diagnostics.jsonl: every token's numbers"
    )
    return parser


@dataclass(frozen=True)
class Job:
    """A checked command line: everything but the models is loaded."""

    args: argparse.Namespace
    settings: Settings
    format_theta: PromptFormat
    format_t: PromptFormat
    prompts: PromptSource
    output: Output


def prepare(argv: list[str] | None) -> Job:
    """Check the command line and open the dataset, before any model is loaded; exits with one line if it is wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.model_theta is None) != (args.model_t is None):
        missing = "--model-t" if args.model_t is None else "--model-theta"
        parser.error(f"{missing} is missing; for one model with two prompts give its name to both")
    if args.device is not None and args.device_map is not None:
        parser.error("--device and --device-map exclude each other")
    if any(not stop for stop in args.stop):
        parser.error("--stop must not be empty")
    if args.model_theta is None:
        args.model_theta, args.model_t = str(THETA), str(T)
    if args.output is None:
        args.output = Path("qstar-out") / f"{datetime.now():%Y%m%d-%H%M%S}{FORMATS[args.output_format]}"
    if args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; give a file")
    for name in ("model_theta", "model_t"):
        folder = Path(getattr(args, name)).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file():
            parser.error(f"--{name.replace('_', '-')} {folder} has no config.json; give a model's folder or a hub name")
    try:
        settings = Settings(
            method=args.alpha_method,
            **{
                name: getattr(args, name)
                for name in (
                    [
                        "alpha",
                        "alpha_min",
                        "alpha_max",
                        "temperature",
                        "top_k",
                        "top_p",
                        "min_p",
                        "target_top_k",
                        "target_top_p",
                        "tol",
                    ]
                )
            },
        )
        format_theta = PromptFormat(args.theta_chat_template, args.theta_system_prompt)
        format_t = PromptFormat(args.t_chat_template, args.t_system_prompt, args.t_hint_template)
        prompts = load_prompts(
            args.dataset or str(PROMPTS), args.dataset_split, args.dataset_config, args.prompt_field, args.num_samples
        )
    except (ValueError, DataError) as error:
        parser.error(str(error))
    if args.t_hint_field is not None and args.t_hint_field not in prompts.columns:
        parser.error(f"--t-hint-field {args.t_hint_field!r} is no column; the columns are {', '.join(prompts.columns)}")
    output = Output(args.output, args.output_format, args.save_diagnostics, run_settings(args, prompts))
    return Job(args, settings, format_theta, format_t, prompts, output)


def weights_fingerprint(name: str) -> str:
    """What tells one checkpoint from another in the same folder; the name itself for a hub model."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix in (".safetensors", ".bin", ".json", ".jinja")
    ):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:  # the ends of a large file are enough to see that it was trained on
            digest.update(file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def run_settings(args: argparse.Namespace, prompts: PromptSource) -> dict[str, Any]:
    """Everything the output depends on, by the names of the command line."""
    free = {"output", "device", "device_map"}  # where it runs and where it writes is no part of what it writes
    settings = {f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in free}
    settings["output file"] = args.output.name
    settings["dataset content"] = prompts.fingerprint
    settings["weights of theta"] = weights_fingerprint(args.model_theta)
    settings["weights of t"] = weights_fingerprint(args.model_t)
    for template in ("theta_chat_template", "t_chat_template"):
        path = Path(getattr(args, template))
        if path.is_file():
            settings[f"content of --{template.replace('_', '-')}"] = path.read_text(encoding="utf-8")
    return json.loads(json.dumps(settings))


@dataclass
class Summary:
    """Running figures over the tokens of a run."""

    samples: int = 0
    tokens: int = 0
    alpha: float = 0.0
    kl: float = 0.0
    gap: float = 0.0
    ratio: float = 0.0
    ratio_tokens: int = 0
    inside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BANDS, 0))

    def add(self, done: Finished) -> None:
        fields = done.sample.fields
        self.samples += 1
        self.tokens += len(done.sample.token_ids)
        for alpha, kl, kl_t, ess_theta, ess_t in zip(
            *(fields[name] for name in ("alpha", "kl_theta", "kl_t", "ess_theta", "ess_t")), strict=True
        ):
            self.alpha += alpha
            self.kl += max(kl, kl_t)
            self.gap += abs(kl - kl_t)
            seen = {"|ΔKL|": abs(kl - kl_t), "α": alpha}
            if ess_theta > 0 and ess_t > 0:
                seen["ESS ratio"] = ess_theta / ess_t
                self.ratio += ess_theta / ess_t
                self.ratio_tokens += 1
            for name, value in seen.items():
                low, high = BANDS[name]
                self.inside[name] += low <= value <= high

    @property
    def mean_kl(self) -> float:
        return self.kl / max(1, self.tokens)

    def table(self) -> Table:
        table = Table(title=f"q* over {self.tokens} tokens", title_justify="left")
        for column in ("", "mean a token", "band", "tokens inside"):
            table.add_column(column, justify="right" if column else "left")
        n = max(1, self.tokens)
        means = {"ESS ratio": self.ratio / max(1, self.ratio_tokens), "|ΔKL|": self.gap / n, "α": self.alpha / n}
        for name, mean in means.items():
            low, high = BANDS[name]
            band = f"< {high:g}" if low == 0 else f"{low:g} to {high:g}"
            table.add_row(name, f"{mean:.4g}", band, f"{self.inside[name] / n:.1%}")
        table.add_row("max KL (nats)", f"{self.mean_kl:.4g}", f"< {FAR_APART_KL:g}", "")
        return table


def blocks(prompts: Iterable[Prompt], samples_per_prompt: int, size: int) -> Iterator[list[tuple[Prompt, int]]]:
    """Cut the run's samples, prompt by prompt, into lists of `size`."""
    pairs = ((prompt, j) for prompt in prompts for j in range(samples_per_prompt))
    while block := list(islice(pairs, size)):
        yield block


class Run:
    """One run of the command over a loaded pair."""

    def __init__(self, job: Job, pair, console: Console):
        self.job, self.pair, self.console, self.output = job, pair, console, job.output
        from qstar.decode import DecodeOptions

        args = job.args
        self.decoder = pair.decoder(
            DecodeOptions(
                job.settings, args.batch_size, tuple(args.stop), args.force_t_first_token, args.force_t_special_tokens
            )
        )
        self.summary, self.shown, self.failed_prompts = Summary(), [], set()

    def finished(self, block: list[tuple[Prompt, int]]) -> Iterator[Finished]:
        """Decode a block; a conversation with later turns goes round again until the last one is answered."""
        from qstar.pair import sample_seed

        turn, pending = 0, [(prompt, j, prompt.messages) for prompt, j in block]
        while pending:
            requests, conversations = [], {}
            for prompt, j, messages in pending:
                if prompt.error is not None:
                    self.fail(prompt, None, prompt.error)
                    continue
                try:
                    request = self.pair.request(
                        (prompt.index, j),
                        messages,
                        sample_seed(self.job.args.seed, prompt.index, j, turn),
                        self.job.args.max_new_tokens,
                        self.job.format_theta,
                        self.job.format_t,
                        self.hint(prompt),
                    )
                except PromptError as error:
                    self.fail(prompt, None if turn == 0 else j, str(error))
                    continue
                conversations[request.key] = prompt, j, messages
                requests.append(request)
            pending = []
            for sample in self.decoder.run(requests):
                prompt, j, messages = conversations[sample.request.key]
                messages = [*messages, {"role": "assistant", "content": sample.text}]
                if sample.error is not None:
                    self.fail(prompt, j, sample.error)
                elif turn < len(prompt.later_turns):
                    pending.append((prompt, j, [*messages, {"role": "user", "content": prompt.later_turns[turn]}]))
                else:
                    yield Finished(prompt, j, messages, sample)
            turn += 1

    def hint(self, prompt: Prompt) -> str | None:
        name = self.job.args.t_hint_field
        if name is None:
            return None
        hint = prompt.metadata.get(name)
        if hint is None or hint == "":
            raise PromptError(f"the hint column {name!r} is empty")
        return hint if isinstance(hint, str) else json.dumps(hint, ensure_ascii=False)

    def fail(self, prompt: Prompt, sample_index: int | None, error: str) -> None:
        if sample_index is None:
            if prompt.index in self.failed_prompts:
                return
            self.failed_prompts.add(prompt.index)
        self.output.write_error(prompt, sample_index, error)

    def line(self, done: Finished) -> dict[str, Any]:
        if self.job.args.output_format != "openai-batch":
            return sample_line(done)
        model = f"qstar({self.job.args.model_theta},{self.job.args.model_t})"
        return openai_line(done, self.pair.tokenizer_theta, model, self.job.args.samples_per_prompt == 1)

    def run(self) -> None:
        args = self.job.args
        start, before = time.time(), len(self.output.done)
        if before:
            self.console.print(f"resuming: {before} samples are on disk")
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(TextColumn("samples"), *columns, console=self.console) as progress:
            total = args.num_samples * args.samples_per_prompt if args.num_samples else None
            task = progress.add_task("", total=total, completed=before, figures="")
            for block in blocks(self.job.prompts, args.samples_per_prompt, BLOCK_BATCHES * args.batch_size):
                if all((prompt.index, j) in self.output.done for prompt, j in block):
                    continue
                for done in self.finished(block):
                    if done.key not in self.output.done:
                        self.output.write([done], [self.line(done)])
                        progress.advance(task)
                    self.summary.add(done)
                    if len(self.shown) < 3:
                        self.shown.append(done)
                    s, seconds = self.summary, time.time() - start
                    figures = f"{s.tokens / seconds:.0f} tokens/s  α {s.alpha / s.tokens:.3f}  KL {s.mean_kl:.4f}"
                    progress.update(task, figures=figures)
            progress.update(task, total=len(self.output.done))
        if self.output.done:
            self.output.finish(Path(args.dataset or PROMPTS).stem)
        self.report(time.time() - start, before)

    def report(self, seconds: float, before: int) -> None:
        say, summary, output = self.console.print, self.summary, self.output
        if summary.tokens:
            say(summary.table())
            if summary.mean_kl > FAR_APART_KL:
                say(
                    f"[bold]Warning:[/] the pair is far apart ({summary.mean_kl:.2f} nats a token): q* spreads onto "
                    "tokens that both models find unlikely. See «When the pair is far apart» in docs/guide.md."
                )
            for done in self.shown:
                say(f"\n[bold]{done.id}[/]", highlight=False)
                say(
                    f"user: {done.messages[-2]['content']}\nq*: {done.messages[-1]['content']}",
                    markup=False,
                    highlight=False,
                )
        new = len(output.done) - before
        say(f"\n{new} samples in {seconds:.1f} s, {len(output.done)} in all: {output.path}")
        if output.diagnostics_file is not None:
            say(f"diagnostics: {output.diagnostics_file}")
        if output.errors:
            say(f"[bold]{output.errors} failed[/]; reasons in {output.errors_file}, tried again at the next start")


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if every sample is on disk, 1 if something failed, 2 for a wrong command line."""
    console = Console(stderr=False, soft_wrap=True)
    job = prepare(argv)
    try:
        with job.output:
            console.print(f"prompts: {job.prompts.description}", markup=False, highlight=False)
            from transformers.utils import logging

            from qstar.pair import Pair

            logging.disable_progress_bar()
            args = job.args
            pair = Pair.from_pretrained(
                args.model_theta,
                args.model_t,
                dtype=args.dtype,
                device=args.device,
                device_map=args.device_map,
                attn_implementation=args.attn_implementation,
                load_in_4bit=args.load_in_4bit,
                trust_remote_code=args.trust_remote_code,
            )
            Run(job, pair, console).run()
            return 1 if job.output.errors else 0
    except (OutputError, DataError, ValueError, OSError) as error:
        print(f"python -m qstar.generate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
