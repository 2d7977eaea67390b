"""Prompts for sampling: the rows of a dataset, whatever its columns are called, as chat messages.

A row becomes a `Prompt`: its turns but for an answer of the assistant's at their end, and everything else of the row as
metadata.
A row that cannot be a prompt comes out too, with the reason, so that a run accounts for every row it read. What
concerns the dataset as a whole (no such file, columns that nothing recognises) is a `DataError`.
"""

import base64
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

from qstar.conversation import (
    RowError,
    as_text,
    check_no_media,
    check_text,
    column_of,
    from_json,
    kind,
    read_tools,
    read_turns,
    text_of,
    turns_in,
)
from qstar.data.batch import (
    CHAT,
    COMPLETIONS,
    ENDPOINTS,
    RESPONSES,
    USED,
    Asked,
    asked_by,
    check_whole,
    endpoint_of,
    read_items,
    text_prompt,
)
from qstar.data.files import DataError
from qstar.data.rows import BadRow, Row, Rows, as_row, open_rows

# How many rows to look at for the columns: more than one, since the first may lack an optional column or be broken.
PEEK_ROWS = 32

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

SYSTEM_COLUMNS = ("system", "system_prompt")
# What a chat template sees beside the messages; `functions` is OpenAI's first name for tools.
TEMPLATE_COLUMNS = ("tools", "functions", "chat_template_kwargs")
# Conversations with an answer at their end, which share the prompt.
PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
# Where datasets keep the answer, in the order they are looked for; of a preference pair the better one.
ANSWER_COLUMNS = tuple(
    "completion response responses chosen chosen_messages answer solution output instances.output".split()
)
# Of these, where rows have the short answer that a reward is computed from, in the order it is looked for.
TRUTH_COLUMNS = ("answer", "solution", "completion", "output")
# Columns that tell with the prompt's which schema it is.
TELLING_COLUMNS = ("input", "context", "rejected", *ANSWER_COLUMNS)


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset.

    Attributes:
        index: row number in the dataset, from 0 (blank lines of a file are no rows).
        id: unique over the dataset's prompts. It is `custom_id` for OpenAI batch requests, where that is what it is
            for, and `str(index)` otherwise: columns called `id` or `question_id` often repeat (one row per answer),
            and stay in the metadata. A request without a good one has an `error`, and an id that a later request may
            have, too.
        messages: the chat without the assistant's turns at its end, unless those are to be continued; `role` (system,
            user, assistant, tool), `content` (text, or a list of several text parts), other keys of a turn
            (`tool_calls`, `name`) are kept. Empty where `error` is set.
        later_turns: user turns to be asked after the model's answers (`turns` of MT-bench).
        metadata: everything else in the row, JSON-serialisable. The assistant's turns at the end are in
            `reference_messages` (a column of that name moves to `row.reference_messages` then). Where `error` is set
            it is the whole row.
        error: why the row cannot be a prompt, else None.
        tools: what the model may call, as JSON schemas; None for nothing.
        template_kwargs: the row's own variables for the chat template.
        endpoint: of an OpenAI batch request, one of `batch.ENDPOINTS`; a prompt for completions is a text without
            a template.
        asked: what such a request asks of sampling, where that is to be used.
    """

    index: int
    id: str
    messages: list[dict[str, Any]]
    later_turns: list[str]
    metadata: dict[str, Any]
    error: str | None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    endpoint: str | None = None
    asked: Asked = field(default_factory=Asked)


@dataclass(frozen=True)
class _Schema:
    """Where the prompt is: a column (dotted where nested), or None for the turns that both of `sides` begin with.

    `endpoint` is that of OpenAI batch requests, whose id is `custom_id`.
    """

    path: str | None
    sides: tuple[str, str] = PAIRS[0]
    endpoint: str | None = None
    is_instruction: bool = False

    @property
    def by_custom_id(self) -> bool:
        return self.endpoint is not None


@dataclass(frozen=True)
class PromptSource:
    """The prompts of a dataset; every iteration starts from its first row.

    Attributes:
        description: what was recognised, for the user.
        columns: of the first rows; later rows of a JSON Lines file may have others.
        fingerprint: changes when the data does, or the order of its files: the SHA-256 of a local file, that of several
            files' in their order, or of a hub dataset's name, configuration, split and revision.

    Iterating raises `DataError` when the data breaks off (a truncated archive, a lost connection).
    """

    description: str
    columns: list[str]
    fingerprint: str
    _rows: Rows = field(repr=False)
    _schema: _Schema = field(repr=False)
    _continued: bool = field(repr=False, default=False)
    _uses_parameters: bool = field(repr=False, default=False)
    _field: str | None = field(repr=False, default=None)
    _samples: int | None = field(repr=False, default=None)

    def __iter__(self) -> Iterator[Prompt]:
        return self.starting_at(0)

    def starting_at(self, begin: int) -> Iterator[Prompt]:
        """The prompts from that index on; of rows before it no more is looked at than others' ids depend on."""
        ids, index = _Ids(), 0
        for rows in self._rows.by_part():
            first = list(map(as_row, itertools.islice(rows, PEEK_ROWS)))
            schema, start = self._schema_of(first), index
            for row in itertools.chain(first, rows):
                if index >= begin:
                    yield self._prompt(index, as_row(row), schema, ids)
                elif schema.by_custom_id or ids.named:
                    self._prompt(index, as_row(row), schema, ids)
                index += 1
            if not schema.by_custom_id:
                ids.numbered.append(range(start, index))

    def _schema_of(self, rows: list[Row]) -> _Schema:
        """That of the first file where the rows have it, too, else their own: files of a dataset may differ."""
        for row in rows:
            own = _recognise(row, self._field) if isinstance(row, dict) else None
            if own is not None:
                return self._schema if _has(row, self._schema) else own
        return self._schema

    def count(self) -> int | None:
        """How many rows there are, or None where counting would take long (a large file, the hub)."""
        return sum(1 for rows in self._rows.by_part() for _ in rows) if self._rows.is_small else None

    def _prompt(self, index: int, row: Row, schema: _Schema, ids: "_Ids") -> Prompt:
        prompt_id, reason, asked = None, None, Asked()
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            if schema.by_custom_id:
                prompt_id = _custom_id(row, ids)
            read = _parse(row, schema, self._continued)
            if self._uses_parameters and schema.by_custom_id:
                asked = asked_by(row["body"])
                if self._samples is not None:
                    ids.name_answers(prompt_id, asked.samples or self._samples)
        except (RowError, RecursionError) as error:
            reason = str(error) if isinstance(error, RowError) else "is nested too deep"
            read = _Read([], [], {"row": row.content} if isinstance(row, BadRow) else row)
        is_own = prompt_id is not None
        if not is_own:
            prompt_id = f"row-{index}" if schema.by_custom_id or str(index) in ids.named else str(index)
            while prompt_id in ids.named:
                prompt_id += "-"
        # a request that is refused for its id takes none from a later one
        if is_own or (prompt_id != str(index) and not schema.by_custom_id):
            ids.named[prompt_id] = index
        return Prompt(
            index,
            prompt_id,
            read.messages,
            read.later_turns,
            _serialisable(read.metadata),
            reason,
            read.tools,
            read.template_kwargs,
            schema.endpoint,
            asked,
        )


