"""The rows of a dataset as they were written, one at a time.

Local JSON, CSV and text are read here and not by the builders of `datasets`: those fit all rows into one table, which
fills the keys a row never had with nulls, turns the text `007` into the number 7 and dates into timestamps, and shifts
the columns of a CSV row with a field too many. Parquet and the hub come through `datasets`, streamed.
"""

import csv
import glob
import gzip
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import datasets
from datasets.utils.logging import disable_progress_bar

SMALL_FILE = 64 << 20  # bytes

EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")


class DataError(ValueError):
    """A dataset that cannot be read as prompts; the message is one line for the user."""


@dataclass(frozen=True)
class BadRow:
    """Something that stands where a row should be."""

    reason: str
    content: Any


Row = dict[str, Any] | BadRow


@dataclass(frozen=True)
class Rows:
    """The first `limit` rows of a reader, with whatever it raises turned into a DataError that names the dataset."""

    read: Callable[[], Iterator[Row]]
    limit: int | None
    dataset: str

    @property
    def is_small(self) -> bool:
        """Whether going through all rows takes no time that anyone notices."""
        path = Path(self.dataset).expanduser()
        return path.is_file() and path.stat().st_size <= SMALL_FILE

    def __call__(self) -> Iterator[Row]:
        count = 0
        try:
            for row in itertools.islice(self.read(), self.limit):
                yield row
                count += 1
        except DataError:
            raise
        # `datasets`, the hub client, pyarrow, gzip and csv share no class of errors.
        except Exception as error:
            raise DataError(f"--dataset {self.dataset!r} breaks off after {count} rows: {one_line(error)}") from error


def open_rows(
    dataset: str, split: str | None, config: str | None, limit: int | None, is_row: Callable[[dict[str, Any]], bool]
) -> tuple["Rows", list[str], str]:
    """Opens a local file or a hub dataset.

    Args:
        dataset, split, config, limit: as in `qstar.data.load_prompts`.
        is_row: whether an object is a row itself; a JSON document that is none may hold the list of rows.

    Returns:
        the rows, notes for the user, and a fingerprint that changes when the data does.

    Raises:
        DataError: the dataset cannot be found or read.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        raise DataError(f"--dataset {dataset!r} is a directory; accepted: a file, or the name of a hub dataset")
    is_local = path.is_file() or _extension(path) in EXTENSIONS or dataset.startswith((".", "/", "~", "\\"))
    if is_local:
        for flag, value in (("--dataset-split", split), ("--dataset-config", config)):
            if value is not None:
                raise DataError(f"{flag} {value!r}: {dataset!r} is a local file, which has none; leave {flag} out")
        read, notes = _open_local(path, is_row)
        fingerprint = file_sha256(path)
    else:
        read, notes, fingerprint = _open_hub(dataset, split, config)
    return Rows(read, limit, dataset), notes, fingerprint


def _open_local(path: Path, is_row: Callable[[dict[str, Any]], bool]) -> tuple[Callable[[], Iterator[Row]], list[str]]:
    """Returns a reader of the file's rows, and notes for the user."""
    if not path.is_file():
        raise DataError(f"--dataset {str(path)!r}: no such file")
    extension = _extension(path)
    if extension not in EXTENSIONS:
        raise DataError(
            f"--dataset {str(path)!r}: unknown extension; accepted: {', '.join(EXTENSIONS)} (.gz after it but .parquet)"
        )
    if path.stat().st_size == 0:
        raise DataError(f"--dataset {str(path)!r} is empty")
    if extension == ".parquet":
        return _open_parquet(path), []
    if extension == ".txt":
        return lambda: ({"text": line} for line in _lines(path)), ["one prompt a line, without the blank ones"]
    if extension in (".csv", ".tsv"):
        return lambda: _csv_rows(path, "\t" if extension == ".tsv" else ","), []
    return _open_json(path, is_row)


def _open_parquet(path: Path) -> Callable[[], Iterator[Row]]:
    disable_progress_bar()
    try:
        # data_files is a glob pattern: a bracket in the file's name would match nothing, and nothing would be read.
        rows = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    except Exception as error:
        raise DataError(f"--dataset {str(path)!r} is not readable as Parquet: {one_line(error)}") from error
    return _arrow_rows(rows)


