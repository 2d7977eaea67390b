"""Options that several commands have, and what of them can be refused before anything is loaded."""

import argparse
import importlib.util
import math
from dataclasses import fields
from datetime import datetime
from pathlib import Path

from qstar.adapter_names import ADAPTER_CONFIG, base_of
from qstar.backends import BACKENDS
from qstar.conversation import HINT_TEMPLATE
from qstar.demo import THETA, T
from qstar.run.command import Parser, json_object, number
from qstar_kernels.types import METHODS, RULE, SAMPLING, SETTINGS, Settings, check_read

FORMATS = {"jsonl": ".jsonl", "openai-batch": ".jsonl", "parquet": ".parquet", "verl": ".parquet"}
DIAGNOSTICS_FORMATS = ("jsonl", "parquet")
BLOCK_BATCHES = 16  # a block's length in batches: a longer one drains its last batch less often, a resume repeats more
# Of an installed package, or of a checkout
GUIDE = next(
    (p for above in Path(__file__).parents[1:3] if (p := above / "docs" / "guide.md").is_file()), "docs/guide.md"
)
# The names of the settings among a command line's
DEST = {name: "alpha_method" if name == "method" else name for name in SETTINGS}
# How a run ends that does not end by itself (`guarded`)
RESUMED = {
    "memory": "; start again with a smaller --batch-size, what is on disk is kept",
    "interrupted": "; start the same command again to go on",
}
COUNT = number(int, 1, "a whole number of at least 1")
SHARE = number(float, 0, "a number of at least 0")
NUMBERS = {int: number(int, -math.inf, "a whole number"), float: number(float, -math.inf, "a number")}


def add_model_names(parser: Parser):
    group = parser.add_argument_group("models")
    group.add_argument("--model-theta", help="π_θ, the policy: hub name or folder (default: the demo pair's)")
    group.add_argument("--model-t", help="π_t, the target; the same name as --model-theta shares the weights")
    for side in ("theta", "t"):
        group.add_argument(
            f"--adapter-{side}", help=f"adapter on --model-{side}: folder or hub name (pip install 'qstar[peft]')"
        )
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
                type=NUMBERS.get(setting.type),
                default=setting.default,
                choices=METHODS if setting.name == "method" else None,
                help=setting.metadata["help"] + (f": {', '.join(METHODS)}" if setting.name == "method" else ""),
            )
    for tokens, what in (
        ("first-token", "draw the first token from π_t"),
        ("special-tokens", "give special tokens π_t's probability"),
    ):
        group.add_argument(f"--force-t-{tokens}", f"--force-target-for-{tokens}", action="store_true", help=what)


def add_output(parser: Parser):
    group = parser.add_argument_group("data out")
    group.add_argument(
        "--output", help="file to write; an interrupted run goes on where it was (default: a new one in qstar-out/)"
    )
    return group


def check_models(args: argparse.Namespace) -> None:
    """Both models are named, or neither: then they are the demo pair's. An adapter's name becomes that of its base.

    Raises:
        ValueError: one alone is named, what is named is not there, or peft is not.
    """
    if (args.model_theta is None) != (args.model_t is None):
        missing = "--model-t" if args.model_t is None else "--model-theta"
        raise ValueError(f"{missing} is missing; for one model with two prompts give its name to both")
    if args.model_theta is None:
        for side in ("theta", "t"):
            if getattr(args, f"adapter_{side}") is not None:
                raise ValueError(f"--adapter-{side} needs --model-theta and --model-t")
        args.model_theta, args.model_t = str(THETA), str(T)
    for side in ("theta", "t"):
        check_side(args, side)


def check_side(args: argparse.Namespace, side: str) -> None:
    """A side's model and adapter are there, the latter as `adapter_theta` or `adapter_t` however it was named."""
    model, adapter = getattr(args, f"model_{side}"), getattr(args, f"adapter_{side}")
    check_folder(f"model-{side}", model, ("config.json", ADAPTER_CONFIG))
    if (base := base_of(model)) is not None:
        if adapter is not None:
            raise ValueError(f"--model-{side} {model} is an adapter itself; give the base of both")
        adapter = model
        setattr(args, f"model_{side}", base)
        setattr(args, f"adapter_{side}", adapter)
        check_folder(f"model-{side}", base)
    elif adapter is not None:
        check_folder(f"adapter-{side}", adapter, (ADAPTER_CONFIG,))
    if adapter is not None and importlib.util.find_spec("peft") is None:
        raise ValueError(f"--adapter-{side} needs peft: pip install 'qstar[peft]'")


