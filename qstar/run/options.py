"""The command lines of `qstar.generate`, `qstar.score` and `qstar.serve`, checked before any model is loaded."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from qstar.data.answers import DatasetAnswers, RunAnswers, is_run
from qstar.data.files import title_of
from qstar.data.prompts import PromptSource, load_prompts
from qstar.demo import PROMPTS, THETA, T
from qstar.prompting import HINT_TEMPLATE, PromptError, PromptFormat
from qstar.rule import FORCED
from qstar.run.checkpoints import fingerprint, revision
from qstar.run.output import FORMATS, Output, OutputError
from qstar.run.parts import Parts
from qstar.run.records import RecordError, RunFiles
from qstar.vllm import DUAL_PROMPTS
from qstar_kernels.types import METHODS, RULE, SAMPLING, SETTINGS, Settings


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


def failed(prog: str, error: object) -> int:
    """Say in one line on stderr why a command has failed; its exit status."""
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one and the text does not say it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, []) and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


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


# The names of the settings among a command line's
DEST = {name: "alpha_method" if name == "method" else name for name in SETTINGS}
COUNT = number(int, 1, "a whole number of at least 1")


def add_model_names(parser: Parser):
    group = parser.add_argument_group("models")
    group.add_argument("--model-theta", help="π_θ, the policy: hub name or folder (default: the demo pair's)")
    group.add_argument("--model-t", help="π_t, the target; the same name as --model-theta shares the weights")
    return group


def add_models(parser: Parser) -> None:
    group = add_model_names(parser)
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


def add_data(parser: Parser):
    group = parser.add_argument_group("data in")
    group.add_argument(
        "--dataset",
        nargs="+",
        metavar="DATA",
        help="files (JSON, JSONL, CSV, TSV or text, packed or not; Parquet, Arrow), folders, patterns or hub names, "
        "one after another (default: the demo's prompts)",
    )
    group.add_argument("--dataset-split", help="split of a hub dataset, or of one that save_to_disk wrote")
    group.add_argument("--dataset-config", help="configuration of a hub dataset")
    group.add_argument("--prompt-field", help="column that holds the prompt, where it is not recognised")
    group.add_argument("--num-samples", type=COUNT, help="number of prompts (default: all)")
    group.add_argument(
        "--use-request-parameters",
        action="store_true",
        default=None,  # as in a run that an earlier version began
        help="sample each OpenAI batch request with its own temperature, max_tokens, n, seed, stop, …",
    )
    return group


def add_prompts(parser: Parser) -> None:
    group = parser.add_argument_group("prompts")
    for side in ("theta", "t"):
        group.add_argument(f"--{side}-chat-template", default="auto", help=f"for {side}: auto, none, or a Jinja file")
        group.add_argument(f"--{side}-system-prompt", help=f"system prompt that {side} sees")
        group.add_argument(
            f"--{side}-template-kwargs",
            type=json_object,
            metavar="JSON",
            help=f'variables for the chat template of {side}, e.g. {{"enable_thinking": false}}',
        )
    group.add_argument("--t-hint-field", help="column whose text only π_t sees, with the last user message")
    group.add_argument("--t-hint-template", default=HINT_TEMPLATE, help="how the hint is added")
    group.add_argument(
        "--continue-final-message",
        action="store_true",
        default=None,  # as in a run that an earlier version began
        help="an assistant's turn at the end of a conversation is the beginning of the answer",
    )


def add_rule(parser: Parser) -> None:
    """α, temperature, truncation and what is forced: everything that says which q* it is."""
    for title in (RULE, SAMPLING):
        group = parser.add_argument_group(title)
        for setting in (f for f in fields(Settings) if f.metadata["group"] == title):
            group.add_argument(
                f"--{DEST[setting.name].replace('_', '-')}",
                type=setting.type,
                default=setting.default,
                choices=METHODS if setting.name == "method" else None,
                help=setting.metadata["help"],
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


def add_output(parser: Parser):
    group = parser.add_argument_group("data out")
    group.add_argument(
        "--output", help="file to write; an interrupted run goes on where it was (default: a new one in qstar-out/)"
    )
    return group


def json_object(value: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(f"{value!r} must be a JSON object")
    return parsed


def make_parser() -> Parser:
    """The command line of `qstar.generate`, in groups."""
    parser = Parser(
        prog="python -m qstar.generate",
        usage="%(prog)s [options]",
        description="Sample from q* ∝ π_θ^α · π_t^(1−α) between two language models. Without arguments: the demo pair "
        "on its bundled prompts. Every option is explained in docs/guide.md.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_models(parser)
    group = add_data(parser)
    group.add_argument("--samples-per-prompt", type=COUNT, default=1, help="samples of each prompt")
    add_prompts(parser)
    add_rule(parser)

    group = parser.add_argument_group("decoding")
    group.add_argument("--seed", type=int, default=0, help="seed of the run; each sample's own follows from it")
    group.add_argument("--max-new-tokens", type=COUNT, default=256, help="token limit of a sample")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="text, or a special token, that ends a sample; may be repeated",
    )
    group.add_argument(
        "--stop-token-ids",
        type=number(int, 0, "a token's id"),
        nargs="+",
        metavar="ID",
        help="tokens that end a sample",
    )
    group.add_argument(
        "--keep-special-tokens",
        action="store_true",
        default=None,
        help="leave special tokens in the text, but for the one that ends it",
    )
    group.add_argument(
        "--backend",
        default="transformers",
        choices=["transformers", "vllm"],
        help="what runs the models: vllm is for thousands of prompts (pip install 'qstar[vllm]')",
    )
    group.add_argument(
        "--batch-size", type=COUNT, help="sequences decoded together (default: 16 with transformers, 256 with vllm)"
    )
    group.add_argument(
        "--vllm-options",
        type=json_object,
        default={},
        metavar="JSON",
        help='arguments of vLLM\'s engine, e.g. {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.8}',
    )
    group.add_argument(
        "--speculate",
        type=lambda value: value if value == "auto" else number(int, 0, "auto or a whole number of at least 0")(value),
        default=0,
        metavar="K",
        help="tokens to draft before both models decide on them in one pass, or auto; the samples stay the same",
    )
    group.add_argument(
        "--draft",
        default="theta",
        help="who drafts: theta, t, or the name or folder of a third model of that vocabulary",
    )

    group = parser.add_argument_group("many workers (pip install 'qstar[ray]')")
    group.add_argument(
        "--engine", default="process", choices=["process", "ray"], help="ray: a Ray cluster writes parts into a folder"
    )
    group.add_argument(
        "--num-workers", type=COUNT, help="pairs at work at once (default: as many as there is room for)"
    )
    group.add_argument(
        "--gpus-per-worker",
        type=number(float, 0, "a number of at least 0"),
        help="of each worker; 0.5 puts two on a GPU",
    )
    group.add_argument(
        "--ray-address",
        help="of the cluster: HOST:PORT, or auto for the one this machine is a node of (default: RAY_ADDRESS, or "
        "this machine by itself)",
    )

    group = add_output(parser)
    group.add_argument("--output-format", default="jsonl", choices=list(FORMATS), help="what to write")
    group.add_argument(
        "--save-diagnostics", action="store_true", help="write x.diagnostics.jsonl: every token's numbers"
    )
    return parser


def make_score_parser() -> Parser:
    """The command line of `qstar.score`, in groups."""
    parser = Parser(
        prog="python -m qstar.score",
        usage="%(prog)s --dataset FILE [options]",
        description="The numbers that q* gives to answers that are there already: α, KL, ESS and the three "
        "log-probabilities of every token, and importance weights. On the output of qstar.generate the options of that "
        "run are the defaults. Every option is explained in docs/guide.md.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_models(parser)
    group = add_data(parser)
    group.add_argument(
        "--response-field", metavar="COLUMN", help="column that holds the answer, where it is not recognised"
    )
    group.add_argument("--no-eos", action="store_true", help="do not end answers of a dataset with the EOS token")
    add_prompts(parser)
    add_rule(parser)
    group = parser.add_argument_group("scoring")
    group.add_argument("--batch-size", type=COUNT, default=16, help="sequences that are scored together")
    group.add_argument(
        "--clip",
        type=number(float, 0, "a number of at least 0"),
        default=10.0,
        help="bound of the clipped importance weights",
    )
    add_output(parser)
    parser.set_defaults(backend="transformers", draft="theta")
    return parser


def make_serve_parser() -> Parser:
    """The command line of `qstar.serve` before vLLM's own options, in groups."""
    parser = Parser(
        prog="python -m qstar.serve",
        usage="%(prog)s [options] [options of vLLM's server]",
        description="An OpenAI-compatible server whose model is q* of a pair, by vLLM (pip install 'qstar[vllm]'). "
        "What a request does not say about q* is as the options here have it. All others are those of `vllm serve`: "
        "--host, --port, --api-key, --tensor-parallel-size, …",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_model_names(parser)
    add_rule(parser)
    return parser


@dataclass(frozen=True)
class Job:
    """A checked command line: everything but the models is loaded."""

    args: argparse.Namespace
    settings: Settings
    format_theta: PromptFormat
    format_t: PromptFormat
    prompts: PromptSource | DatasetAnswers | RunAnswers
    output: Output | Parts

    def of_run(self) -> "Job":
        """The job as its run sees it, once the output is open: templates show the moment of the run's first start."""
        theta, t = (replace(f, moment=self.output.moment) for f in (self.format_theta, self.format_t))
        return replace(self, format_theta=theta, format_t=t)


def prepare(argv: list[str] | None) -> Job:
    """Check the command line of `qstar.generate` and open its dataset; exits with one line if something is wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if any(not stop for stop in args.stop):
        parser.error("--stop must not be empty")
    if args.draft not in ("theta", "t"):
        check_folder(parser, "draft", args.draft)
    if args.engine == "ray" and importlib.util.find_spec("ray") is None:
        parser.error("--engine ray needs Ray: pip install 'qstar[ray]'")
    for name in ("num_workers", "gpus_per_worker", "ray_address"):
        if args.engine != "ray" and getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes with --engine ray")
    if args.backend == "vllm":
        check_vllm(parser, args)
    elif args.vllm_options:
        parser.error("--vllm-options needs --backend vllm")
    if args.batch_size is None:
        args.batch_size = 16 if args.backend == "transformers" else 256
    return make_job(parser, args, lambda: open_prompts(args), args.output_format, args.save_diagnostics)


NEEDS_VLLM = "vLLM is not installed; pip install 'qstar[vllm]'"


def check_vllm(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what an engine of vLLM does not do, and what is left to `--vllm-options`."""
    if importlib.util.find_spec("vllm") is None:
        parser.error(f"--backend vllm: {NEEDS_VLLM}")
    if args.t_hint_field is not None:
        parser.error(f"--t-hint-field: {DUAL_PROMPTS}")
    if args.theta_system_prompt != args.t_system_prompt:
        parser.error(f"--theta-system-prompt and --t-system-prompt differ: {DUAL_PROMPTS}")
    if (args.theta_template_kwargs or {}) != (args.t_template_kwargs or {}):
        parser.error(f"--theta-template-kwargs and --t-template-kwargs differ: {DUAL_PROMPTS}")
    if args.speculate:
        parser.error("--speculate is of --backend transformers; vllm draws without drafts")
    for name in ("device", "device_map", "attn_implementation", "load_in_4bit"):
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} is of --backend transformers; vLLM's are in --vllm-options")


