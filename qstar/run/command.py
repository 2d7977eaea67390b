"""A command: its parser, which reads configuration files too, and how it ends, whatever happens to it."""

import argparse
import codecs
import difflib
import json
import logging
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from qstar import __version__

LOG = logging.getLogger("qstar")
WIDEST = 120  # columns of help
LONGEST = 60  # characters of what stands for a value
TIMES = {"k": 1_000, "K": 1_000, "M": 1_000_000}
OWN = ("config", "print_config", "quiet", "verbose")  # options that every command has


class HelpFormatter(argparse.HelpFormatter):
    """Shows each default once, and values by what they are: N and X are numbers."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)
        self._width = min(self._width, WIDEST)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said, default = action.help or "", action.default
        if default is None or default is False or default in ([], {}, argparse.SUPPRESS) or "default" in said:
            return said
        text = f"default: {repr(default) if chr(10) in str(default) else default}".replace("%", "%%")
        return f"{said[:-1]}; {text})" if said.endswith(")") else f"{said} ({text})"

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str):
        if action.metavar is None and action.choices and len(",".join(action.choices)) > LONGEST:
            return lambda size: (default_metavar,) * size  # argparse breaks no list of choices: the help has them
        return super()._metavar_formatter(action, default_metavar)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "metavar", action.dest.rpartition("_")[2].upper())


class Parser(argparse.ArgumentParser):
    """That of one of the commands: one line an error, and option names with underscores as well as hyphens.

    Attributes:
        given: the options, by their names in what `parse_args` returns, that the command line has, or a configuration
            with another value than the default.
    """

    def __init__(self, command: str, description: str, usage: str | None = None):
        prog = f"qstar {command}"
        super().__init__(prog, usage, description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.given: set[str] = set()
        self._declared: list[tuple[argparse.Action, Any, bool]] = []
        self.add_argument("--version", action="version", version=f"qstar {__version__}", help="print it")
        self.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="options from a YAML or JSON file, or as a run remembers them (x.run.json); those said here go before",
        )
        self.add_argument("--print-config", action="store_true", help="print all options as such a file, and end")
        self.add_argument("-q", "--quiet", action="store_true", help="print results and errors only")
        self.add_argument(
            "-v", "--verbose", action="store_true", help="what the libraries say, too, and where an error comes from"
        )

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown[0])}")
        return parsed

    def parse_known_args(self, args=None, namespace=None):
        words = [hyphenated(word) for word in (sys.argv[1:] if args is None else args)]
        actions = [action for action in self._actions if action.default is not argparse.SUPPRESS]
        self._declared = [(action, action.default, action.required) for action in actions]
        fixed, self._defaults = self._defaults, {}
        for action in actions:  # what is found then was said
            action.default, action.required = argparse.SUPPRESS, False
        try:
            found, unknown = super().parse_known_args(words, argparse.Namespace())
        finally:
            self._restore()
            self._defaults = fixed
        defaults = {action.dest: action.default for action in actions}
        said = {name: value for name, value in vars(found).items() if name in defaults}
        of_file = self._read(said["config"]) if "config" in said else {}
        self.given = {*said, *(name for name, value in of_file.items() if value != defaults[name])}
        values = self._defaults | defaults | of_file | said
        if values.pop("print_config"):
            print(as_yaml({name: value for name, value in values.items() if name not in OWN}), end="")
            self.exit()
        missing = [action for action in actions if action.required and values[action.dest] is None]
        if missing:
            names = ", ".join(
                action.option_strings[0] if action.option_strings else action.metavar for action in missing
            )
            self.error(f"{names} is missing" if len(missing) == 1 else f"{names} are missing")
        del values["config"]
        if values["verbose"]:
            logging.basicConfig(format="%(name)s: %(message)s")
            LOG.setLevel(logging.DEBUG)
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")
        return argparse.Namespace(**values), unknown

    def _restore(self) -> None:
        """What the options are by default, and which must be there."""
        for action, default, required in self._declared:
            action.default, action.required = default, required
        self._declared = []

    def format_help(self) -> str:
        self._restore()  # asked for in the middle of parsing
        return super().format_help()

    def _read(self, path: Path) -> dict[str, Any]:
        """The options of a configuration file, each as the command line would have it.

        A file whose names begin with `--` is a run's own, which has more than options.
        """
        import yaml

        try:
            found = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"--config {path}: {getattr(error, 'strerror', None) or error}")
        found = found.get("settings", found) if isinstance(found, dict) else {} if found is None else found
        if not isinstance(found, dict):
            self.error(f"--config {path} must have a name and a value for each option, as {self.prog} --print-config")
        of_run = any(str(name).startswith("--") for name in found)
        options = {name.lstrip("-"): action for name, action in self._option_string_actions.items()}
        options |= {action.dest.replace("_", "-"): action for action in self._actions if action.nargs != 0}
        values = {}
        for name, value in found.items():
            action = options.get(str(name).lstrip("-").replace("_", "-"))
            if of_run and not str(name).startswith("--"):
                continue
            if action is None or action.dest in ("help", "version", *OWN):
                self.error(f"--config {path}: there is no option {name}{self._hint(f'--{name}')}")
            if value is not None:
                try:
                    values[action.dest] = self._value(action, value)
                except argparse.ArgumentError as error:
                    self.error(f"--config {path}: {error}")
        return values

    def _value(self, action: argparse.Action, said: Any) -> Any:
        if action.nargs == 0:
            if not isinstance(said, bool):
                raise argparse.ArgumentError(action, f"{said!r} must be true or false")
            return said
        several = action.nargs is not None or isinstance(action, argparse._AppendAction)
        if isinstance(said, list) and not several:
            raise argparse.ArgumentError(action, f"{said!r} must be one value")
        values = []
        for word in said if isinstance(said, list) else [said]:
            values.append(self._get_value(action, word if isinstance(word, str) else json.dumps(word, default=str)))
            self._check_value(action, values[-1])
        return values if several else values[0]

    def _hint(self, option: str) -> str:
        name = hyphenated(option).partition("=")[0]
        close = difflib.get_close_matches(name, [o for o in self._option_string_actions if o.startswith("--")], 1)
        return f"; did you mean {close[0]}?" if close else ""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """What is raised for a wrong command line is said as its error."""
        try:
            yield
        except (ValueError, OSError) as error:
            LOG.debug("", exc_info=error)
            self.error(str(error))


def hyphenated(word: str) -> str:
    """An option's name with hyphens for underscores; its value, and any other word, as it is."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def as_yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(values, default=str)), sort_keys=False, allow_unicode=True, width=1000)


