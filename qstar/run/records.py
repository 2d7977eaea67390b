"""Reading back what `qstar.generate` and `qstar.score` wrote: each sample's line and its numbers, side by side.

Samples and diagnostics are in the same order and are read in step, one sample at a time, so a run may be larger than
memory; where a Parquet file of samples has an order of its own its rows are looked up. A run that is still writing, or
was killed, can be read too: what is not complete yet is left out, and said.
"""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate, islice
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow.parquet as pq

from qstar.conversation import text_of
from qstar.data.answers import Answer
from qstar.data.batch import Asked, asked_by
from qstar.data.files import DataError, joined
from qstar.data.prompts import Prompt
from qstar.rule import FORCED
from qstar.run.formats import FOREIGN, NULL, OF_DRAFTS, Key, key_of, sample_of
from qstar.run.options import option
from qstar.run.output import ANSWERS, OutputError, key_of_line, keys_of_table
from qstar.run.parts import Parts, mended
from qstar_kernels.types import FIELDS, SETTINGS

SUFFIXES = (".diagnostics.jsonl", ".diagnostics.parquet", ".journal.jsonl", ".jsonl", ".parquet")
BATCH = 256  # rows of a Parquet file that are in memory at once
OWN, OTHERS = "q*'s", "others'"  # whose answers: those that this very q* drew, and those that it did not
OF_Q = [option(name) for name in (*SETTINGS, *FORCED)]
OF_Q += [f"weights of {part}" for part in ("theta", "t", "adapter_theta", "adapter_t")]
Numbers = tuple[dict[str, Any], dict[str, np.ndarray]]  # of a sample: its line of diagnostics, its arrays


class RecordError(ValueError):
    """A file is missing, empty, torn or foreign; the message is one line."""


class NoRun(RecordError):
    """That is no run with diagnostics, and may be something else."""


@dataclass(frozen=True)
class Record:
    """One sample.

    `line` is that of `x.jsonl` (`messages` with the answer last, `finish_reason`, `metadata`, …), `diagnostics` that of
    `x.diagnostics.jsonl`, whatever the format of the files; every field is described in docs/guide.md, «Files». Of
    `openai-batch` the conversation before the answer is not known: `messages` has the answer alone.
    `arrays` are the tokens' numbers, float32 [tokens] for each of `FIELDS`, with what null stands for.
    """

    line: dict[str, Any]
    diagnostics: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def id(self) -> str:
        return self.diagnostics["id"]

    @property
    def tokens(self) -> dict[str, list]:
        """Arrays with one entry a token: `id` and each of `qstar_kernels.types.FIELDS` (null stands for `NULL`)."""
        return self.diagnostics["tokens"]


@dataclass(frozen=True)
class Place:
    """A file, of this machine or of an object store."""

    path: str
    fs: fsspec.AbstractFileSystem | None = None

    def __str__(self) -> str:
        return self.path

    def open(self) -> IO[bytes]:
        return open(self.path, "rb") if self.fs is None else self.fs.open(self.path, "rb")

    def digest(self) -> str:
        """SHA-256 of its content.

        Raises:
            DataError: it cannot be read.
        """
        try:
            with self.open() as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"--dataset {self.path!r} is not readable: {error}") from error

    @property
    def size(self) -> int:
        return Path(self.path).stat().st_size if self.fs is None else self.fs.size(self.path)