def load_prompts(
    dataset: str | Sequence[str],
    split: str | None = None,
    config: str | None = None,
    prompt_field: str | None = None,
    limit: int | None = None,
    continue_final_message: bool = False,
    use_request_parameters: bool = False,
    samples_per_request: int | None = None,
) -> PromptSource:
    """Opens a dataset and recognises where its prompts are.

    Rows are read as they are iterated over, so a dataset may be larger than memory; only a JSON file that is one list
    or one object has to be read as a whole.

    Args:
        dataset: a local file (JSON, JSON Lines, CSV, TSV or text, packed or not; Parquet, Arrow), a folder of them or
            of `save_to_disk`, a pattern, a name on the hub; or several, whose rows follow one another. Files are taken
            in the order of their names.
        split: of a hub dataset or a saved one; left out, it is `train` or the only one there is.
        config: of a hub dataset.
        prompt_field: the column with the prompt, dotted where it is nested (`body.messages`): text, a list of messages
            or a list of user turns. Left out, the columns decide.
        limit: how many rows to read at most.
        continue_final_message: an assistant's turn at the end of a conversation is the beginning of the answer.
        use_request_parameters: read what OpenAI batch requests ask of sampling.
        samples_per_request: of one that does not ask for a number itself, where each sample is answered by its own
            `custom_id`: that of the request, with a number behind it if there are several.

    Raises:
        DataError: the dataset cannot be found or read, has no rows, its columns are not recognised, or it has no
            requests whose parameters could be used.
    """
    if limit is not None and limit < 1:
        raise DataError(f"--num-samples {limit}: accepted: 1 or more")
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    dataset = ", ".join(names)
    rows, notes, fingerprint = open_rows(
        names, split, config, limit, lambda row: _recognise(row, prompt_field) is not None
    )

    first_rows = list(itertools.islice(rows(), PEEK_ROWS))
    if not first_rows:
        raise DataError(f"--dataset {dataset!r} has no rows")
    good_rows = [row for row in first_rows if isinstance(row, dict)]
    if not good_rows:
        raise DataError(f"--dataset {dataset!r}: the first row {first_rows[0].reason}; accepted: objects with columns")
    columns = list(dict.fromkeys(_serialisable(str(name)) for row in good_rows for name in row))
    schema, row = _recognise_first(good_rows, columns, dataset, prompt_field)
    if use_request_parameters and schema.endpoint is None:
        raise DataError(f"--use-request-parameters: {dataset!r} has no OpenAI batch requests")
    description = _describe(schema, row, columns, prompt_field, continue_final_message, use_request_parameters)
    description = " ".join("; ".join([description, *notes]).split())  # columns may be called anything
    return PromptSource(
        description,
        columns,
        fingerprint,
        rows,
        schema,
        continue_final_message,
        use_request_parameters,
        prompt_field,
        samples_per_request,
    )


