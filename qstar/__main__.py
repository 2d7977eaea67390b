"""`qstar COMMAND`, or `python -m qstar COMMAND`: all commands under one name."""

import argparse
import difflib
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from qstar import __version__
from qstar.run.command import HelpFormatter, guarded
from qstar.run.options import GUIDE

# The modules of the package whose command line is this one's
COMMANDS = {
    "generate": "prompts in, samples from q* on disk",
    "score": "answers in, the numbers that q* gives them on disk",
    "serve": "an OpenAI-compatible server whose model is q*",
    "merge": "one file of the parts that many workers wrote",
    "plan": "what a pair needs of a GPU, and what many GPUs give",
    "analyze": "what the numbers of a run say",
    "report": "one HTML file to look at samples with",
    "experiments": "training on samples of q*, measured",
}
OTHERS = {"env": "what is installed here, for a report of a fault", "completion": "a script that completes options"}
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # shtab's name for them
SHELLS = ("bash", "zsh", "tcsh")
PACKAGES = (
    "torch triton transformers tokenizers datasets accelerate numpy pyarrow jinja2 filelock fsspec rich pyyaml shtab "
    "bitsandbytes vllm ray matplotlib trl peft"
).split()


def module(command: str):
    return import_module(f"qstar.{command}.__main__" if command == "experiments" else f"qstar.{command}")


def make_parser(whole: bool = False) -> argparse.ArgumentParser:
    """The command line up to a command's own; `whole` has those too, which takes all modules."""
    parser = argparse.ArgumentParser("qstar", "qstar COMMAND [options]", formatter_class=HelpFormatter)
    parser.description = f"Sample from q*, half way between two language models. The guide is {GUIDE}"
    parser.add_argument("--version", action="version", version=f"qstar {__version__}", help="print it")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND [options]", prog="qstar")
    for name, about in (COMMANDS | OTHERS).items():
        own = [module(name).make_parser()] if whole and name in COMMANDS else []
        command = commands.add_parser(name, parents=own, help=about, add_help=not own)
        for action in command._actions:
            if whole and action.choices is None and action.nargs != 0 and not hasattr(action.type, "metavar"):
                action.complete = FILES
        if name == "completion":
            command.add_argument("shell", choices=SHELLS)
    return parser


def environment() -> str:
    """Versions and the machine, and nothing that tells whose it is."""
    import torch

    from qstar_kernels.cpu.launch import library

    lines = [f"qstar {__version__}", f"Python {platform.python_version()}, {platform.platform()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"GPUs: {', '.join(gpus) or 'none'}")
    lines.append(f"CPU: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    lines.append(f"kernels on the CPU: {'compiled C' if library() else 'the reference: no compiler was found'}")
    return "\n".join(lines)


def completion(shell: str) -> str:
    """The script that a shell reads to complete commands, options and files."""
    import shtab

    return shtab.complete(make_parser(whole=True), shell)


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status, 2 for one that is not there."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in COMMANDS:
        return module(name).main(rest)
    if not name.startswith("-") and name not in OTHERS:
        close = difflib.get_close_matches(name, COMMANDS | OTHERS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"qstar: error: there is no command {name}{hint} (see --help)", file=sys.stderr)
        return 2
    args = make_parser().parse_args([name, *rest])

    def work() -> int:
        print(completion(args.shell) if name == "completion" else environment())
        return 0

    return guarded(f"qstar {name}", work)


if __name__ == "__main__":
    sys.exit(main())