class RunFiles:
    """The files of one run, named by any of them, or by the folder of its parts.

    Args:
        path: `x.jsonl`, `x.parquet`, `x.diagnostics.jsonl`, …, or what `--engine ray` wrote, a folder or an URL.

    Attributes:
        name, stem: of the run, for people, and the path that its files have in common.
        tokens_in: where the diagnostics are, for people.
        files: of each part in their order, the file of samples and those of diagnostics, one after the other; a run by
            one process is one part.
        size: bytes of all diagnostics; `read` are those that iterating has come through.
        notes: one line for each thing that iterating left out.

    Raises:
        NoRun: samples or diagnostics are missing.
        RecordError: a part is, or cannot be read; while iterating: there are no samples, or something else.
    """

    def __init__(self, path: str | Path):
        self.path, self.read, self._in_parts = str(path), 0, "://" in str(path) or Path(path).is_dir()
        self._said: list[str] = []
        self.notes: list[str] = []
        if self._in_parts:
            self._open_parts(self.path)
        else:
            self._open_files(Path(path))
        try:
            self.size = sum(place.size for _, diagnostics in self.files for place in diagnostics)
        except OSError as error:
            raise RecordError(f"{path} cannot be read: {error}") from None

    def _open_files(self, path: Path) -> None:
        suffix = next((s for s in SUFFIXES if path.name.endswith(s)), "")
        stem = str(path)[: len(str(path)) - len(suffix)]
        self.name, self.stem = Path(stem).name, Path(stem).absolute()
        self._read_settings = Path(f"{stem}.run.json").read_text
        # as a run that is going on has it, or a complete one, which may have been given a name without a suffix
        named = [Path(f"{stem}{s}") for s in (".journal.jsonl", ".jsonl", ".parquet", "")]
        samples = next((p for p in named if p.is_file()), named[1])
        diagnostics = [p for s in ("parquet", "jsonl") if (p := Path(f"{stem}.diagnostics.{s}")).is_file()]
        if not path.is_file() and not samples.is_file():
            raise NoRun(f"{path} does not exist")
        if not diagnostics:
            raise NoRun(
                f"{stem}.diagnostics.jsonl does not exist; generate with --save-diagnostics, or let qstar.score make it"
            )
        if not samples.is_file():
            raise NoRun(f"{samples} does not exist, which {diagnostics[0]} belongs to")
        if not Path(f"{stem}.run.json").exists():
            self._said.append(f"{stem}.run.json is not there: whether q* drew the answers is not known, and supposed")
        self.tokens_in = str(diagnostics[0])
        self.files = [(Place(str(samples)), [Place(str(p)) for p in diagnostics])]

    def _open_parts(self, url: str) -> None:
        parts = Parts(url, "jsonl", False, {})
        try:
            manifest = parts.manifest()
        except (OutputError, OSError, ImportError, ValueError) as error:
            raise NoRun(str(error)) from None
        if manifest is None:
            raise NoRun(f"{url} has no manifest.json: it is not what qstar.generate --engine ray wrote")
        parts.adopt(manifest)
        self.name = PurePosixPath(url.rstrip("/")).name
        self.stem = Path(url) if "://" in url else Path(url).absolute()
        self.tokens_in = f"{url}/diagnostics"
        self._read_settings = lambda encoding: json.dumps(manifest["settings"])
        numbers = parts.numbers("samples")
        if not parts.numbers("diagnostics"):
            raise NoRun(f"{url} has no diagnostics; generate with --save-diagnostics")
        fs = None if parts.is_local else parts.place[0]
        self.files = [
            (Place(parts.path("samples", n), fs), [Place(parts.path("diagnostics", n), fs)]) for n in sorted(numbers)
        ]
        if not parts.is_complete(manifest):
            self._said.append(f"{url} is not complete: {len(numbers)} parts are there, and no others are read")

    @property
    def places(self) -> list[Place]:
        """All files that are read."""
        return [place for samples, diagnostics in self.files for place in (samples, *diagnostics)]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the run was started with, by the names of the command line; empty if that is not known.

        Raises:
            RecordError: it cannot be read.
        """
        try:
            return dict(json.loads(self._read_settings(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, *FOREIGN):
            raise RecordError(f"{self.stem}.run.json is not what a run writes; restore it") from None

    @property
    def drawn(self) -> bool:
        """Whether q* of this run's settings drew the answers: weights π/q* are weights of such alone."""
        return self.drawn_in(self.settings)

    @staticmethod
    def drawn_in(settings: dict[str, Any]) -> bool:
        """The same, by the settings."""
        if settings.get(ANSWERS) is not None:
            return settings[ANSWERS] == OWN
        return "--no-eos" not in settings  # an option of qstar.score

    def __iter__(self) -> Iterator[Record]:
        return self.records()

    def records(self, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Record]:
        """The samples, or those whose number from 0 is `wanted`: of others nothing is parsed."""
        self.notes[:] = self._said
        self.read = count = 0
        last: Key = (-1, 0)  # of the parts
        for place, of_diagnostics in self.files:
            mend = f"; {mended(place) if self._in_parts else 'start its run again to mend it'}"
            said = len(self.notes)
            with place.open() as file:
                samples = Rows(place, file) if place.path.endswith(".parquet") else Lines(place, file, self.notes)
                of_samples = self._diagnostics(of_diagnostics)
                for source, number, read in of_samples:
                    if not samples.step():  # the diagnostics may be some samples ahead
                        left, there, not_there = 1 + sum(1 for _ in of_samples), source, place
                        break
                    if wanted(count):
                        with refusing(source, number):
                            numbers, arrays = read()
                        before, last = last, key_of(numbers)
                        if self._in_parts and last <= before:
                            raise RecordError(f"{source} has sample {numbers['id']!r}, which is not of this part{mend}")
                        yield Record(samples.line(numbers, source), numbers, arrays)
                    count += 1
                else:
                    left, there, not_there = sum(1 for _ in iter(samples.step, False)), place, of_diagnostics[0]
            if left > len(self.notes) - said:  # the one that is torn has been said
                self.notes.append(f"{left} samples of {there} are left out, which {not_there} does not have")
            self.notes[said:] = [note + mend for note in self.notes[said:]]
        if not count:
            said = [f"{self.files[0][0] if self.files else self.path} has no samples yet", *self.notes]
            raise RecordError("; ".join(said))

    def _diagnostics(self, places: list[Place]) -> Iterator[tuple[Place, int, Callable[[], Numbers]]]:
        """Each sample's place, the number of its line there, and what reads it."""
        before: list[Key] = []
        for place in places:
            with place.open() as file:
                if place.path.endswith(".parquet"):
                    with refusing(place):
                        table = pq.ParquetFile(file)
                        before = keys_of_table(Path(place.path)) if len(places) > 1 else []
                        yield from self._rows(place, table)
                    continue
                lines = Lines(place, file, self.notes)
                while lines.step():
                    self.read += len(lines.raw)
                    if before and lines.number == 1:
                        with refusing(place, 1):
                            if key_of_line(lines.raw) in set(before):
                                return  # a kill came after they were put into the table
                    yield place, lines.number, partial(numbers_of_line, lines.raw)

    def _rows(self, place: Place, table: pq.ParquetFile) -> Iterator[tuple[Place, int, Callable[[], Numbers]]]:
        size, number = place.size / max(1, table.metadata.num_rows), 0
        for batch in table.iter_batches(BATCH):
            with refusing(place, number + 1):
                others = batch.drop_columns(["tokens"]).to_pylist()
                names = [field.name for field in batch.schema.field("tokens").type]
                lists = dict(zip(names, batch.column("tokens").flatten(), strict=True))
                columns = {name: (lists[name].offsets.to_numpy(), lists[name].values.to_numpy()) for name in names}
            for i, line in enumerate(others):
                number += 1
                self.read = min(self.size, self.read + size)
                yield place, number, partial(numbers_of_row, line, columns, i)


