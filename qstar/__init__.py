"""q* sampling from pairs of Hugging Face language models."""

from qstar.decode import Sample
from qstar.pair import GenerateOutput, Pair
from qstar.prompting import PromptError, PromptFormat

__all__ = ["GenerateOutput", "Pair", "PromptError", "PromptFormat", "Sample"]
