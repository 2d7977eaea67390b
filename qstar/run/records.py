"""Reading back what `qstar.generate` and `qstar.score` wrote: each sample's line and its numbers, side by side.

The two files of a run, `x.jsonl` and `x.diagnostics.jsonl`, are in the same order; they are read in step, one sample at
a time, so a run may be larger than memory. A run that is still writing, or was killed, can be read too: what is not
complete yet is left out, and said.
"""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from qstar.data.answers import Answer
from qstar.data.batch import Asked, asked_by
from qstar.data.files import DataError, sha256
from qstar.data.prompts import Prompt
from qstar.run.formats import key_of
from qstar_kernels.types import FIELDS

# What null stands for where JSON has no number; nothing else is ever null
NULL = {"logq": -math.inf, "logp_theta": -math.inf, "logp_t": -math.inf, "kl_theta": math.inf, "kl_t": math.inf}
SUFFIXES = (".diagnostics.jsonl", ".journal.jsonl", ".jsonl", ".parquet")


class RecordError(ValueError):
    """A file is missing, empty, torn or foreign; the message is one line."""


@dataclass(frozen=True)
class Record:
    """One sample.

    `line` is that of `x.jsonl` (`messages` with the answer last, `finish_reason`, `metadata`, …), `diagnostics` that of
    `x.diagnostics.jsonl`; every field is described in docs/guide.md, «Files».
    """

    line: dict[str, Any]
    diagnostics: dict[str, Any]

    @property
    def id(self) -> str:
        return self.diagnostics["id"]

    @property
    def tokens(self) -> dict[str, list]:
        """Arrays with one entry a token: `id` and each of `qstar_kernels.types.FIELDS` (null stands for `NULL`)."""
        return self.diagnostics["tokens"]


class RunFiles:
    """The files of one run, named by any of them.

    Args:
        path: `x.jsonl`, `x.diagnostics.jsonl` or `x.parquet`.

    Attributes:
        samples, diagnostics: the two files that are read.
        notes: one line for each thing that iterating left out.

    Raises:
        RecordError: one of the two is missing; while iterating: it holds no samples, or something else.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        suffix = next((s for s in SUFFIXES if path.name.endswith(s)), "")
        stem = str(path)[: len(str(path)) - len(suffix)]
        self.name, self._stem = Path(stem).name, stem
        journal = Path(f"{stem}.journal.jsonl")
        self.samples = journal if journal.exists() else Path(f"{stem}.jsonl")
        self.diagnostics = Path(f"{stem}.diagnostics.jsonl")
        self.notes: list[str] = []
        if not path.is_file() and not self.samples.is_file():
            raise RecordError(f"{path} does not exist")
        if not self.diagnostics.is_file():
            raise RecordError(
                f"{self.diagnostics} does not exist; generate with --save-diagnostics, or let qstar.score make it"
            )
        if not self.samples.is_file():
            raise RecordError(f"{self.samples} does not exist, which {self.diagnostics} belongs to")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the run was started with, by the names of the command line; empty if that is not known."""
        try:
            settings = json.loads(Path(f"{self._stem}.run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return settings if isinstance(settings, dict) else {}

    def __iter__(self) -> Iterator[Record]:
        self.notes.clear()
        samples, diagnostics = self._lines(self.samples), self._lines(self.diagnostics)
        count = 0
        for line, numbers in zip(samples, diagnostics, strict=False):  # the diagnostics may be one sample ahead
            count += 1
            if line["id"] != numbers["id"]:
                raise RecordError(
                    f"line {count} of {self.samples} is sample {line['id']!r} and that of {self.diagnostics} "
                    f"{numbers['id']!r}; the files do not belong together"
                )
            if not numbers["tokens"]["id"]:
                raise RecordError(f"line {count} of {self.diagnostics} has no tokens")
            yield Record(line, numbers)
        if not count:
            raise RecordError(f"{self.samples} has no samples yet")

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        needed = ("id", "tokens") if path == self.diagnostics else ("id", "messages")
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    self.notes.append(f"line {number} of {path} is torn and left out; start its run again to mend it")
                    return
                try:
                    line = json.loads(raw)
                    key_of(line)
                    if "response" in line:
                        raise RecordError(f"{path} is of --output-format openai-batch, which is not read back")
                    tokens = {name: line[name] for name in needed}.get("tokens", {})
                    arrays = [array("d", [0.0 if x is None else x for x in tokens[name]]) for name in FIELDS if tokens]
                    if any(len(values) != len(tokens["id"]) for values in arrays):
                        raise ValueError("arrays of different lengths")
                except RecordError:
                    raise
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise RecordError(
                        f"line {number} of {path} is not what qstar.generate or qstar.score writes"
                    ) from None
                yield line


@dataclass(frozen=True)
class RunAnswers:
    """The samples that a run wrote, with their tokens: nothing is encoded again.

    `uses_parameters`: the requests that they answer had their own settings.
    """

    files: RunFiles
    limit: int | None = None
    uses_parameters: bool = False

    @property
    def description(self) -> str:
        return f"samples of a run, with the tokens in {self.files.diagnostics}"

    @property
    def columns(self) -> list[str]:
        return []

    @property
    def fingerprint(self) -> str:
        return " ".join(sha256([file]) for file in (self.files.samples, self.files.diagnostics))

    def count(self) -> int | None:
        return None

    def __iter__(self) -> Iterator[Answer]:
        try:
            for record in islice(self.files, self.limit):
                line, numbers = record.line, record.diagnostics
                number = line["id"].removesuffix(f"-{line['sample_index']}")
                metadata = line.get("metadata") or {}
                body = metadata.get("body")
                if self.uses_parameters and not isinstance(body, dict):
                    raise RecordError(f"sample {line['id']!r} of {self.files.samples} lacks the `body` of its request")
                asked = asked_by(body) if self.uses_parameters else Asked()
                yield Answer(
                    Prompt(line["prompt_index"], number, line["messages"][:-1], [], metadata, None, asked=asked),
                    line["sample_index"],
                    line["messages"][-1]["content"],
                    line["finish_reason"],
                    numbers["tokens"]["id"],
                    numbers["prompt_ids_theta"],
                    numbers["prompt_ids_t"],
                )
        except RecordError as error:
            raise DataError(str(error)) from error
