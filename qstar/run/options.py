"""Options that several commands have, and the parser that all of them are made with."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME as ADAPTER_CONFIG

from qstar.adapters import base_of
from qstar.demo import THETA, T
from qstar.prompting import HINT_TEMPLATE
from qstar_kernels.types import METHODS, RULE, SAMPLING, SETTINGS, Settings


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one and the text does not say it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, []) and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


class Parser(argparse.ArgumentParser):
    """That of one of the commands: one line an error, and option names with underscores as well as hyphens."""

    def __init__(self, command: str, description: str, usage: str | None = None):
        prog = f"python -m qstar.{command}"
        super().__init__(prog, usage, description, formatter_class=HelpFormatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)

        def hyphenated(arg: str) -> str:
            name, equals, value = arg.partition("=")
            return name.replace("_", "-") + equals + value if arg.startswith("--") else arg

        return super().parse_known_args([hyphenated(a) for a in args], namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """What is raised for a wrong command line is said as its error."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(str(error))


def failed(prog: str, error: object) -> int:
    """Say in one line on stderr why a command has failed; its exit status."""
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def number(kind: type, low: float, text: str):
    """An argparse type: a number of at least `low`."""

    def parse(value: str):
        parsed = None
        with suppress(ValueError):
            parsed = kind(value)
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
                type=setting.type,
                default=setting.default,
                choices=METHODS if setting.name == "method" else None,
                help=setting.metadata["help"],
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


def json_object(value: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    parsed = None
    with suppress(ValueError):
        parsed = json.loads(value)
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(f"{value!r} must be a JSON object")
    return parsed


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