def number(kind: type, low: float, text: str):
    """An argparse type: a number of at least `low`, which may be written as `10k` or `1.5M`."""

    def parse(value: str):
        parsed = None
        with suppress(ValueError):
            if value[-1:] in TIMES:
                exact = round(float(value[:-1]) * TIMES[value[-1]], 6)
                parsed = kind(exact) if kind(exact) == exact else None
            else:
                parsed = kind(value)
        if parsed is None or not parsed >= low:
            raise argparse.ArgumentTypeError(f"{value!r} must be {text}")
        return parsed

    parse.metavar = "N" if kind is int else "X"
    return parse


def json_object(value: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    parsed = None
    with suppress(ValueError):
        parsed = json.loads(value)
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(f"{value!r} must be a JSON object")
    return parsed


def failed(prog: str, error: object) -> int:
    """Say in one line on stderr why a command has failed; its exit status."""
    LOG.debug("", exc_info=sys.exc_info()[0] is not None)
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def guarded(
    prog: str, work: Callable[[], int], memory: str = "", interrupted: str = "", handles_signals: bool = True
) -> int:
    """A command's exit status: what `work` returns, 1 with one line on stderr where it fails for a reason that is not
    this program's fault, 130 where it is interrupted by Ctrl-C or SIGTERM.

    Args:
        memory, interrupted: what to do then, said behind that there is no memory, or that it was interrupted.
        handles_signals: SIGTERM is taken for Ctrl-C; otherwise both are left to `work`, as Python has them. What is
            ignored, as in a shell's background, stays so.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # not a stream of the interpreter's
            stream.reconfigure(errors="qstar.spelt")

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:  # an import may drop what is raised in it, or say that a package is broken
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                os.write(2, f"interrupted{interrupted}\n".encode())
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if handles_signals:
        handlers = dict.fromkeys(handlers, interrupt)
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    heard = [number for number in handlers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handlers[number]) for number in heard}
    try:
        return work()
    except BrokenPipeError:  # whoever reads has seen enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"interrupted{interrupted}", file=sys.stderr)
        return 130
    except Exception as error:
        if is_out_of_memory(error):
            return failed(prog, f"out of memory{memory}")
        # the project's own errors are a line each
        if isinstance(error, ValueError | OSError | ImportError) or type(error).__module__.startswith("qstar."):
            return failed(prog, error)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, the allocator of torch, or a mapping of a file had no memory."""
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    told = any(words in str(error) for words in ("allocate memory", "failed to map segment", "start new thread"))
    return on_device or isinstance(error, MemoryError) or told


PLAIN = {"∝": "~", "·": "*", "−": "-", "–": "-", "…": "...", "«": '"', "»": '"', "‖": "||", "✓": "yes", "✗": "no"}


def spelt(error: UnicodeEncodeError) -> tuple[str, int]:
    """What a stream is given that has no letter for it: Greek ones by their names, and no character is lost."""

    def one(character: str) -> str:
        name = unicodedata.name(character, "")
        other = name.rpartition(" ")[2].lower() if name.startswith("GREEK ") else PLAIN.get(character)
        return other or character.encode("ascii", "backslashreplace").decode()

    return "".join(map(one, error.object[error.start : error.end])), error.end


codecs.register_error("qstar.spelt", spelt)
