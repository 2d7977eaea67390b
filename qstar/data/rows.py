"""The rows of a dataset as they were written, one at a time.

Local JSON, CSV and text are read here and not by the builders of `datasets`: those fit all rows into one table, which
fills the keys a row never had with nulls, turns the text `007` into the number 7 and dates into timestamps, and shifts
the columns of a CSV row with a field too many. Tables are read by pyarrow, the hub by `datasets`, streamed.
"""

import csv
import functools
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow
import pyarrow.parquet

from qstar.conversation import kind
from qstar.data.files import (
    CONFIG,
    SPLIT,
    TEXT_EXTENSIONS,
    DataError,
    File,
    choose_split,
    extension,
    files_of,
    is_local,
    is_saved,
    joined,
    one_line,
    path_of,
    sha256,
)

if TYPE_CHECKING:  # it takes most of a second, which files of text do without
    import datasets

SMALL = 64 << 20  # bytes
PEEK_LINES = 32  # of a file whose first line is no JSON, to tell whether it is JSON Lines all the same
BATCH = 256  # rows of a table that become objects at once
DOUBT = 1 << 18  # characters of a CSV file; no field goes on for so long between two quotes
DEEPEST = 100  # levels of a row; Python's own limit depends on who calls, and on how a row is walked through
BYTES = {
    pyarrow.string(): pyarrow.binary(),
    pyarrow.large_string(): pyarrow.large_binary(),
    pyarrow.string_view(): pyarrow.binary_view(),
}
NOT_UTF8 = "is not UTF-8"
TOO_DEEP = f"is nested too deep; accepted: {DEEPEST} levels"


@dataclass(frozen=True)
class BadRow:
    """Something that stands where a row should be."""

    reason: str
    content: Any


Row = dict[str, Any] | BadRow
Unread = str  # a line of JSON that will be one: a resumed run passes over those that are done


def as_row(row: Row | Unread) -> Row:
    return _json_line(row) if isinstance(row, str) else row


@dataclass(frozen=True)
class Part:
    """Rows that were written together: a file's, or a split's."""

    name: str
    read: Callable[[], Iterator[Row | Unread]]
    size: float = float("inf")  # bytes, where they lie here

    def __call__(self) -> Iterator[Row | Unread]:
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

    def by_part(self) -> Iterator[Iterator[Row | Unread]]:
        """The rows of each part; each is to be gone through before the next."""
        left = self.limit
        for part in self.parts:
            if left == 0:
                return
            count = itertools.count()
            yield (row for row, _ in zip(itertools.islice(part(), left), count, strict=False))
            left = None if left is None else left - next(count)

    def __call__(self) -> Iterator[Row]:
        return map(as_row, itertools.chain.from_iterable(self.by_part()))


def open_rows(
    names: Sequence[str],
    split: str | None,
    config: str | None,
    limit: int | None,
    is_row: Callable[[dict[str, Any]], bool],
) -> tuple["Rows", list[str], str]:
    """Opens files, folders and hub datasets.

    Args:
        names, split, config, limit: as in `qstar.data.prompts.load_prompts`.
        is_row: whether an object is a row itself; a JSON document that is none may hold the list of rows.

    Returns:
        the rows, notes for the user, and a fingerprint that changes when the data or its order does.

    Raises:
        DataError: a dataset cannot be found or read, or none has a split or configuration to choose.
    """
    parts, notes, fingerprints, chose = [], [], [], set()
    for name in names:
        if not is_local(name):
            found, said, fingerprint = _open_hub(name, split, config)
            chose |= {SPLIT, CONFIG}
        elif is_saved(path_of(name)):
            found, said, fingerprint, has_splits = _open_saved(path_of(name), split)
            chose |= {SPLIT} if has_splits else set()
        else:
            files = files_of(name, split, config)
            opened = [_open_file(file, is_row) for file in files.files]
            found = [part for part, _ in opened]
            said = [*files.notes, *(note for _, more in opened for note in more)]
            fingerprint = sha256(list(dict.fromkeys(file.path for file in files.files)))
            chose |= files.chose
        parts += found
        notes += said
        fingerprints.append(fingerprint)
    for flag, value in ((SPLIT, split), (CONFIG, config)):
        if value is not None and flag not in chose:
            raise DataError(f"{flag} {value!r}: {', '.join(names)!r} is local, and has none; leave {flag} out")
    return Rows(parts, limit), list(dict.fromkeys(notes)), joined(fingerprints)


