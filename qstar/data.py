"""Prompts for sampling: the rows of a dataset, whatever its columns are called, as chat messages.

A row becomes a `Prompt`: the turns up to and including the last user turn, and everything else of the row as metadata.
A row that cannot be a prompt comes out too, with the reason, so that a run accounts for every row it read. What
concerns the dataset as a whole (no such file, columns that nothing recognises) is a `DataError`.

Local JSON, CSV and text are read here and not by the builders of `datasets`: those fit all rows into one table, which
fills the keys a row never had with nulls, turns the text `007` into the number 7 and dates into timestamps, and shifts
the columns of a CSV row with a field too many. Parquet and the hub come through `datasets`, streamed.
"""

import base64
import csv
import glob
import gzip
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import datasets
from datasets.utils.logging import disable_progress_bar

# How many rows to look at for the columns: more than one, since the first may lack an optional column or be broken.
PEEK_ROWS = 32

EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")

# The names that chat formats give to the roles (OpenAI, ShareGPT and its descendants).
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# Columns that hold the prompt, in the order they are looked for, with the types they must have to be one.
PROMPT_COLUMNS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("messages", (list,)),
    ("conversations", (list,)),
    ("conversation", (list,)),
    ("prompt", (str, list)),
    ("instruction", (str,)),
    ("question", (str, list)),
    ("problem", (str, list)),
    ("query", (str, list)),
    ("turns", (list,)),
    ("text", (str,)),
    ("input", (str, list)),
)

ANSWER_COLUMNS = ("input", "context", "completion", "chosen", "rejected", "solution", "answer", "output")


class DataError(ValueError):
    """A dataset that cannot be read as prompts; the message is one line for the user."""