def _recognise_first(
    rows: list[dict[str, Any]], columns: list[str], dataset: str, prompt_field: str | None
) -> tuple[_Schema, dict[str, Any]]:
    """The schema of the first of the rows that has one, and that row; raises DataError when none has."""
    for row in rows:
        schema = _recognise(row, prompt_field)
        if schema is not None:
            return schema, row
    names = ", ".join(f"`{shorten(name, 60, placeholder='…')}`" for name in columns)
    if prompt_field is not None:
        raise DataError(f"--prompt-field {prompt_field!r}: no such column in {dataset!r}, which has {names}")
    raise DataError(f"--dataset {dataset!r}: no prompt recognised in the columns {names}; name it with --prompt-field")


def _recognise(row: dict[str, Any], prompt_field: str | None) -> _Schema | None:
    endpoint = endpoint_of(row)
    if prompt_field is not None:
        try:
            _take(row, prompt_field)
        except KeyError:
            return None
        return _Schema(prompt_field, endpoint=endpoint)
    if endpoint is not None:
        name = ENDPOINTS[endpoint]
        return _Schema(f"body.{name}", endpoint=endpoint) if name in row["body"] else None
    for name, types in PROMPT_COLUMNS:
        column = column_of(row, name)
        value = turns_in(row.get(column))
        if isinstance(value, types) and value != []:
            return _Schema(column, is_instruction=name == "instruction")
        # After `prompt`, which a preference pair may state, and before the columns that could stand beside one.
        for sides in PAIRS if name == "prompt" else ():
            first, second = (column_of(row, side) for side in sides)
            if all(isinstance(turns_in(row.get(side)), list) and row[side] for side in (first, second)):
                return _Schema(None, (first, second))
    return None