def prepare_serve(argv: list[str] | None) -> tuple[Parser, argparse.Namespace, list[str]]:
    """Check the command line of `qstar.serve` but for what is vLLM's of it, which comes last; exits with one line if
    something is wrong."""
    parser = make_serve_parser()
    args, of_vllm = parser.parse_known_args(argv)
    if importlib.util.find_spec("vllm") is None:
        parser.error(NEEDS_VLLM)
    check_models(parser, args)
    try:
        settings_of(args)
    except ValueError as error:
        parser.error(str(error))
    return parser, args, of_vllm


def prepare_score(argv: list[str] | None) -> Job:
    """Check the command line of `qstar.score` and open its dataset; exits with one line if something is wrong."""
    parser = make_score_parser()
    args = parser.parse_args(argv)
    if args.dataset is None:
        parser.error("--dataset is missing: the file with the prompts and answers to score")
    if len(args.dataset) > 1 or not is_run(args.dataset[0]):
        return make_job(parser, args, lambda: DatasetAnswers(open_prompts(args), args.response_field))
    files = RunFiles(args.dataset[0])
    try:
        next(iter(files))
    except RecordError as error:
        parser.error(f"--dataset: {error}")
    for action in parser._actions:
        name = action.option_strings[0]
        if name in files.settings and action.dest in RUN_DEFAULTS:
            parser.set_defaults(**{action.dest: files.settings[name]})
    args = parser.parse_args(argv)
    for name in ("prompt_field", "response_field", "t_hint_field"):
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')}: the prompts and answers of a run are its own tokens")
    return make_job(parser, args, lambda: RunAnswers(files, args.num_samples, bool(args.use_request_parameters)))