def check_run(args: argparse.Namespace, given: set[str]) -> None:
    """What a run can be refused for before anything is loaded; its output gets a name where it has none.

    Args:
        given: the options that were said (`Parser.given`).

    Raises:
        ValueError: with one line.
    """
    check_models(args)
    BACKENDS[args.backend].refuse(args)
    settings_of(args)
    check_unused(args, given)
    if args.device is not None and args.device_map is not None:
        raise ValueError("--device and --device-map exclude each other")
    if args.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--load-in-4bit needs bitsandbytes: pip install 'qstar[4bit]'")
    check_output(args)


def check_unused(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse what was said and would be ignored. Raises ValueError."""
    said = vars(args)
    check_read((name for name, dest in DEST.items() if dest in given), args.alpha_method, option)
    on_ray = ("--engine ray", said.get("engine") == "ray")
    goes_with = {
        "t_hint_template": ("--t-hint-field", args.t_hint_field),
        "draft": ("--speculate", said.get("speculate")),
        "diagnostics_format": ("--save-diagnostics", said.get("save_diagnostics")),
        "dataset_split": ("--dataset", args.dataset),
        "dataset_config": ("--dataset", args.dataset),
        **dict.fromkeys(("num_workers", "gpus_per_worker", "ray_address"), on_ray),
    }
    for name, (other, is_there) in goes_with.items():
        if name in given and not is_there:
            raise ValueError(f"{option(name)} goes with {other}")


def check_output(args: argparse.Namespace) -> None:
    """The output can be what it is called; it gets a name where it has none. Raises ValueError."""
    on_ray, output_format = getattr(args, "engine", None) == "ray", getattr(args, "output_format", "jsonl")
    suffix = "" if on_ray else FORMATS[output_format]
    args.output = args.output or f"qstar-out/{datetime.now():%Y%m%d-%H%M%S}{suffix}"
    path = Path(args.output)
    if on_ray and path.is_file():
        raise ValueError(f"--output {path} is a file; --engine ray writes parts into a folder")
    if not on_ray and (path.is_dir() or "://" in args.output):
        what = "an URL" if "://" in args.output else "a folder"
        parts = ", or write parts with --engine ray" if hasattr(args, "engine") else ""
        raise ValueError(f"--output {args.output} is {what}; give a file on this machine{parts}")
    if not on_ray:
        check_suffix(path, output_format)


def check_suffix(path: Path, output_format: str) -> None:
    """The name of a file is not that of another format, or of what stands beside an output. Raises ValueError."""
    if path.suffix in FORMATS.values() and path.suffix != FORMATS[output_format]:
        raise ValueError(f"--output {path}: what is written is {output_format}, in a {FORMATS[output_format]} file")
    kind = path.with_suffix("").suffix
    if path.suffix in FORMATS.values() and kind in (".diagnostics", ".journal", ".errors", ".weights"):
        raise ValueError(f"--output {path} is called as the {kind[1:]} of another run are; give another name")


def option(name: str) -> str:
    """On a command line, by its name in a parsed one or among the settings."""
    return f"--{DEST.get(name, name).replace('_', '-')}"


def settings_of(args: argparse.Namespace) -> Settings:
    """The rule that a command line asks for.

    Raises:
        ValueError: a setting is outside its range.
    """
    return Settings(**{name: getattr(args, dest) for name, dest in DEST.items()})


def check_folder(option: str, model: str, files: tuple[str, ...] = ("config.json",)) -> None:
    """A name that must be a folder is one, and a folder has one of these files. Raises ValueError otherwise."""
    folder = Path(model).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or model.startswith((".", "~"))):
        raise ValueError(f"--{option} {folder} does not exist; give a model's folder or a hub name")
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        kind = "an adapter" if files == (ADAPTER_CONFIG,) else "a model"
        raise ValueError(f"--{option} {folder} has no {files[0]}; give {kind}'s folder or a hub name")