def _open_file(file: File, is_row: Callable[[dict[str, Any]], bool]) -> tuple[Part, list[str]]:
    """The rows of a file, and notes for the user."""
    if file.size == 0:
        raise DataError(f"--dataset {str(file)!r} is empty")
    notes: list[str] = []
    form = extension(file.name)
    if form not in TEXT_EXTENSIONS:
        read = _open_table(file.path)
    elif form == ".txt":
        notes = ["one prompt a line, without the blank ones"]

        def read() -> Iterator[Row]:
            return (_checked({"text": line}) for line in _lines(file))
    elif form in (".csv", ".tsv"):

        def read() -> Iterator[Row]:
            return _csv_rows(file, "\t" if form == ".tsv" else ",")
    else:
        read, notes = _open_json(file, is_row)
    return Part(str(file), read, file.size), notes


def _open_table(path: Path) -> Callable[[], Iterator[Row]]:
    """A reader of Parquet or of Arrow's own files.

    Not that of `datasets`, which has no type for maps and some others, stumbles over files without rows and gives up
    where one row cannot be read; its features are used for what only it knows to decode.
    """
    is_parquet = path.suffix.lower() == ".parquet"
    try:
        schema = pyarrow.parquet.read_schema(path) if is_parquet else _arrow_schema(path)
        names = schema.names
    except Exception as error:
        what = "Parquet" if is_parquet else "Arrow"
        raise DataError(f"--dataset {str(path)!r} is not readable as {what}: {one_line(error)}") from error
    if len(set(names)) < len(names):
        raise DataError(f"--dataset {str(path)!r}: the columns {names} name one twice")

    def read() -> Iterator[Row]:
        decode = _decoder(_features_of(schema))
        if is_parquet:
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from _table_rows(file.iter_batches(BATCH), decode)
        else:
            yield from _table_rows(_arrow_batches(path), decode)

    return read


def _arrow_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Both forms of Arrow's own files, told apart by their beginning."""
    with pyarrow.memory_map(str(path)) as source, _arrow_reader(source) as reader:
        if isinstance(reader, pyarrow.ipc.RecordBatchFileReader):
            yield from (_validated(reader.get_batch(i)) for i in range(reader.num_record_batches))
        else:
            yield from map(_validated, reader)


def _validated(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """The same, if what its file says of places and lengths is so: where it is not, pyarrow ends the process.

    Text is looked at as bytes, since bytes that are no text are a matter of their row.
    """
    batch.validate()
    for column in batch.columns:
        column.view(BYTES.get(column.type, column.type)).validate(full=True)
    return batch


def _arrow_reader(
    source: pyarrow.NativeFile,
) -> pyarrow.ipc.RecordBatchFileReader | pyarrow.ipc.RecordBatchStreamReader:
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)


def _arrow_schema(path: Path) -> pyarrow.Schema:
    with pyarrow.memory_map(str(path)) as source, _arrow_reader(source) as reader:
        return reader.schema


def _features_of(schema: pyarrow.Schema) -> "datasets.Features | None":
    import datasets

    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception:  # it has no name for one of the types, or its own metadata are damaged
        return None