# What scoring takes over from the run that made the samples: who, and which q*
RUN_DEFAULTS = {"model_theta", "model_t", "dtype", "load_in_4bit", "trust_remote_code", "use_request_parameters"}
RUN_DEFAULTS |= {*DEST.values(), *FORCED}


def open_prompts(args: argparse.Namespace) -> PromptSource:
    return load_prompts(
        args.dataset or [str(PROMPTS)],
        args.dataset_split,
        args.dataset_config,
        args.prompt_field,
        args.num_samples,
        bool(args.continue_final_message),
        bool(args.use_request_parameters),
        args.samples_per_prompt if getattr(args, "output_format", None) == "openai-batch" else None,
    )


def data_source(args: argparse.Namespace) -> str:
    """What rows of verl that name no source of their own come from: the files or datasets, without extensions."""
    return "+".join(title_of(name) for name in args.dataset or [str(PROMPTS)])


def make_job(
    parser: Parser,
    args: argparse.Namespace,
    open_data: Callable[[], PromptSource | DatasetAnswers | RunAnswers],
    output_format: str = "jsonl",
    save_diagnostics: bool = True,
) -> Job:
    """What both commands check and open."""
    check_models(parser, args)
    if args.device is not None and args.device_map is not None:
        parser.error("--device and --device-map exclude each other")
    if args.device is not None and args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this machine or this build of torch has no CUDA; try --device cpu")
    if args.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--load-in-4bit needs bitsandbytes: pip install 'qstar[4bit]'")
    on_ray = getattr(args, "engine", None) == "ray"
    suffix = "" if on_ray else FORMATS[output_format]
    args.output = args.output or f"qstar-out/{datetime.now():%Y%m%d-%H%M%S}{suffix}"
    if not on_ray and (Path(args.output).is_dir() or "://" in args.output):
        what = "an URL" if "://" in args.output else "a folder"
        parts = ", or write parts with --engine ray" if hasattr(args, "engine") else ""
        parser.error(f"--output {args.output} is {what}; give a file on this machine{parts}")
    if on_ray and Path(args.output).is_file():
        parser.error(f"--output {args.output} is a file; --engine ray writes parts into a folder")
    try:
        settings = settings_of(args)
        format_theta, format_t = (prompt_format(args, side) for side in ("theta", "t"))
        data = open_data()
    except ValueError as error:
        parser.error(str(error))
    if args.t_hint_field is not None and args.t_hint_field not in data.columns:
        parser.error(f"--t-hint-field {args.t_hint_field!r} is no column; the columns are {', '.join(data.columns)}")
    settings_of_run = run_settings(args, data)
    if on_ray:
        # a part is so many batches long
        output = Parts(
            args.output, output_format, save_diagnostics, settings_of_run | {"--batch-size": args.batch_size}
        )
    else:
        settings_of_run["output file"] = Path(args.output).name
        output = Output(Path(args.output), output_format, save_diagnostics, settings_of_run)
    before = None
    with suppress(OutputError, OSError, ValueError, ImportError):  # said when the output is opened
        before = output.before()
    # the samples of a run are scored by the models that drew them
    drawn = data.files.settings if isinstance(data, RunAnswers) else {}
    try:
        output.settings |= weights_of_run(args, before or drawn)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    args.revision_theta, args.revision_t = (revision(output.settings[f"weights of {side}"]) for side in ("theta", "t"))
    return Job(args, settings, format_theta, format_t, data, output)


