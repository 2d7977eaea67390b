"""Answers that are there already, beside the prompts of a dataset (those of a run are in `qstar.run.records`)."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qstar.conversation import WRITTEN, column_of, is_turn, kind, read_turns, text_of, turns_in
from qstar.data.files import DataError
from qstar.data.prompts import ANSWER_COLUMNS, PEEK_ROWS, Prompt, PromptSource

REFERENCE = "reference_messages"  # the assistant's turns at the end, see `qstar.data.prompts.Prompt`


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt, the `sample_index`-th.

    `ids`, `ids_theta` and `ids_t` are the very tokens of the answer and of both prompts where a run wrote them; None
    where the text is still to be encoded. `finish_reason` is the run's or the row's own, None where it is not known.
    `error` is why there is none. `message` is the turn of an answer that is more than its text: with calls of tools, or
    thoughts.
    """

    prompt: Prompt
    sample_index: int
    text: str
    finish_reason: str | None = None
    ids: list[int] | None = None
    ids_theta: list[int] | None = None
    ids_t: list[int] | None = None
    error: str | None = None
    message: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.prompt.index, self.sample_index


@dataclass(frozen=True)
class DatasetAnswers:
    """The answers of a dataset's rows.

    Args:
        prompts: the rows.
        column: where the answer is, dotted where it is nested; left out, the first rows decide.

    Raises:
        DataError: there is no such column, or none that is recognised.
    """

    prompts: PromptSource
    column: str | None = None
    description: str = field(init=False)

    def __post_init__(self) -> None:
        first = [p for p in itertools.islice(self.prompts, PEEK_ROWS) if p.error is None]
        names = (REFERENCE, *ANSWER_COLUMNS) if self.column is None else (self.column,)
        found = next((n for n in names for p in first if _under(p.metadata, n) not in (None, "", [])), None)
        if found is None and first:
            columns = ", ".join(f"`{c}`" for c in dict.fromkeys(c for p in first for c in p.metadata)) or "none"
            what = "no answer recognised in" if self.column is None else f"--response-field {self.column!r} is none of"
            raise DataError(f"{what} the columns beside the prompt: {columns}; name it with --response-field")
        object.__setattr__(self, "column", found)
        where = "the assistant's turn at the end" if found == REFERENCE else f"`{found}`"
        object.__setattr__(self, "description", f"{self.prompts.description}; the answer is {where}")

    @property
    def columns(self) -> list[str]:
        return self.prompts.columns

    @property
    def fingerprint(self) -> str:
        return self.prompts.fingerprint

    def count(self) -> int | None:
        return self.prompts.count()

    def __iter__(self) -> Iterator[Answer]:
        for prompt in self.prompts:
            reason = prompt.metadata.get("finish_reason")
            reason = reason if isinstance(reason, str) else None
            try:
                if prompt.error is not None:
                    raise ValueError(prompt.error)
                if prompt.later_turns:
                    raise ValueError("has user turns that nothing answers")
                answers = _read(_under(prompt.metadata, self.column), self.column)
            except ValueError as error:
                yield Answer(prompt, 0, "", error=str(error))
                continue
            for index, answer in enumerate(answers):
                if isinstance(answer, str):
                    yield Answer(prompt, index, answer, reason)
                else:
                    yield Answer(prompt, index, text_of(answer["content"]), reason, message=answer)


def _under(row: Any, path: str) -> Any:
    """What stands under a dotted path, of a list its first entry's; None where nothing does."""
    if not isinstance(row, dict):
        return None
    if (column := column_of(row, path)) in row:
        return row[column]
    head, dot, tail = path.partition(".")
    inner = row.get(column_of(row, head)) if dot else None
    return _under(inner[0] if isinstance(inner, list) and inner else inner, tail)


def _read(value: Any, column: str) -> list[str | dict[str, Any]]:
    """The answers in a column: text, a number, or a message, alone or as a list of one; a list of texts has several.

    A message that has nothing but text is that text.

    Raises:
        ValueError: it is nothing of that.
    """
    value = turns_in([value] if isinstance(value, dict) else value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        answers = [value]
    elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        answers = value
    elif isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        named = [turn if is_turn(turn) else {"role": "assistant"} | turn for turn in value]
        turns = [turn for turn in read_turns(named, column) if turn["role"] != "system"]
        if len(turns) != 1:
            raise ValueError(f"`{column}` is no answer of one turn")
        answers = [turn if any(turn.get(key) for key in WRITTEN) else text_of(turn["content"]) for turn in turns]
    else:
        raise ValueError(f"the answer `{column}` is {kind(value)}")
    if not all(answers):
        raise ValueError(f"`{column}` is empty")
    return answers