class _RowError(Exception):
    """Why one row cannot be a prompt."""


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset.

    Attributes:
        index: row number in the dataset, from 0 (blank lines of a file are no rows).
        id: unique over the dataset. It is `custom_id` for OpenAI batch requests, where that is what it is for, and
            `str(index)` otherwise: columns called `id` or `question_id` often repeat (one row per answer), and
            stay in the metadata.
        messages: the chat up to and including the last user turn; `role` (system, user, assistant, tool) and `content`
            are text, other keys of a turn (`tool_calls`, `name`) are kept. Empty where `error` is set.
        later_turns: user turns to be asked after the model's answers (`turns` of MT-bench).
        metadata: everything else in the row, JSON-serialisable. The turns after the last user turn are in
            `reference_messages` (a column of that name moves to `row.reference_messages` then). Where `error` is set
            it is the whole row.
        error: why the row cannot be a prompt, else None.
    """

    index: int
    id: str
    messages: list[dict[str, Any]]
    later_turns: list[str]
    metadata: dict[str, Any]
    error: str | None


@dataclass(frozen=True)
class _BadRow:
    """Something that stands where a row should be."""

    reason: str
    content: Any


_Row = dict[str, Any] | _BadRow


@dataclass(frozen=True)
class _Schema:
    """Where the prompt is: a column (dotted where nested), or None for the turns that two conversations share."""

    path: str | None
    by_custom_id: bool = False
    is_instruction: bool = False


@dataclass(frozen=True)
class PromptSource:
    """The prompts of a dataset; every iteration starts from its first row.

    Attributes:
        description: what was recognised, for the user.
        columns: of the first rows; later rows of a JSON Lines file may have others.
        fingerprint: changes when the data does: the SHA-256 of a local file, or of a hub dataset's name, configuration,
            split and revision.

    Iterating raises `DataError` when the data breaks off (not UTF-8, a truncated archive, a lost connection).
    """

    description: str
    columns: list[str]
    fingerprint: str
    _read: Callable[[], Iterator[_Row]] = field(repr=False)
    _schema: _Schema = field(repr=False)

    def __iter__(self) -> Iterator[Prompt]:
        taken: dict[str, int] = {}
        for index, row in enumerate(self._read()):
            yield self._prompt(index, row, taken)

    def _prompt(self, index: int, row: _Row, taken: dict[str, int]) -> Prompt:
        prompt_id = None if self._schema.by_custom_id else str(index)
        reason = None
        try:
            if isinstance(row, _BadRow):
                raise _RowError(row.reason)
            if self._schema.by_custom_id:
                prompt_id = _custom_id(row, taken)
            messages, later_turns, metadata = _parse(row, self._schema)
        except _RowError as error:
            messages, later_turns, reason = [], [], str(error)
            metadata = {"row": row.content} if isinstance(row, _BadRow) else row
        if prompt_id is None:
            prompt_id = f"row-{index}"
            while prompt_id in taken:
                prompt_id += "-"
        if self._schema.by_custom_id:
            taken[prompt_id] = index
        return Prompt(index, prompt_id, messages, later_turns, _serialisable(metadata), reason)


def load_prompts(
    dataset: str,
    split: str | None = None,
    config: str | None = None,
    prompt_field: str | None = None,
    limit: int | None = None,
) -> PromptSource:
    """Opens a dataset and recognises where its prompts are.

    Rows are read as they are iterated over, so a dataset may be larger than memory; only a JSON file that is one list
    or one object has to be read as a whole.

    Args:
        dataset: a local file (JSON, JSON Lines, CSV, TSV or text, also with `.gz`; Parquet) or a name on the hub.
        split: of a hub dataset; left out, it is `train` or the only one there is.
        config: of a hub dataset.
        prompt_field: the column with the prompt, dotted where it is nested (`body.messages`): text, a list of messages
            or a list of user turns. Left out, the columns decide.
        limit: how many rows to read at most.

    Raises:
        DataError: the dataset cannot be found or read, has no rows, or its columns are not recognised.
    """
    if limit is not None and limit < 1:
        raise DataError(f"--num-samples {limit}: accepted: 1 or more")
    path = Path(dataset).expanduser()
    if path.is_dir():
        raise DataError(f"--dataset {dataset!r} is a directory; accepted: a file, or the name of a hub dataset")
    is_local = path.is_file() or _extension(path) in EXTENSIONS or dataset.startswith((".", "/", "~", "\\"))
    if is_local:
        for flag, value in (("--dataset-split", split), ("--dataset-config", config)):
            if value is not None:
                raise DataError(f"{flag} {value!r}: {dataset!r} is a local file, which has none; leave {flag} out")
        read, notes = _open_local(path, prompt_field)
        fingerprint = _file_sha256(path)
    else:
        read, notes, fingerprint = _open_hub(dataset, split, config)
    rows = _Rows(read, limit, dataset)

    first_rows = list(itertools.islice(rows(), PEEK_ROWS))
    if not first_rows:
        raise DataError(f"--dataset {dataset!r} has no rows")
    good_rows = [row for row in first_rows if isinstance(row, dict)]
    if not good_rows:
        raise DataError(f"--dataset {dataset!r}: the first row {first_rows[0].reason}; accepted: objects with columns")
    columns = list(dict.fromkeys(str(name) for row in good_rows for name in row))
    schema, description = _recognise_first(good_rows, columns, dataset, prompt_field)
    return PromptSource("; ".join([description, *notes]), columns, fingerprint, rows, schema)


@dataclass(frozen=True)
class _Rows:
    """The first `limit` rows of a reader, with whatever it raises turned into a DataError that names the dataset."""

    read: Callable[[], Iterator[_Row]]
    limit: int | None
    dataset: str

    def __call__(self) -> Iterator[_Row]:
        count = 0
        try:
            for row in itertools.islice(self.read(), self.limit):
                yield row
                count += 1
        except DataError:
            raise
        # `datasets`, the hub client, pyarrow, gzip and csv share no class of errors.
        except Exception as error:
            raise DataError(f"--dataset {self.dataset!r} breaks off after {count} rows: {_one_line(error)}") from error


def _open_local(path: Path, prompt_field: str | None) -> tuple[Callable[[], Iterator[_Row]], list[str]]:
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
    return _open_json(path, prompt_field)


def _open_parquet(path: Path) -> Callable[[], Iterator[_Row]]:
    disable_progress_bar()
    try:
        # data_files is a glob pattern: a bracket in the file's name would match nothing, and nothing would be read.
        rows = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    except Exception as error:
        raise DataError(f"--dataset {str(path)!r} is not readable as Parquet: {_one_line(error)}") from error
    return _arrow_rows(rows)


def _open_hub(name: str, split: str | None, config: str | None) -> tuple[Callable[[], Iterator[_Row]], list[str], str]:
    """Returns a reader of the split's rows, notes for the user, and a fingerprint."""
    disable_progress_bar()
    try:
        builder = datasets.load_dataset_builder(name, config)
        splits = builder.as_streaming_dataset()
    except Exception as error:
        raise DataError(
            f"--dataset {name!r} is neither a local file nor loadable from the hub: {_one_line(error)}"
        ) from error
    chosen = split or ("train" if "train" in splits else next(iter(splits)))
    if chosen not in splits or (split is None and chosen != "train" and len(splits) > 1):
        accepted = ", ".join(map(repr, splits))
        raise DataError(f"--dataset-split {split!r}: {name!r} has the splits {accepted}; choose one")
    identity = json.dumps([name, builder.config.name, chosen, builder.hash])
    notes = [f"configuration {builder.config.name!r}, split {chosen!r} of the hub dataset {name!r}"]
    return _arrow_rows(splits[chosen]), notes, hashlib.sha256(identity.encode()).hexdigest()