def _open_hub(name: str, split: str | None, config: str | None) -> tuple[Callable[[], Iterator[Row]], list[str], str]:
    """Returns a reader of the split's rows, notes for the user, and a fingerprint."""
    disable_progress_bar()
    try:
        builder = datasets.load_dataset_builder(name, config)
        splits = builder.as_streaming_dataset()
    except Exception as error:
        raise DataError(
            f"--dataset {name!r} is neither a local file nor loadable from the hub: {one_line(error)}"
        ) from error
    chosen = split or ("train" if "train" in splits else next(iter(splits)))
    if chosen not in splits or (split is None and chosen != "train" and len(splits) > 1):
        accepted = ", ".join(map(repr, splits))
        raise DataError(f"--dataset-split {split!r}: {name!r} has the splits {accepted}; choose one")
    identity = json.dumps([name, builder.config.name, chosen, builder.hash])
    notes = [f"configuration {builder.config.name!r}, split {chosen!r} of the hub dataset {name!r}"]
    return _arrow_rows(splits[chosen]), notes, hashlib.sha256(identity.encode()).hexdigest()


def _arrow_rows(rows: datasets.IterableDataset) -> Callable[[], Iterator[Row]]:
    """A reader without the null keys of nested objects: Arrow gives an object every key of the other rows' objects."""

    def without_nulls(value: Any) -> Any:
        if isinstance(value, list):
            return [without_nulls(item) for item in value]
        if isinstance(value, dict):
            return {name: without_nulls(item) for name, item in value.items() if item is not None}
        return value

    rows = _without_decoding(rows)
    return lambda: ({name: without_nulls(value) for name, value in row.items()} for row in rows)


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


def _open_text(path: Path) -> TextIO:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    # newline="" leaves the ends of lines inside a quoted CSV field as they are; utf-8-sig drops a byte order mark.
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _lines(path: Path) -> Iterator[str]:
    with _open_text(path) as file:
        for line in file:
            if line.strip():
                yield line.rstrip("\r\n")


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long prompt
    with _open_text(path) as file:
        # strict: otherwise a quote that is never closed swallows the rest of the file.
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise DataError(f"--dataset {str(path)!r}: the header {header} names a column twice")
        for values in rows:
            if len(values) == len(header):
                yield dict(zip(header, values, strict=True))
            elif values:
                yield BadRow(f"has {len(values)} fields where the header has {len(header)}", values)


def _open_json(path: Path, is_row: Callable[[dict[str, Any]], bool]) -> tuple[Callable[[], Iterator[Row]], list[str]]:
    """Tells JSON Lines from one JSON document by the content, since both are found under either extension."""
    try:
        lines = list(itertools.islice(_lines(path), 2))
        if len(lines) == 2 and _is_json_object_or_text(lines[0]):
            return lambda: map(_json_line, _lines(path)), []
        with _open_text(path) as file:
            document = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(
            f"--dataset {str(path)!r} is not JSON: {one_line(error)}; accepted: a list of objects, or one on each line"
        ) from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"--dataset {str(path)!r} is not readable as JSON: {one_line(error)}") from error

    notes = []
    if isinstance(document, dict) and not is_row(document):
        lists = [k for k, value in document.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) == 1:
            others = ", ".join(f"`{name}`" for name in document if name != lists[0])
            notes = [f"the rows are the list `{lists[0]}` of the file" + (f" (left out: {others})" if others else "")]
            document = document[lists[0]]
    rows = [_json_row(item) for item in (document if isinstance(document, list) else [document])]
    return lambda: iter(rows), notes


def _is_json_object_or_text(line: str) -> bool:
    try:
        return isinstance(json.loads(line), (dict, str))
    except json.JSONDecodeError:
        return False


def _json_line(line: str) -> Row:
    try:
        return _json_row(json.loads(line))
    except json.JSONDecodeError as error:
        return BadRow(f"is not JSON: {one_line(error)}", line)


def _json_row(item: Any) -> Row:
    if isinstance(item, str):
        return {"text": item}
    return item if isinstance(item, dict) else BadRow(f"is {kind(item)}, not an object", item)


def kind(value: Any) -> str:
    if value is None or value == []:
        return "missing" if value is None else "an empty list"
    return {str: "text", list: "a list", dict: "an object"}.get(type(value), f"of type {type(value).__name__}")


def _extension(path: Path) -> str:
    name = path.name.lower()
    return ".parquet.gz" if name.endswith(".parquet.gz") else Path(name.removesuffix(".gz")).suffix


def file_sha256(path: Path) -> str:
    """SHA-256 of a dataset's file, in hexadecimal; raises DataError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"--dataset {str(path)!r} is not readable: {one_line(error)}") from error
    return digest.hexdigest()


def one_line(error: Exception) -> str:
    """The error's class and message, short enough for one line."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return message if len(message) <= 300 else message[:299] + "…"
