"""q* sampling from pairs of Hugging Face language models."""

import os
from importlib import import_module
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


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, which a command's help and errors do without
    if name in __all__:
        return getattr(import_module(f"qstar.{HOMES.get(name, 'sample')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