def _arrow_rows(rows: datasets.IterableDataset) -> Callable[[], Iterator[_Row]]:
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


def _csv_rows(path: Path, delimiter: str) -> Iterator[_Row]:
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
                yield _BadRow(f"has {len(values)} fields where the header has {len(header)}", values)


def _open_json(path: Path, prompt_field: str | None) -> tuple[Callable[[], Iterator[_Row]], list[str]]:
    """Tells JSON Lines from one JSON document by the content, since both are found under either extension."""
    try:
        lines = list(itertools.islice(_lines(path), 2))
        if len(lines) == 2 and _is_json_object_or_text(lines[0]):
            return lambda: map(_json_line, _lines(path)), []
        with _open_text(path) as file:
            document = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(
            f"--dataset {str(path)!r} is not JSON: {_one_line(error)}; accepted: a list of objects, or one on each line"
        ) from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"--dataset {str(path)!r} is not readable as JSON: {_one_line(error)}") from error

    notes = []
    if isinstance(document, dict) and _recognise(document, prompt_field) is None:
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


def _json_line(line: str) -> _Row:
    try:
        return _json_row(json.loads(line))
    except json.JSONDecodeError as error:
        return _BadRow(f"is not JSON: {_one_line(error)}", line)


def _json_row(item: Any) -> _Row:
    if isinstance(item, str):
        return {"text": item}
    return item if isinstance(item, dict) else _BadRow(f"is {_kind(item)}, not an object", item)


def _recognise_first(
    rows: list[dict[str, Any]], columns: list[str], dataset: str, prompt_field: str | None
) -> tuple[_Schema, str]:
    """Recognises the schema by the first of the rows that has one; raises DataError when none has."""
    for row in rows:
        schema = _recognise(row, prompt_field)
        if schema is not None:
            return schema, _describe(schema, row, columns, prompt_field)
    names = ", ".join(f"`{name}`" for name in columns)
    if prompt_field is not None:
        raise DataError(f"--prompt-field {prompt_field!r}: no such column in {dataset!r}, which has {names}")
    raise DataError(f"--dataset {dataset!r}: no prompt recognised in the columns {names}; name it with --prompt-field")


