"""The rows of a dataset as they were written, one at a time.

Local JSON, CSV and text are read here and not by the builders of `datasets`: those fit all rows into one table, which
fills the keys a row never had with nulls, turns the text `007` into the number 7 and dates into timestamps, and shifts
the columns of a CSV row with a field too many. Parquet and the hub come through `datasets`, streamed.
"""

import csv
import glob
import hashlib
import itertools
import json
import lzma
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets.utils.logging import disable_progress_bar

from qstar.files import TEXT_EXTENSIONS, DataError, File, files_of, is_local, sha256

SMALL = 64 << 20  # bytes
PEEK_LINES = 32  # of a file whose first line is no JSON, to tell whether it is JSON Lines all the same
NOT_UTF8 = "is not UTF-8"
BATCH = 256  # rows of an Arrow table that become objects at once


@dataclass(frozen=True)
class BadRow:
    """Something that stands where a row should be."""

    reason: str
    content: Any


Row = dict[str, Any] | BadRow


@dataclass(frozen=True)
class Part:
    """Rows that were written together: a file's, or a split's."""

    name: str
    read: Callable[[], Iterator[Row]]
    size: float = float("inf")  # bytes, where they lie here

    def __call__(self) -> Iterator[Row]:
        """The rows, with whatever the reader raises turned into a DataError that names the part."""
        count = 0
        try:
            for row in self.read():
                yield row
                count += 1
        except DataError:
            raise
        # `datasets`, the hub client, pyarrow, lzma and csv share no class of errors.
        except Exception as error:
            raise DataError(f"--dataset {self.name!r} breaks off after {count} rows: {one_line(error)}") from error


@dataclass(frozen=True)
class Rows:
    """The first `limit` rows of the parts, one part after another."""

    parts: list[Part]
    limit: int | None

    @property
    def is_small(self) -> bool:
        """Whether going through all rows takes no time that anyone notices."""
        return sum(part.size for part in self.parts) <= SMALL

    def by_part(self) -> Iterator[Iterator[Row]]:
        """The rows of each part; each is to be gone through before the next."""
        left = self.limit
        for part in self.parts:
            if left == 0:
                return
            count = itertools.count()
            yield (row for row, _ in zip(itertools.islice(part(), left), count, strict=False))
            left = None if left is None else left - next(count)

    def __call__(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self.by_part())


def open_rows(
    names: Sequence[str],
    split: str | None,
    config: str | None,
    limit: int | None,
    is_row: Callable[[dict[str, Any]], bool],
) -> tuple["Rows", list[str], str]:
    """Opens files, folders and hub datasets.

    Args:
        names, split, config, limit: as in `qstar.data.load_prompts`.
        is_row: whether an object is a row itself; a JSON document that is none may hold the list of rows.

    Returns:
        the rows, notes for the user, and a fingerprint that changes when the data or its order does.

    Raises:
        DataError: a dataset cannot be found or read, or none has a split or configuration to choose.
    """
    parts, notes, fingerprints, chosen = [], [], [], False
    for name in names:
        path = Path(name).expanduser()
        is_saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
        if is_saved:
            found, said, fingerprint = _open_saved(path, split)
        elif is_local(name):
            files, said = files_of(name)
            opened = [_open_file(file, is_row) for file in files]
            found = [part for part, _ in opened]
            said = [*said, *dict.fromkeys(note for _, more in opened for note in more)]
            fingerprint = sha256(list(dict.fromkeys(file.path for file in files)))
        else:
            found, said, fingerprint = _open_hub(name, split, config)
        chosen |= is_saved or not is_local(name)
        parts += found
        notes += said
        fingerprints.append(fingerprint)
    for flag, value in (("--dataset-split", split), ("--dataset-config", config)):
        if value is not None and not chosen:
            raise DataError(f"{flag} {value!r}: {names[0]!r} is local, and has none; leave {flag} out")
    whole = fingerprints[0] if len(names) == 1 else hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()
    return Rows(parts, limit), list(dict.fromkeys(notes)), whole


def _open_file(file: File, is_row: Callable[[dict[str, Any]], bool]) -> tuple[Part, list[str]]:
    """The rows of a file, and notes for the user."""
    if file.size == 0:
        raise DataError(f"--dataset {str(file)!r} is empty")
    notes: list[str] = []
    if file.extension == ".parquet":
        read = _open_parquet(file.path)
    elif file.extension not in TEXT_EXTENSIONS:
        read = _open_arrow(file.path)
    elif file.extension == ".txt":
        notes = ["one prompt a line, without the blank ones"]

        def read() -> Iterator[Row]:
            return (_checked({"text": line}) for line in _lines(file))
    elif file.extension in (".csv", ".tsv"):

        def read() -> Iterator[Row]:
            return _csv_rows(file, "\t" if file.extension == ".tsv" else ",")
    else:
        read, notes = _open_json(file, is_row)
    return Part(str(file), read, file.size), notes