@contextmanager
def refusing(place: Place, number: int | None = None) -> Iterator[None]:
    """What a foreign file raises, said in one line."""
    try:
        yield
    except RecordError:
        raise
    except OSError as error:  # also what pyarrow raises for bytes that it cannot unpack
        raise RecordError(f"{place} cannot be read: {error}") from None
    except FOREIGN:
        where = f"{place}" if number is None else f"line {number} of {place}"
        raise RecordError(f"{where} is not what qstar.generate or qstar.score writes") from None


def numbers_of_line(raw: bytes) -> Numbers:
    """A line of `x.diagnostics.jsonl`, and its tokens' numbers."""
    line = json.loads(raw)
    return checked(line, {name: as_array(name, line["tokens"][name]) for name in FIELDS})


def as_array(name: str, values: list[float | None]) -> np.ndarray:
    """float32 [tokens], with what null stands for."""
    try:
        found = array("d", values)
    except TypeError:
        found = array("d", [NULL[name] if x is None else x for x in values])
    with np.errstate(over="ignore"):
        return np.frombuffer(found, dtype=np.float64).astype(np.float32)


def numbers_of_row(line: dict[str, Any], columns: dict[str, tuple[np.ndarray, np.ndarray]], row: int) -> Numbers:
    """The same of a row of `x.diagnostics.parquet`, by the offsets and the values of its lists."""
    slices = {name: values[offsets[row] : offsets[row + 1]] for name, (offsets, values) in columns.items()}
    tokens = {name: values.tolist() for name, values in slices.items()}
    for name in FIELDS:
        if not np.isfinite(slices[name]).all():
            tokens[name] = [x if isfinite(x) else None for x in tokens[name]]
    line = {name: value for name, value in line.items() if value is not None or name not in OF_DRAFTS}
    arrays = {name: slices[name].astype(np.float32, copy=False) for name in FIELDS}
    return checked(line | {"tokens": tokens}, arrays)