def _recognise(row: dict[str, Any], prompt_field: str | None) -> _Schema | None:
    is_request = "custom_id" in row and isinstance(row.get("body"), dict) and "messages" in row["body"]
    if prompt_field is not None:
        try:
            _take(row, prompt_field)
        except KeyError:
            return None
        return _Schema(prompt_field, by_custom_id=is_request)
    if is_request:
        return _Schema("body.messages", by_custom_id=True)
    for name, types in PROMPT_COLUMNS:
        if isinstance(row.get(name), types) and row[name] != []:
            return _Schema(name, is_instruction=name == "instruction")
        # After `prompt`, which a preference pair may state, and before the columns that could stand beside one.
        if name == "prompt" and all(isinstance(row.get(side), list) and row[side] for side in ("chosen", "rejected")):
            return _Schema(None)
    return None


def _describe(schema: _Schema, row: dict[str, Any], columns: list[str], prompt_field: str | None) -> str:
    used = {schema.path}
    if schema.path is None:
        name, says = "preference pairs", "the turns that `chosen` and `rejected` share"
    else:
        value, _ = _take(row, schema.path)
        answers = [c for c in columns if c != schema.path and (c in ANSWER_COLUMNS or c.startswith("response"))]
        name = "/".join([schema.path, *answers])
        says = f"`{schema.path}`"
        if isinstance(value, list):
            is_turns = all(isinstance(turn, str) for turn in value)
            says = f"the first of {says}, the others to follow" if is_turns else f"{says} up to the last user turn"
    if schema.is_instruction:
        context = _context_column(row)
        if context is not None:
            says += f" and `{context}`"
            used.add(context)
        elif "instances" in columns:
            says += " and the `input` of the first of `instances`"
    if prompt_field is not None:
        name = "chosen with --prompt-field"
    elif schema.by_custom_id:
        name = "OpenAI batch requests"
    if schema.by_custom_id:
        says += ", the id is `custom_id`"
    description = f"{name}: the prompt is {says}"
    carried = [f"`{column}`" for column in columns if column not in used]
    if carried:
        description += f"; carried along: {', '.join(carried)}"
    if schema.by_custom_id:
        parameters = [f"`{key}`" for key in row["body"] if key != "messages"]
        description += f"; not used for sampling: {', '.join(parameters)} of `body`" if parameters else ""
    return description


def _take(row: dict[str, Any], path: str) -> tuple[Any, dict[str, Any]]:
    """Returns what stands under a dotted path, and the row without it; raises KeyError."""
    if path in row:
        return row[path], {name: value for name, value in row.items() if name != path}
    head, _, tail = path.partition(".")
    if not tail or not isinstance(row.get(head), dict):
        raise KeyError(path)
    value, rest = _take(row[head], tail)
    return value, {**row, head: rest}


def _parse(row: dict[str, Any], schema: _Schema) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """Returns messages, later turns and the rest of a row."""
    if schema.path is None:
        return _shared_turns(row)
    try:
        value, rest = _take(row, schema.path)
    except KeyError:
        raise _RowError(f"has no `{schema.path}`") from None
    if schema.is_instruction:
        value, rest = _with_context(value, rest)
    if isinstance(value, str):
        return [_user_turn(value, f"`{schema.path}`")], [], rest
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        turns = [_user_turn(turn, f"turn {i} of `{schema.path}`") for i, turn in enumerate(value)]
        return turns[:1], [turn["content"] for turn in turns[1:]], rest
    messages = _messages(value, schema.path)
    cut = _prompt_length(messages, schema.path)
    if cut < len(messages):
        if "reference_messages" in rest:
            rest["row.reference_messages"] = rest["reference_messages"]
        rest["reference_messages"] = messages[cut:]
    return messages[:cut], [], rest


