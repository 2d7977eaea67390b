"""Conversations as people write them, as chat messages: the roles, keys and parts of the formats in use.

A message has a `role` of system, user, assistant or tool and a `content`: text, or the list of its text parts where
there are several, since a template that takes parts joins them in its own way. What else a turn has stays with it:
templates read `tool_calls`, `reasoning_content`, `name` and more.
"""

import json
from typing import Any

# The names that chat formats give to the roles: OpenAI, ShareGPT and its descendants, LLaMA-Factory, ms-swift, OASST.
HINT_TEMPLATE = "{prompt}\n\nHint: {hint}"

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose text is the JSON of what they call
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking")
# Columns, and keys of a turn or a part, that hold what is no text: those of LLaMA-Factory, trl, verl, ms-swift, LLaVA
# and OpenAI.
MEDIA = ("image", "images", "image_url", "video", "videos", "video_url", "audio", "audios", "audio_url", "input_audio")
PARTS = ("text", "reasoning", "tool_call", "refusal")  # what a content may be made of, as messages name it
WRITTEN = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # what templates write beside a turn's text
BESIDE_CONTENT = (*WRITTEN, "function_call", "refusal")  # beside one of these a null content is an empty one


class RowError(ValueError):
    """Why one row cannot be a prompt; the message is one line."""


def read_turns(value: Any, column: str) -> list[dict[str, Any]]:
    """The messages of a list of turns.

    Args:
        value: the turns, or the JSON text of them.
        column: where they stand, for the message of an error.

    Raises:
        RowError: they are no such list, or one of them cannot be read.
    """
    value = turns_in(value)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RowError(f"`{column}` is {kind(value)}, not text, a list of messages or a list of user turns")
    messages = [read_turn(turn, f"turn {i} of `{column}`") for i, turn in enumerate(value)]
    mapped = [not turn.get("tool_calls") for turn in value]
    return _with_ids(messages, mapped)


def _with_ids(messages: list[dict[str, Any]], mapped: list[bool]) -> list[dict[str, Any]]:
    """The messages with ids for the calls that formats without any have (`mapped`), and for their results, in order:
    some templates want them, of nine letters and digits."""
    count, open_calls, done = 0, [], []
    for message, is_mapped in zip(messages, mapped, strict=True):
        if is_mapped and "tool_calls" in message:
            calls = [{"id": f"call{count + i:05}"} | call for i, call in enumerate(message["tool_calls"])]
            message, count, open_calls = message | {"tool_calls": calls}, count + len(calls), [c["id"] for c in calls]
        elif message["role"] == "tool" and open_calls and "tool_call_id" not in message:
            message = message | {"tool_call_id": open_calls.pop(0)}
        done.append(message)
    return done


def turns_in(value: Any) -> Any:
    """The turns where a text is the JSON of a list of them; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        turns = from_json(value)
        if isinstance(turns, list) and turns and all(is_turn(turn) for turn in turns):
            return turns
    return value


def is_turn(value: Any) -> bool:
    """Whether it is an object that names its role."""
    return isinstance(value, dict) and isinstance(value.get(_key_of(value, ROLE_KEYS)), str)


def read_turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """One turn as a message, from the keys and the roles of any of the formats; its other keys are kept.

    Raises:
        RowError: its role is unknown, its content is no text, or it has more than text.
    """
    role_key, content_key = (_key_of(turn, keys) for keys in (ROLE_KEYS, CONTENT_KEYS))
    name, content = _role_name(turn.get(role_key)), turn.get(content_key)
    if name not in ROLES:
        raise RowError(f"{where}: the role is {turn.get(role_key)!r}; accepted: {', '.join(ROLES)}")
    check_no_media(turn, f"{where}: ")
    others = {k: v for k, v in turn.items() if k not in (role_key, content_key) and v is not None}
    if content is None and any(key in others for key in BESIDE_CONTENT):
        content = ""
    if not others.get("tool_calls"):  # nothing is called, however that is said
        others.pop("tool_calls", None)
        if function_call := others.pop("function_call", None):
            others["tool_calls"] = _calls(function_call, where)
    if name in CALLS:
        content, others["tool_calls"] = _split_calls(content, where)
    elif isinstance(content, list):
        content, of_parts = _read_parts(content, where)
        others = of_parts | others
    content = content if isinstance(content, list) else check_text(content, where)
    return {"role": ROLES[name], "content": content, **others}


def _key_of(turn: dict[str, Any], keys: tuple[str, ...]) -> str:
    """The key that a turn has of these, whatever its case; the first where it has none."""
    return next((key for name in keys for key in turn if str(key).lower() == name and turn[key] is not None), keys[0])


def check_no_media(row: dict[str, Any], where: str = "") -> None:
    """Refuse what comes with pictures, films or sound.

    Raises:
        RowError: one of `MEDIA` is not empty.
    """
    if name := next((name for name in row if str(name).lower() in MEDIA and not _is_none(row[name])), None):
        raise RowError(f"{where}`{name}` is not empty; accepted: text only, which is all that the models would see")


def _is_none(value: Any) -> bool:
    """Whether there are no media: nothing, also as JSON text in a CSV cell, or a flag or number that says so."""
    value = from_json(value.strip()) if isinstance(value, str) else value
    return not value or _is_empty(value)


def _is_empty(value: Any) -> bool:
    """Whether there is nothing, also as `datasets` has it: a list of nulls, an object of them."""
    if isinstance(value, (list, dict)):
        return all(map(_is_empty, value.values() if isinstance(value, dict) else value))
    return value is None or (isinstance(value, (str, bytes)) and not value)


def _role_name(role: Any) -> str | None:
    """The role as it stands in `ROLES`, whatever its case; `gpt-4`, `gpt_3.5` and the like are `gpt`."""
    if not isinstance(role, str):
        return None
    role = role.strip().lower().replace("-", "_").replace(" ", "_")
    return "gpt" if role.startswith("gpt") else role


def as_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call of `name` and `arguments` as an entry of `tool_calls`."""
    return {"type": "function", "function": call}