def _has(row: dict[str, Any], schema: _Schema) -> bool:
    """Whether the row has the columns that the schema reads."""
    if schema.endpoint != endpoint_of(row):
        return False
    if schema.path is None:
        return all(side in row for side in schema.sides)
    try:
        _take(row, schema.path)
    except KeyError:
        return False
    return True


def _describe(
    schema: _Schema,
    row: dict[str, Any],
    columns: list[str],
    prompt_field: str | None,
    continued: bool,
    uses_parameters: bool,
) -> str:
    used = {schema.path}
    if schema.path is None:
        name, says = "preference pairs", "the turns that `{}` and `{}` share".format(*schema.sides)
    else:
        value = turns_in(_take(row, schema.path)[0])
        lower = {c: c.lower() for c in columns if c != schema.path}
        telling = [c for c, name in lower.items() if name in TELLING_COLUMNS or name.startswith("response")]
        name = "/".join([schema.path, *telling])
        says = f"`{schema.path}`"
        if schema.endpoint == COMPLETIONS:
            says += ", without a chat template"
        elif isinstance(value, list):
            is_turns = all(isinstance(turn, str) for turn in value)
            whole = f"{says}, its end to be continued" if continued else f"{says} but for an answer at its end"
            says = f"the first of {says}, the others to follow" if is_turns else whole
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
        name = "OpenAI batch requests" + (f" of {schema.endpoint}" if schema.endpoint != CHAT else "")
    if schema.by_custom_id:
        says += ", the id is `custom_id`"
    description = f"{name}: the prompt is {says}"
    beside = _beside(row, schema.path)
    found = [column_of(row, name) for name in (*SYSTEM_COLUMNS, "history")]
    turns = [name for name in found if row.get(name) and name not in used]
    turns += ["instructions"] if schema.endpoint == RESPONSES and beside.get("instructions") else []
    unread = ("functions",) if beside.get(column_of(beside, "tools")) else ()
    names = (column_of(beside, name) for name in TEMPLATE_COLUMNS if name not in unread)
    for_template = [name for name in names if beside.get(name)]
    for role, names in (("in front of it", turns), ("for the template", for_template)):
        description += f"; {role}: {', '.join(f'`{name}`' for name in names)}" if names else ""
    used.update(turns)
    carried = [f"`{column}`" for column in columns if column not in used]
    if carried:
        description += f"; carried along: {', '.join(carried)}"
    if schema.by_custom_id:
        apart = (ENDPOINTS[schema.endpoint], *turns, *for_template)
        parameters = [key for key in row["body"] if key not in apart]
        taken = [key for key in parameters if uses_parameters and key in USED]
        for what, names in (("used", taken), ("not used", [key for key in parameters if key not in taken])):
            if names:
                description += f"; {what} for sampling: {', '.join(f'`{name}`' for name in names)} of `body`"
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


@dataclass(frozen=True)
class _Read:
    """What a row's `Prompt` is made of; `metadata` is the rest of the row as it was."""

    messages: list[dict[str, Any]]
    later_turns: list[str]
    metadata: dict[str, Any]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def _parse(row: dict[str, Any], schema: _Schema, continued: bool) -> _Read:
    """Reads a row; raises RowError."""
    later_turns = []
    if schema.endpoint is not None:
        endpoint = endpoint_of(row)
        if endpoint != schema.endpoint:
            what = "no request" if endpoint is None else f"a request of {endpoint}"
            raise RowError(f"is {what}; accepted: one of {schema.endpoint}, as the first is")
        check_whole(row["body"], endpoint)
    check_no_media(_beside(row, schema.path))
    if schema.path is None:
        messages, rest = _shared_turns(row, schema.sides, continued)
    else:
        messages, later_turns, rest = _turns(row, schema, continued)
    beside = _beside(rest, schema.path)
    messages, rest = _with_system(messages, rest)
    if schema.endpoint == RESPONSES and beside.get("instructions"):
        instructions = check_text(beside["instructions"], "`body.instructions`")
        messages = [{"role": "system", "content": instructions}, *messages]
    kwargs = beside.get(column_of(beside, "chat_template_kwargs"))
    return _Read(messages, later_turns, rest, _tools(beside), _template_kwargs(kwargs))