def checked(line: dict[str, Any], arrays: dict[str, np.ndarray]) -> Numbers:
    """Both, if they are a sample's: as many numbers of each kind as tokens, and those finite that always are.

    Raises:
        FOREIGN: they are not.
        RecordError: there are no tokens.
    """
    key_of(line)
    tokens = len(token_ids(line["tokens"]["id"]))
    if any(len(values) != tokens for values in arrays.values()):
        raise ValueError("arrays of different lengths")
    if not np.isfinite(np.concatenate([*arrays.values()])).all():
        for name, values in arrays.items():
            beyond = values[~np.isfinite(values)]
            if len(beyond) and (beyond != NULL[name]).any():
                raise ValueError(name)
    if not tokens:
        raise RecordError(f"sample {line['id']!r} has no tokens")
    return line | {"id": line["id"] + ""}, arrays


def token_ids(values: list[int]) -> list[int]:
    """The ids of tokens, if they are any.

    Raises:
        TypeError, OverflowError: they are not.
    """
    return array("Q", values).tolist()


class Lines:
    """The complete lines of a file, one at a time: `raw` is the line, `number` its number."""

    def __init__(self, place: Place, file: IO[bytes], notes: list[str]):
        self.place, self.file, self.notes, self.number, self.raw = place, file, notes, 0, b""

    def step(self) -> bool:
        """Go to the next line that is not blank; whether there is one. One that is torn is left out, and noted."""
        for raw in self.file:
            self.raw, self.number = raw, self.number + 1
            if not raw.endswith(b"\n"):
                self.notes.append(f"line {self.number} of {self.place} is torn and left out")
                return False
            if not raw.isspace():
                return True
        return False

    def line(self, numbers: dict[str, Any], source: Place) -> dict[str, Any]:
        """The sample of this line, which has those diagnostics.

        Raises:
            RecordError: it is another's, or none.
        """
        with refusing(self.place, self.number):
            row = json.loads(self.raw)
            line = {"id": numbers["id"]} | sample_of(row)
            if (key_of(row), line["id"]) != (key_of(numbers), numbers["id"]):
                raise RecordError(
                    f"line {self.number} of {self.place} is sample {line['id']!r} and that of {source} "
                    f"{numbers['id']!r}; the files do not belong together"
                )
            return line