def _open_parquet(path: Path) -> Callable[[], Iterator[Row]]:
    disable_progress_bar()
    try:
        if any(map(_has_map, pyarrow.parquet.read_schema(path).types)):
            return lambda: _objects(pyarrow.parquet.ParquetFile(path).iter_batches(BATCH))
        # data_files is a glob pattern: a bracket in the file's name would match nothing, and nothing would be read.
        rows = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    except Exception as error:
        raise DataError(f"--dataset {str(path)!r} is not readable as Parquet: {one_line(error)}") from error
    return _arrow_rows(rows)


def _has_map(kind: pyarrow.DataType) -> bool:
    """Whether it is or has a map from keys to values, for which `datasets` has no type."""
    return pyarrow.types.is_map(kind) or any(_has_map(kind.field(i).type) for i in range(kind.num_fields))


def _open_arrow(path: Path) -> Callable[[], Iterator[Row]]:
    """Both forms of Arrow's own files, told apart by their beginning."""

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            with (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source) as reader:
                if is_file:
                    yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
                else:
                    yield from reader

    try:
        next(batches(), None)
    except Exception as error:
        raise DataError(f"--dataset {str(path)!r} is not readable as Arrow: {one_line(error)}") from error
    return lambda: _objects(batches())


def _objects(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Row]:
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist(maps_as_pydicts="lossy"):
                yield {name: _without_nulls(value) for name, value in row.items()}


def _open_saved(path: Path, split: str | None) -> tuple[list[Part], list[str], str]:
    """A folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`: its rows, notes, and a fingerprint."""
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"--dataset {str(path)!r} is not readable as a saved dataset: {one_line(error)}") from error
    notes = ["a dataset that `save_to_disk` wrote"]
    if isinstance(saved, datasets.DatasetDict):
        chosen = _split(str(path), list(saved), split)
        saved, notes = saved[chosen], [f"split {chosen!r} of a dataset that `save_to_disk` wrote"]
    elif split is not None:
        raise DataError(f"--dataset-split {split!r}: {str(path)!r} was saved without splits; leave --dataset-split out")
    files = [Path(file["filename"]) for file in saved.cache_files]
    rows = _arrow_rows(saved.to_iterable_dataset())
    return [Part(str(path), rows, sum(file.stat().st_size for file in files))], notes, sha256(files)


def _split(name: str, splits: list[str], split: str | None) -> str:
    """The split asked for; left out, it is `train` or the only one there is."""
    chosen = split or ("train" if "train" in splits else splits[0])
    if chosen not in splits or (split is None and chosen != "train" and len(splits) > 1):
        raise DataError(
            f"--dataset-split {split!r}: {name!r} has the splits {', '.join(map(repr, splits))}; choose one"
        )
    return chosen


def _open_hub(name: str, split: str | None, config: str | None) -> tuple[list[Part], list[str], str]:
    """The rows of a split, notes for the user, and a fingerprint."""
    disable_progress_bar()
    try:
        builder = datasets.load_dataset_builder(name, config)
        splits = builder.as_streaming_dataset()
    except Exception as error:
        raise DataError(
            f"--dataset {name!r} is neither on this machine nor loadable from the hub: {one_line(error)}"
        ) from error
    chosen = _split(name, list(splits), split)
    identity = json.dumps([name, builder.config.name, chosen, builder.hash])
    notes = [f"configuration {builder.config.name!r}, split {chosen!r} of the hub dataset {name!r}"]
    return [Part(name, _arrow_rows(splits[chosen]))], notes, hashlib.sha256(identity.encode()).hexdigest()


def _arrow_rows(rows: datasets.IterableDataset) -> Callable[[], Iterator[Row]]:
    """A reader without the null keys of nested objects: Arrow gives an object every key of the other rows' objects."""

    rows = _without_decoding(rows)
    return lambda: ({name: _without_nulls(value) for name, value in row.items()} for row in rows)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


