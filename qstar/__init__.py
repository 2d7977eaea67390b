"""q* sampling from pairs of Hugging Face language models."""

import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Threads that spin while they wait make a busy machine several times slower; read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from qstar.pair import GenerateOutput, Pair
    from qstar.prompting import PromptError, PromptFormat
    from qstar.sample import Sample

__version__ = "0.1.0"
__all__ = ["GenerateOutput", "Pair", "PromptError", "PromptFormat", "Sample"]
HOMES = {"GenerateOutput": "pair", "Pair": "pair", "PromptError": "prompting", "PromptFormat": "prompting"}


def _interrupted(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


# Of a command the package is what is imported first: from here until `qstar.run.command.guarded` there is nothing to
# tidy up. (`sys.argv` has the module's name later than this, and child processes have it too.)
_said = [sys.orig_argv[i + 1] for i, word in enumerate(sys.orig_argv[:-1]) if word == "-m"][:1] or sys.orig_argv[1:2]
if _said and Path(_said[0]).name.partition("-")[0].partition(".")[0] == "qstar":
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) != signal.SIG_IGN:  # as of what runs in the background
            signal.signal(_number, _interrupted)


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, which a command's help and errors do without
    if name in __all__:
        return getattr(import_module(f"qstar.{HOMES.get(name, 'sample')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