def _decoder(features: "datasets.Features | None") -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What makes objects of the JSON that `datasets` keeps as text; images and sound stay bytes."""
    if features is None:
        return lambda row: row
    import datasets

    features = features.copy()
    _switch_decoding_off(features)
    return datasets.Features(dict(features)).decode_example  # a new one: the old remembers which columns to decode


def _table_rows(
    batches: Iterator[pyarrow.RecordBatch], decode: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[Row]:
    def objects(batch: pyarrow.RecordBatch, maps: str | None = "strict") -> list[Row]:
        rows = (decode(row) for row in batch.to_pylist(maps_as_pydicts=maps))
        return [{name: _without_nulls(value) for name, value in row.items()} for row in rows]

    def one(row: pyarrow.RecordBatch) -> Row:
        for maps in ("strict", None):
            try:
                return objects(row, maps)[0]
            except Exception as caught:
                error = caught
                if not isinstance(error, KeyError):  # of a map with one key twice: as a list of pairs it can be read
                    break
        # Text that is not UTF-8, a date after the year 9999, …
        reason = NOT_UTF8 if isinstance(error, UnicodeDecodeError) else f"cannot be read: {one_line(error)}"
        return BadRow(reason, {name: _cell(row.column(name)) for name in row.schema.names})

    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            rows = batch.slice(start, BATCH)
            try:
                read = objects(rows)
            except Exception:  # of one of them
                read = (one(rows.slice(i, 1)) for i in range(rows.num_rows))
            yield from read


def _cell(column: pyarrow.Array) -> Any:
    """What stands in a column of one row, as far as it can be read."""
    try:
        return column.to_pylist(maps_as_pydicts=None)[0]
    except Exception:
        is_text = column.type in BYTES
    try:
        return (
            column.view(BYTES[column.type])[0].as_py().decode(errors="replace")
            if is_text
            else column.cast(pyarrow.string())[0].as_py()
        )
    except Exception:
        return None


def _open_saved(path: Path, split: str | None) -> tuple[list[Part], list[str], str, bool]:
    """A folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    `datasets` itself gives up where one row cannot be read, and would apply the format that a dataset was saved with.

    Returns:
        its rows, notes, a fingerprint, and whether it has splits.
    """

    def said(folder: Path, name: str) -> dict[str, Any]:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    notes, folder, has_splits = ["a dataset that `save_to_disk` wrote"], path, not (path / "state.json").is_file()
    try:
        if has_splits:
            chosen = choose_split(str(path), said(path, "dataset_dict.json")["splits"], split)
            folder, notes = path / chosen, [f"split {chosen!r} of a dataset that `save_to_disk` wrote"]
        state = said(folder, "state.json")
        sizes = {file: file.stat().st_size for file in (folder / each["filename"] for each in state["_data_files"])}
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"--dataset {str(path)!r} is not readable as a saved dataset: {one_line(error)}") from error
    if state.get("_indices_data_files"):  # which rows, in which order; later versions write them as they are
        raise DataError(f"--dataset {str(path)!r} was saved with indices, by `datasets` 1; `flatten_indices` it there")
    parts = [Part(str(file), _open_table(file), size) for file, size in sizes.items()]
    return parts, notes, sha256(list(sizes)), has_splits


def _open_hub(name: str, split: str | None, config: str | None) -> tuple[list[Part], list[str], str]:
    """The rows of a split, notes for the user, and a fingerprint."""
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, config)
        splits = builder.as_streaming_dataset()
    except Exception as error:
        raise DataError(
            f"--dataset {name!r} is neither on this machine nor loadable from the hub: {one_line(error)}"
        ) from error
    chosen = choose_split(name, list(splits), split)
    identity = json.dumps([name, builder.config.name, chosen, builder.hash])
    notes = [f"configuration {builder.config.name!r}, split {chosen!r} of the hub dataset {name!r}"]
    rows = splits[chosen].with_format("arrow")

    def read() -> Iterator[Row]:
        # one by one: where there are several at once, `datasets` wants the columns of all in one order
        batches = (batch for table in rows for batch in table.to_batches())
        return _table_rows(batches, _decoder(rows.features))

    return [Part(name, read)], notes, hashlib.sha256(identity.encode()).hexdigest()


def _without_nulls(value: Any) -> Any:
    """The same without the null keys of nested objects: Arrow gives an object every key of the other rows' objects."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


def _switch_decoding_off(feature: Any) -> None:
    import datasets

    if isinstance(feature, dict):
        for child in feature.values():
            _switch_decoding_off(child)
    elif hasattr(feature, "feature"):
        _switch_decoding_off(feature.feature)
    elif hasattr(feature, "decode") and not isinstance(feature, datasets.Json):
        feature.decode = False


def _lines(file: File) -> Iterator[str]:
    with file.text() as text:
        for line in text:
            if line.strip():
                yield line.rstrip("\r\n")