def prompt_format(args: argparse.Namespace, side: str) -> PromptFormat:
    """How one side sees prompts.

    Raises:
        ValueError: an option cannot be used.
    """
    of_side = {name: getattr(args, f"{side}_{name}") for name in ("chat_template", "system_prompt")}
    of_side["template_kwargs"] = getattr(args, f"{side}_template_kwargs") or {}
    try:
        return PromptFormat(
            **of_side, hint_template=args.t_hint_template, continue_final_message=bool(args.continue_final_message)
        )
    except PromptError as error:
        raise ValueError(f"--{side}-template-kwargs: {error}") from None


def check_models(parser: Parser, args: argparse.Namespace) -> None:
    """Both models are named, or neither: then they are the demo pair's."""
    if (args.model_theta is None) != (args.model_t is None):
        missing = "--model-t" if args.model_t is None else "--model-theta"
        parser.error(f"{missing} is missing; for one model with two prompts give its name to both")
    if args.model_theta is None:
        args.model_theta, args.model_t = str(THETA), str(T)
    check_folder(parser, "model-theta", args.model_theta)
    check_folder(parser, "model-t", args.model_t)


def settings_of(args: argparse.Namespace) -> Settings:
    """The rule that a command line asks for.

    Raises:
        ValueError: a setting is outside its range.
    """
    return Settings(**{name: getattr(args, dest) for name, dest in DEST.items()})