def _turns(
    row: dict[str, Any], schema: _Schema, continued: bool
) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """Returns messages, later turns and the rest of a row whose prompt is in a column."""
    try:
        value, rest = _take(row, schema.path)
    except KeyError:
        raise RowError(f"has no `{schema.path}`") from None
    is_items = schema.endpoint == RESPONSES and isinstance(value, list)
    if schema.is_instruction:
        value, rest = _with_context(value, rest)
    elif schema.endpoint == COMPLETIONS:
        value = text_prompt(value, schema.path)
    elif not is_items:
        value = turns_in(value)
    if isinstance(value, str):
        turns = [_user_turn(value, f"`{schema.path}`")]
    elif not is_items and isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        turns = [_user_turn(turn, f"turn {i} of `{schema.path}`") for i, turn in enumerate(value)]
    else:
        messages = _serialisable(read_items(value, schema.path)) if is_items else _messages(value, schema.path)
        cut = _prompt_length(messages, schema.path, continued)
        if cut < len(messages):
            if "reference_messages" in rest:
                rest["row.reference_messages"] = rest["reference_messages"]
            rest["reference_messages"] = as_text(messages[cut:])
        return messages[:cut], [], rest
    earlier, rest = _history(rest)
    return [*earlier, turns[0]], [turn["content"] for turn in turns[1:]], rest