def _csv_rows(file: File, delimiter: str) -> Iterator[Row]:
    """The rows of a CSV file.

    Where something follows a closing quote, that quote may have been meant as text. Then the lines after it are of the
    same field, and may look like rows until the quote that ends it, which is out of place. So rows after an error are
    held back for as long as such a quote could come, and refused with it when one does. (Of stray quotes that stand
    where CSV has its own nobody could know.)
    """
    field = rf'(?:[^"{delimiter}\r\n]*|"[^"]*(?:""[^"]*)*")'
    in_place = re.compile(rf"{field}(?:{delimiter}{field})*[\r\n]*")

    def row_of(values: list[str]) -> list[Row]:
        if len(values) == len(header):
            return [_checked(dict(zip(header, values, strict=True)))]
        reason = f"has {len(values)} fields where the header has {len(header)}"
        return [BadRow(reason, list(map(_shown, values)))] if values else []

    def after(error: csv.Error, refused: str) -> Iterator[Row]:
        reason, more, held, since = f"is not CSV: {one_line(error)}", "", [], ""
        for values, text, number in read:
            since += text
            if isinstance(values, csv.Error) or len(values) not in (0, len(header)) or not in_place.fullmatch(text):
                refused, held, since = refused + since, [], ""
                more = f"; up to line {number} nobody can tell where a row begins"
                if len(refused) > DOUBT:
                    raise DataError(f"--dataset {str(file)!r}: a row {reason}{more}")
            else:
                held += row_of(values)
                if len(since) > DOUBT:
                    break
        yield BadRow(reason + more, _shown(refused))
        yield from held

    with file.text() as content:
        read = _csv_lines(content, delimiter)
        header = next((values for values, _, _ in read if values), [])
        if isinstance(header, csv.Error):
            raise header
        if len(set(header)) < len(header):
            raise DataError(f"--dataset {str(file)!r}: the header {header} names a column twice")
        if any(map(_is_torn, header)):
            raise DataError(f"--dataset {str(file)!r}: the header {NOT_UTF8}")
        for values, text, _ in read:
            yield from after(values, text) if isinstance(values, csv.Error) else row_of(values)


def _csv_lines(text: TextIO, delimiter: str) -> Iterator[tuple[list[str] | csv.Error, str, int]]:
    """The values of each row, or what is wrong with it; its text, and the number of its last line."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long prompt
    lines: list[str] = []  # the last is empty where the file is at its end

    def told() -> Iterator[str]:
        for line in itertools.chain(text, [""]):
            lines.append(line)
            if line:
                yield line

    # strict: otherwise a quote that is never closed swallows the rest of the file.
    rows = csv.reader(told(), delimiter=delimiter, strict=True)
    while True:
        lines.clear()
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if not lines[-1]:  # a quote that is never closed: which rows are in it nobody can tell
                raise
            values = error
        yield values, "".join(lines), rows.line_num


def _checked(row: dict[str, str]) -> Row:
    """The row, unless bytes of it were not UTF-8."""
    if any(map(_is_torn, row.values())):
        return BadRow(NOT_UTF8, {name: _shown(value) for name, value in row.items()})
    return row


def _is_torn(text: str) -> bool:
    """Whether bytes stand in it that were not UTF-8: see `File.text`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _shown(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _open_json(
    file: File, is_row: Callable[[dict[str, Any]], bool]
) -> tuple[Callable[[], Iterator[Row | Unread]], list[str]]:
    """Tells JSON Lines from one JSON document by the content, since both are found under either extension."""
    try:
        lines = list(itertools.islice(_lines(file), 2))
        if not lines:
            raise DataError(f"--dataset {str(file)!r} has no rows")
        if len(lines) > 1 and not _is_object_or_text(lines[0]):
            lines = list(itertools.islice(_lines(file), PEEK_LINES))
        if not _is_document(lines):
            return lambda: _lines(file), []
        stat = file.path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        return lambda: iter(_document(file, stamp, is_row)[0]), _document(file, stamp, is_row)[1]
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"--dataset {str(file)!r} is not JSON: {one_line(error)}; accepted: a list of objects, or one on each line"
        ) from error
    except Exception as error:  # what zipfile, lzma and pyarrow raise
        raise DataError(f"--dataset {str(file)!r} is not readable as JSON: {one_line(error)}") from error