class Rows:
    """The rows of a Parquet file of samples, which are in the order of the prompts: where failed prompts were tried
    again that is not the order of the diagnostics."""

    def __init__(self, place: Place, file: IO[bytes]):
        with refusing(place):
            self.place, self.table = place, pq.ParquetFile(file)
        rows = (self.table.metadata.row_group(i).num_rows for i in range(self.table.num_row_groups))
        self.starts = list(accumulate(rows, initial=0))
        self.group = lru_cache(maxsize=2)(lambda i: self.table.read_row_group(i).to_pylist())
        self.number = 0

    def step(self) -> bool:
        """Go to the next row; whether there is one."""
        self.number += 1
        return self.number <= self.starts[-1]

    def _row(self, number: int) -> dict[str, Any]:
        group = bisect_right(self.starts, number) - 1
        return sample_of(self.group(group)[number - self.starts[group]])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {self._row(number)["id"]: number for number in range(self.starts[-1])}

    def line(self, numbers: dict[str, Any], source: Place) -> dict[str, Any]:
        """The sample that has those diagnostics.

        Raises:
            RecordError: there is none, or the file is foreign.
        """
        with refusing(self.place, self.number):
            line = self._row(self.number - 1)
            if line["id"] != numbers["id"]:
                if numbers["id"] not in self._places:
                    raise RecordError(
                        f"{self.place} has no sample {numbers['id']!r}, which {source} has; the files do not belong "
                        "together"
                    )
                line = self._row(self._places[numbers["id"]])
            return line


def names_of(runs: list[RunFiles]) -> list[str]:
    """A short name of each run, no two alike: as much of the end of its path as tells it from the others.

    Raises:
        RecordError: one is given twice.
    """
    parts = [run.stem.parts for run in runs]
    if len(set(parts)) < len(parts):
        raise RecordError(f"{next(run.stem for run in runs if parts.count(run.stem.parts) > 1)} is given twice")

    def tail(own: tuple[str, ...], length: int) -> str:
        ends = [other[-length:] for other in parts]
        return "/".join(own[-length:]) if ends.count(own[-length:]) == 1 else tail(own, length + 1)

    return [tail(own, 1) for own in parts]


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
        return f"samples of a run, with the tokens in {self.files.tokens_in}"

    @property
    def columns(self) -> list[str]:
        return []

    @property
    def fingerprint(self) -> str:
        samples = [place for place, _ in self.files.files]
        diagnostics = [place for _, places in self.files.files for place in places]
        return " ".join(joined([place.digest() for place in places]) for places in (samples, diagnostics))

    def count(self) -> int | None:
        return None

    def whose(self, settings: dict[str, Any]) -> str:
        """Who drew them, for a run with those settings that scores them: `OWN`, if that has the same q*."""
        same = all(self.files.settings.get(name) == settings.get(name) for name in OF_Q)
        return OWN if self.files.drawn and same else OTHERS

    def __iter__(self) -> Iterator[Answer]:
        seen: set[Key] = set()
        try:
            for record in islice(self.files, self.limit):
                answer = self._answer(record, f"sample {record.id!r} of {self.files.path}")
                if answer.key in seen:
                    raise RecordError(f"{self.files.path} has sample {record.id!r} twice; score each run by itself")
                seen.add(answer.key)
                yield answer
        except RecordError as error:
            raise DataError(str(error)) from error

    def _answer(self, record: Record, where: str) -> Answer:
        line, numbers = record.line, record.diagnostics
        (prompt_index, sample_index), metadata = key_of(numbers), line.get("metadata") or {}
        body = metadata.get("body")
        if self.uses_parameters and not isinstance(body, dict):
            raise RecordError(f"{where} lacks the `body` of its request")
        asked, number = asked_by(body) if self.uses_parameters else Asked(), record.id.removesuffix(f"-{sample_index}")
        try:
            return Answer(
                Prompt(prompt_index, number, line["messages"][:-1], [], metadata, None, asked=asked),
                sample_index,
                text_of(line["messages"][-1]["content"]),
                line["finish_reason"],
                *map(token_ids, (record.tokens["id"], numbers["prompt_ids_theta"], numbers["prompt_ids_t"])),
            )
        except FOREIGN:
            raise RecordError(f"{where} is not what qstar.generate or qstar.score writes") from None