def _shared_turns(
    row: dict[str, Any], names: tuple[str, str], continued: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the messages that two conversations share, and the row with what is left of them."""
    sides = {side: _messages(row.get(side), side) for side in names}
    pairs = zip(*sides.values(), strict=False)
    shared = [chosen for chosen, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    cut = _prompt_length(shared, "` and `".join(names), continued)
    return shared[:cut], row | {side: as_text(messages[cut:]) for side, messages in sides.items()}


def _history(row: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The turns of `history`, LLaMA-Factory's pairs of what user and assistant said, and the rest of the row.

    As there, what is no list is no conversation, and stays in the row.
    """
    column = column_of(row, "history")
    value = row.get(column)
    value = from_json(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        return [], row
    rest = {name: other for name, other in row.items() if name != column}
    if all(isinstance(turn, dict) for turn in value):
        return _messages(value, "history"), rest
    pairs = [pair for pair in value if isinstance(pair, (list, tuple)) and len(pair) == 2]
    if len(pairs) < len(value):
        raise RowError("`history` is no list of pairs of what the user and the assistant said")
    turns = (({"role": "user", "content": asked}, {"role": "assistant", "content": said}) for asked, said in pairs)
    return _messages(list(itertools.chain.from_iterable(turns)), "history"), rest


def _with_system(messages: list[dict[str, Any]], row: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages behind the row's system message, where they have none of their own, and the rest of the row."""
    names = (column_of(row, name) for name in SYSTEM_COLUMNS)
    name = next((name for name in names if row.get(name)), None)
    if name is None or any(message["role"] == "system" for message in messages):
        return messages, row
    content, rest = _take(row, name)
    return [{"role": "system", "content": check_text(content, f"`{name}`")}, *messages], rest


def _beside(row: dict[str, Any], path: str | None) -> dict[str, Any]:
    """The columns of a row and, before them, what stands beside a prompt under a dotted path."""
    head, _, tail = (path or "").partition(".")
    return row | _beside(row[head], tail) if tail and isinstance(row.get(head), dict) else row


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = read_tools(row.get(column_of(row, "tools")), "tools")
    return _serialisable(tools or read_tools(row.get(column_of(row, "functions")), "functions"))


def _template_kwargs(value: Any) -> dict[str, Any]:
    """The row's variables for the chat template, also as JSON text; raises RowError."""
    value = from_json(value) if isinstance(value, str) and value else value
    if value and not isinstance(value, dict):
        raise RowError(f"`chat_template_kwargs` is {kind(value)}, not an object nor the JSON of one")
    return _serialisable(value or {})


def _context_column(row: dict[str, Any]) -> str | None:
    """The column that an `instruction` is about: `input` (Alpaca) or `context` (Dolly)."""
    return next((name for name in (column_of(row, name) for name in ("input", "context")) if name in row), None)


def _with_context(instruction: Any, row: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Joins an instruction and its input, which the rest of the row then lacks."""
    name = _context_column(row)
    if name is not None:
        context, row = _take(row, name)
    else:
        # Self-instruct: one instruction with several inputs and their outputs, which stay together in the metadata.
        name = column_of(row, "instances")
        instances = row.get(name) or [{}]
        if not isinstance(instances, list) or not isinstance(instances[0], dict):
            raise RowError(f"`instances` is {kind(instances)}, not a list of objects with `input`")
        context = instances[0].get("input")
    if context is not None and not isinstance(context, str):
        raise RowError(f"`{name}`: the input is {kind(context)}, not text")
    if not isinstance(instruction, str) or not instruction.strip() or not context or not context.strip():
        return instruction, row
    return f"{instruction}\n\n{context}", row


@dataclass(frozen=True)
class _Ids:
    """The ids that rows have so far: of those with a name, and of those before whose id is their index; and how many
    answers those have that have several, which are named by the id and a number."""

    named: dict[str, int] = field(default_factory=dict)
    numbered: list[range] = field(default_factory=list)
    several: dict[str, int] = field(default_factory=dict)

    def check_free(self, name: str) -> None:
        """Raises RowError where a row has that id."""
        number = _number(name)
        if any(number in rows for rows in self.numbered):
            raise RowError(
                f"`custom_id` {name!r} is the id of row {number}, which has no other; name the file of requests first"
            )
        if name in self.named:
            raise RowError(f"`custom_id` {name!r} is taken by row {self.named[name]}")

    def name_answers(self, name: str, count: int) -> None:
        """Note how many answers a request has; raises RowError where the id of one is another answer's."""
        if count > 1:
            of_answers = (f"{name}-{i}" for i in range(count))
            taken = next((x for x in of_answers if x in self.named and x not in self.several), None)
            owner = self.named.get(taken)
        else:
            taken, (stem, _, end) = name, name.rpartition("-")
            number = _number(end)
            owner = self.named[stem] if number is not None and number < self.several.get(stem, 0) else None
        if owner is not None:
            raise RowError(f"the answer's `custom_id` {taken!r} is taken by row {owner}")
        if count > 1:
            self.several[name] = count


def _number(name: str) -> int | None:
    """The number that an id is, None where it is none as `str` writes it."""
    is_number = name.isascii() and name.isdecimal() and len(name) < 20 and str(int(name)) == name
    return int(name) if is_number else None


def _custom_id(row: dict[str, Any], ids: _Ids) -> str:
    custom_id = row.get("custom_id")
    if isinstance(custom_id, bool) or not isinstance(custom_id, (str, int)) or custom_id == "":
        raise RowError(f"`custom_id` is {custom_id!r}; accepted: text, not empty")
    custom_id = _serialisable(str(custom_id))
    ids.check_free(custom_id)
    return custom_id


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    return _serialisable(read_turns(value, column))


def _user_turn(text: str, where: str) -> dict[str, Any]:
    if not text.strip():
        raise RowError(f"{where} is empty")
    return {"role": "user", "content": check_text(text, where)}


def _prompt_length(messages: list[dict[str, Any]], column: str, continued: bool) -> int:
    """How many turns come before the assistant's at the end, or all of them where that is to be continued; the last
    user turn must say something."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise RowError(f"`{column}` has no user turn")
    if not text_of(messages[last]["content"]).strip():
        raise RowError(f"turn {last} of `{column}` is empty")
    if continued:
        return len(messages)
    return max(i for i, message in enumerate(messages) if message["role"] != "assistant") + 1


def _serialisable(value: Any) -> Any:
    """The value as JSON has it; what JSON lacks becomes text."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(_serialisable(name)): _serialisable(item) for name, item in value.items()}
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