def _is_document(lines: list[str]) -> bool:
    """Whether a file that begins with those lines is one JSON document.

    The first line of JSON Lines is an object or text by itself, or it is broken: then another is one, and the lines
    together are no beginning of anything.
    """
    if len(lines) == 1:
        return True
    if _is_object_or_text(lines[0]):
        return False
    text = "\n".join(lines)
    try:
        json.loads(text, parse_int=str)  # as text no number has too many digits
    except json.JSONDecodeError as error:
        goes_on = error.pos >= len(text.rstrip())
    except RecursionError:
        goes_on = lines[0].lstrip().startswith("[")
    else:
        goes_on = True
    return goes_on or not any(line.lstrip().startswith("{") and _is_object_or_text(line) for line in lines)


def _is_object_or_text(line: str) -> bool:
    try:
        return isinstance(json.loads(line, parse_int=str), (dict, str))
    except (ValueError, RecursionError):
        return False


@functools.lru_cache(maxsize=1)  # several would be in memory at once, and none would be read anew for every look at it
def _document(
    file: File, stamp: tuple[int, int], is_row: Callable[[dict[str, Any]], bool]
) -> tuple[list[Row], list[str]]:
    """The rows of a document, and notes for the user; `stamp` changes with the file.

    Raises:
        ValueError, RecursionError: it cannot be read.
    """
    with file.text() as text:
        content = text.read()
    is_list, is_torn = content.lstrip().startswith("["), _is_torn(content)
    try:
        document = json.loads(content)
        is_whole = not is_torn and not _is_deep(document, DEEPEST + (1 if is_list else 2))
    except json.JSONDecodeError:
        if is_torn:
            raise DataError(f"--dataset {str(file)!r} {NOT_UTF8}") from None
        raise
    except (ValueError, RecursionError):  # of a number, or of nesting, in a row
        if not is_list:
            raise
        is_whole = False
    if not is_whole and not is_list:
        raise DataError(f"--dataset {str(file)!r} {NOT_UTF8 if is_torn else TOO_DEEP}")
    if not is_whole:
        return [_json_line(item) for item in _items(content)], []
    notes = []
    if isinstance(document, dict) and not is_row(document):
        lists = [k for k, value in document.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) == 1:
            others = ", ".join(f"`{name}`" for name in document if name != lists[0])
            notes = [f"the rows are the list `{lists[0]}` of the file" + (f" (left out: {others})" if others else "")]
            document = document[lists[0]]
    return [_json_row(item) for item in (document if isinstance(document, list) else [document])], notes


def _items(content: str) -> Iterator[str]:
    """The texts of a list's items, some of which Python's reader does not read.

    Raises:
        ValueError: the list has no end, or something comes after it.
    """
    depth, start = 0, content.index("[") + 1
    for found in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},]', content, re.DOTALL):
        token = found[0]
        depth += (token in "[{") - (token in "]}")
        if depth == 0 or (depth == 1 and token == ","):
            if item := content[start : found.start()].strip():
                yield item
            start = found.end()
        if depth == 0:
            break
    if depth or content[start:].strip():
        raise ValueError("the list does not end where the file does")


def _json_line(line: str) -> Row:
    if _is_torn(line):
        return BadRow(NOT_UTF8, _shown(line))
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(f"is not JSON: {one_line(error)}", line)
    except RecursionError:
        return BadRow(TOO_DEEP, line)
    except ValueError:
        return BadRow(f"has a number of more than {sys.get_int_max_str_digits()} digits", line)
    if line.count("[") + line.count("{") > DEEPEST and _is_deep(item, DEEPEST):
        return BadRow(TOO_DEEP, line)
    return _json_row(item)


def _is_deep(value: Any, levels: int) -> bool:
    """Whether there are lists and objects inside one another on more levels than those."""
    inside = [value] if isinstance(value, (list, dict)) else []
    for _ in range(levels):
        inside = [
            child
            for item in inside
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (list, dict))
        ]
        if not inside:
            return False
    return True


def _json_row(item: Any) -> Row:
    if isinstance(item, str):
        return {"text": item}
    return item if isinstance(item, dict) else BadRow(f"is {kind(item)}, not an object", item)