def _without_decoding(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """Leaves images and sound as bytes: decoding needs further packages, and a prompt is text.

    `IterableDataset.decode(False)` would also leave JSON columns as text.
    """

    def switch_off(feature: Any) -> None:
        if isinstance(feature, dict):
            for child in feature.values():
                switch_off(child)
        elif hasattr(feature, "feature"):
            switch_off(feature.feature)
        elif hasattr(feature, "decode") and not isinstance(feature, datasets.Json):
            feature.decode = False

    if rows.features is None:
        return rows
    features = rows.features.copy()
    switch_off(features)
    # A new Features, since the old one remembers which columns to decode.
    return rows if features == rows.features else rows.cast(datasets.Features(dict(features)))


def _lines(file: File) -> Iterator[str]:
    with file.text() as text:
        for line in text:
            if line.strip():
                yield line.rstrip("\r\n")


def _csv_rows(file: File, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long prompt
    with file.text() as text:
        # strict: otherwise a quote that is never closed swallows the rest of the file.
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise DataError(f"--dataset {str(file)!r}: the header {header} names a column twice")
        for values in rows:
            if len(values) == len(header):
                yield _checked(dict(zip(header, values, strict=True)))
            elif values:
                yield BadRow(f"has {len(values)} fields where the header has {len(header)}", values)


def _checked(row: dict[str, str]) -> Row:
    """The row, unless bytes of it were not UTF-8."""
    return (
        BadRow(NOT_UTF8, {name: _shown(value) for name, value in row.items()})
        if any(map(_is_torn, row.values()))
        else row
    )


def _is_torn(text: str) -> bool:
    """Whether bytes stand in it that were not UTF-8: see `File.text`."""
    return any("\udc80" <= c <= "\udcff" for c in text) if not text.isascii() else False


def _shown(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _open_json(file: File, is_row: Callable[[dict[str, Any]], bool]) -> tuple[Callable[[], Iterator[Row]], list[str]]:
    """Tells JSON Lines from one JSON document by the content, since both are found under either extension.

    A document goes over several lines, none of which is an object alone but perhaps the last of a list's.
    """
    try:
        lines = list(itertools.islice(_lines(file), 2))
        if not lines:
            raise DataError(f"--dataset {str(file)!r} has no rows")
        if len(lines) > 1 and _is_object_or_text(lines[0]):
            return lambda: map(_json_line, _lines(file)), []
        lines = list(itertools.islice(_lines(file), PEEK_LINES))
        are_lines = len(lines) > 1 and any(line.lstrip().startswith("{") and _is_object_or_text(line) for line in lines)
        if are_lines and lines[0].strip() not in ("[", "{"):
            return lambda: map(_json_line, _lines(file)), []
        with file.text() as text:
            content = text.read()
        if _is_torn(content):
            raise DataError(f"--dataset {str(file)!r} {NOT_UTF8}")
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"--dataset {str(file)!r} is not JSON: {one_line(error)}; accepted: a list of objects, or one on each line"
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(f"--dataset {str(file)!r} is not readable as JSON: {one_line(error)}") from error

    notes = []
    if isinstance(document, dict) and not is_row(document):
        lists = [k for k, value in document.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) == 1:
            others = ", ".join(f"`{name}`" for name in document if name != lists[0])
            notes = [f"the rows are the list `{lists[0]}` of the file" + (f" (left out: {others})" if others else "")]
            document = document[lists[0]]
    rows = [_json_row(item) for item in (document if isinstance(document, list) else [document])]
    return lambda: iter(rows), notes


def _is_object_or_text(line: str) -> bool:
    try:
        return isinstance(json.loads(line), (dict, str))
    except (ValueError, RecursionError):
        return False


def _json_line(line: str) -> Row:
    if _is_torn(line):
        return BadRow(NOT_UTF8, _shown(line))
    try:
        return _json_row(json.loads(line))
    except json.JSONDecodeError as error:
        return BadRow(f"is not JSON: {one_line(error)}", line)
    except RecursionError:
        return BadRow("is nested too deep", line)
    except ValueError as error:  # a number of more digits than Python takes
        return BadRow(f"cannot be read: {one_line(error)}", line)


def _json_row(item: Any) -> Row:
    if isinstance(item, str):
        return {"text": item}
    return item if isinstance(item, dict) else BadRow(f"is {kind(item)}, not an object", item)


def kind(value: Any) -> str:
    if value is None or value == []:
        return "missing" if value is None else "an empty list"
    return {str: "text", list: "a list", dict: "an object"}.get(type(value), f"of type {type(value).__name__}")


def one_line(error: Exception) -> str:
    """The error's class and message, short enough for one line."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return message if len(message) <= 300 else message[:299] + "…"
