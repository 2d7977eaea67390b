"""q* sampling from pairs of Hugging Face language models."""

import os

# Threads that spin while they wait make a busy machine several times slower; read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from qstar.pair import GenerateOutput, Pair
from qstar.prompting import PromptError, PromptFormat
from qstar.sample import Sample

__all__ = ["GenerateOutput", "Pair", "PromptError", "PromptFormat", "Sample"]