def check_folder(parser: Parser, option: str, model: str) -> None:
    """A name that must be a folder is one, and a folder holds a model."""
    folder = Path(model).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or model.startswith((".", "~"))):
        parser.error(f"--{option} {folder} does not exist; give a model's folder or a hub name")
    if folder.is_dir() and not (folder / "config.json").is_file():
        parser.error(f"--{option} {folder} has no config.json; give a model's folder or a hub name")


# arguments of vLLM's engine that say where it runs and how much at once
VLLM_PLACEMENT = frozenset(
    "block_size cpu_offload_gb distributed_executor_backend enable_chunked_prefill enable_prefix_caching enforce_eager "
    "gpu_memory_utilization kv_cache_memory_bytes max_num_batched_tokens max_num_seqs num_gpu_blocks_override "
    "tensor_parallel_size".split()
)


def run_settings(args: argparse.Namespace, data: PromptSource | DatasetAnswers | RunAnswers) -> dict[str, Any]:
    """Everything the output depends on, by the names of the command line."""
    # where it runs, how much at once and where it writes is no part of what it writes
    free = {"output", "device", "device_map", "batch_size", "backend", "speculate", "draft", "clip"}
    free |= {"engine", "num_workers", "gpus_per_worker", "ray_address"}
    settings = {f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in free}
    if args.dataset is not None and len(args.dataset) == 1:
        settings["--dataset"] = args.dataset[0]
    if "--vllm-options" in settings:
        settings["--vllm-options"] = {k: v for k, v in args.vllm_options.items() if k not in VLLM_PLACEMENT}
    settings["dataset content"] = data.fingerprint
    for template in ("theta_chat_template", "t_chat_template"):
        path = Path(getattr(args, template))
        if path.is_file():
            settings[f"content of --{template.replace('_', '-')}"] = path.read_text(encoding="utf-8")
    return json.loads(json.dumps(settings))


def weights_of_run(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, str]:
    """The fingerprints of both models, as settings of the run; `before` are those of its first start.

    Models of the hub stay at the commit of the first start. vLLM takes their newest, so that another one is refused.
    """
    names, of_name = {"theta": args.model_theta, "t": args.model_t}, {}
    for side, name in names.items():
        known = str(before.get(f"weights of {side}"))
        of_hub = args.backend == "transformers" and not Path(name).expanduser().is_dir()
        stays = of_hub and before.get(f"--model-{side}") == name and revision(known)
        if name not in of_name:
            of_name[name] = known if stays else fingerprint(name)
    return {f"weights of {side}": of_name[name] for side, name in names.items()}