def _shared_turns(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    sides = {side: _messages(row.get(side), side) for side in ("chosen", "rejected")}
    pairs = zip(*sides.values(), strict=False)
    shared = [chosen for chosen, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    cut = _prompt_length(shared, "chosen` and `rejected")
    return shared[:cut], [], {**row, **{side: messages[cut:] for side, messages in sides.items()}}


def _context_column(row: dict[str, Any]) -> str | None:
    """The column that an `instruction` is about: `input` (Alpaca) or `context` (Dolly)."""
    return next((name for name in ("input", "context") if name in row), None)


def _with_context(instruction: Any, row: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Joins an instruction and its input, which the rest of the row then lacks."""
    name = _context_column(row)
    if name is not None:
        context, row = _take(row, name)
    else:
        # Self-instruct: one instruction with several inputs and their outputs, which stay together in the metadata.
        name, instances = "instances", row.get("instances") or [{}]
        if not isinstance(instances, list) or not isinstance(instances[0], dict):
            raise _RowError(f"`instances` is {_kind(instances)}, not a list of objects with `input`")
        context = instances[0].get("input")
    if context is not None and not isinstance(context, str):
        raise _RowError(f"`{name}`: the input is {_kind(context)}, not text")
    if not isinstance(instruction, str) or not instruction.strip() or not context or not context.strip():
        return instruction, row
    return f"{instruction}\n\n{context}", row


def _custom_id(row: dict[str, Any], taken: dict[str, int]) -> str:
    custom_id = row.get("custom_id")
    if isinstance(custom_id, bool) or not isinstance(custom_id, (str, int)) or custom_id == "":
        raise _RowError(f"`custom_id` is {custom_id!r}; accepted: text, not empty")
    if str(custom_id) in taken:
        raise _RowError(f"`custom_id` {custom_id!r} is taken by row {taken[str(custom_id)]}")
    return _serialisable(str(custom_id))


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise _RowError(f"`{column}` is {_kind(value)}, not text, a list of messages or a list of user turns")
    return [_message(turn, f"turn {i} of `{column}`") for i, turn in enumerate(value)]


def _message(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """One turn as role and content, from OpenAI's or ShareGPT's keys; its other keys are kept."""
    role_key = "role" if turn.get("role") is not None else "from"
    content_key = "content" if turn.get("content") is not None else "value"
    role, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise _RowError(f"{where}: the role is {role!r}; accepted: {', '.join(ROLES)}")
    others = {k: _serialisable(v) for k, v in turn.items() if k not in (role_key, content_key) and v is not None}
    if content is None and "tool_calls" in others:
        content = ""
    return {"role": ROLES[role.lower()], "content": _text(content, where), **others}


def _text(content: Any, where: str) -> str:
    if isinstance(content, list):
        # A line each, so that the words of two parts do not run together.
        content = "\n".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise _RowError(f"{where} is {_kind(content)}, not text")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise _RowError(f"{where} has half of a surrogate pair, which is no character") from None
    return content


def _part(part: Any, where: str) -> str:
    kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else ("text", part)
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise _RowError(f"{where} has a part of type {kind!r}; accepted: text only")
    return text


def _user_turn(text: str, where: str) -> dict[str, Any]:
    if not text.strip():
        raise _RowError(f"{where} is empty")
    return {"role": "user", "content": _text(text, where)}


def _prompt_length(messages: list[dict[str, Any]], column: str) -> int:
    """How many turns there are up to and including the last user turn, which must say something."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise _RowError(f"`{column}` has no user turn")
    if not messages[last]["content"].strip():
        raise _RowError(f"turn {last} of `{column}` is empty")
    return last + 1


def _serialisable(value: Any) -> Any:
    """The value as JSON has it; what JSON lacks becomes text."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {_serialisable(str(name)): _serialisable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_serialisable(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):
        return _serialisable(value.tolist())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)


def _kind(value: Any) -> str:
    if value is None or value == []:
        return "missing" if value is None else "an empty list"
    return {str: "text", list: "a list", dict: "an object"}.get(type(value), f"of type {type(value).__name__}")


def _extension(path: Path) -> str:
    name = path.name.lower()
    return ".parquet.gz" if name.endswith(".parquet.gz") else Path(name.removesuffix(".gz")).suffix


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"--dataset {str(path)!r} is not readable: {_one_line(error)}") from error
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    """The error's class and message, short enough for one line."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return message if len(message) <= 300 else message[:299] + "…"