def _split_calls(content: Any, where: str) -> tuple[str, list[dict[str, Any]]]:
    """What is called by a turn whose text is JSON, as LLaMA-Factory has it, and the thoughts that stand before it."""
    if not isinstance(content, str):
        return "", _calls(content, where)
    head, mark, text = content.rpartition("</think>")
    return head + mark, _calls(text, where)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The `tool_calls` of an object with `name` and `arguments`, or a list of such, also as JSON text."""
    calls = from_json(value) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call and "arguments" in call for call in calls):
        raise RowError(f"{where}: the call is no JSON with `name` and `arguments`")
    return [as_call(call) for call in calls]


def _read_parts(parts: list[Any], where: str) -> tuple[str | list[dict[str, str]], dict[str, Any]]:
    """The text of a content that is a list of parts, and what of them belongs beside it in a message.

    Text parts that carry `value` are joined without anything between them, which is what LLaMA-Factory does.
    """
    texts, joined, others = [], False, {}
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        what = _type_of(part)
        keys = ("text", "value", what)
        said = next((part[key] for key in keys if part.get(key) is not None), None) if isinstance(part, dict) else None
        if what in TEXT_PARTS and isinstance(said, str):
            texts.append(said)
            joined = joined or "text" not in part
        elif what in REASONING_PARTS and isinstance(said, str):
            others["reasoning_content"] = others.get("reasoning_content", "") + said
        elif what == "refusal" and isinstance(said, str):
            others["refusal"] = others.get("refusal", "") + said
        elif what == "tool_call":
            others.setdefault("tool_calls", []).extend(_calls(part if said is None else said, where))
        else:
            raise RowError(f"{where} has a part of type {what!r}; accepted: {', '.join(PARTS)}")
        check_no_media(part, f"{where}: ")
    if joined or len(texts) < 2:
        return "".join(texts), others
    return [{"type": "text", "text": check_text(text, where)} for text in texts], others


def _type_of(part: Any) -> str:
    """What a part is; one without a `type` is named by its key, as in `{"image": "a.png"}`."""
    if not isinstance(part, dict):
        return "text"
    return str(part.get("type") or next((key for key in part if key in MEDIA or str(key).endswith("_url")), "text"))


def check_text(text: Any, where: str) -> str:
    """The text as it is.

    Raises:
        RowError: it is none, or holds what is no character.
    """
    if not isinstance(text, str):
        raise RowError(f"{where} is {kind(text)}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(f"{where} has half of a surrogate pair, which is no character") from None
    return text


def text_of(content: str | list[dict[str, str]] | None) -> str:
    """A message's content as text: a line for each part, so that the words of two do not run together."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content or ())


def as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with text for a content, as files have them."""
    return [message | {"content": text_of(message.get("content"))} for message in messages]


def answered(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The conversation with an answer, which goes on where it ends with the assistant."""
    *before, last = messages
    if last["role"] != "assistant":
        return [*messages, {"role": "assistant", "content": text}]
    return [*before, last | {"content": text_of(last["content"]) + text}]


def read_tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    """Tools as `apply_chat_template` takes them; None where there are none.

    Args:
        value: a list of JSON schemas or one of them, also as JSON text, of the list or of each; a function by itself
            (`name`, `description`, `parameters`) is wrapped, as LLaMA-Factory does it.
        column: where it stands, for the message of an error.

    Raises:
        RowError: it is nothing of that.
    """
    tools = from_json(value) if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    tools = tools if isinstance(tools, list) else [tools]
    tools = [from_json(tool) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"`{column}` is no list of objects, nor the JSON of one")
    return [_as_tool(tool, column) for tool in tools]


def _as_tool(tool: dict[str, Any], column: str) -> dict[str, Any]:
    if "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    function = tool.get("function")
    if isinstance(function, dict) and isinstance(function.get("parameters"), str):
        parameters = from_json(function["parameters"])
        if not isinstance(parameters, dict):
            raise RowError(f"`{column}`: the parameters of {function.get('name')!r} are no JSON object")
        tool = tool | {"function": function | {"parameters": parameters}}
    return tool


def column_of(row: dict[str, Any], name: str) -> str:
    """The column of that name, whatever its case; the name itself where there is none."""
    return name if name in row else next((column for column in row if str(column).lower() == name), name)


def from_json(text: str) -> Any:
    """What a text is the JSON of; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def kind(value: Any) -> str:
    """What a value is, for the message of an error. It is here since reading files takes packages that need not be
    there for sampling."""
    if value is None or value == []:
        return "missing" if value is None else "an empty list"
    return {str: "text", list: "a list", dict: "an object"}.get(type(value), f"of type {type(value).__name__}")
