"""Requests of OpenAI's batch files: the endpoint that one is for, its conversation, and what it asks of sampling."""

import re
from dataclasses import dataclass, field
from typing import Any

from qstar.conversation import RowError, as_call, check_no_media, check_text, kind, read_turn
from qstar_kernels.types import Settings

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
# Where the body of a request has its prompt.
ENDPOINTS = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input"}
ITEMS = ("message", "function_call", "function_call_output", "reasoning")  # of a `/v1/responses` input
# What of a prompt is not in the request itself, and cannot be looked up.
ELSEWHERE = ("previous_response_id", "conversation", "prompt")

LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
OF_SETTINGS = ("temperature", "top_p", "top_k", "min_p")
USED = (*LIMITS, *OF_SETTINGS, "n", "seed", "stop")
# Parameters that would change what is drawn, with the value that does not.
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "best_of": 1,
    "echo": False,
    "tool_choice": "auto",
    "function_call": "auto",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "text": {"format": {"type": "text"}},
    "modalities": ["text"],
    "truncation": "disabled",
}
# What changes nothing that is drawn: the prompt, what the answer shows, and the service's own business.
APART = frozenset(
    "model messages prompt input instructions tools functions chat_template_kwargs logprobs top_logprobs include "
    "stream stream_options user metadata store service_tier background safety_identifier prompt_cache_key "
    "prompt_cache_retention prompt_cache_options suffix".split()
).union(ELSEWHERE)


def endpoint_of(row: dict[str, Any]) -> str | None:
    """The endpoint of `ENDPOINTS` that a request is for, by its `url`, or by its body where that says nothing; None for
    a row that is no such request."""
    body, url = row.get("body"), row.get("url")
    if "custom_id" not in row or not isinstance(body, dict):
        return None
    if not url or not isinstance(url, str):
        return next((endpoint for endpoint, name in ENDPOINTS.items() if name in body), None)
    path = re.split("[?#]", url)[0].rstrip("/")  # nothing else of it matters, so it need not be a good URL
    named = next((endpoint for endpoint in ENDPOINTS if path.endswith(endpoint.removeprefix("/v1"))), None)
    # other endpoints have an `input` or a `prompt`, too
    return named or (CHAT if "messages" in body else None)


def text_prompt(value: Any, column: str) -> str:
    """The text of a `/v1/completions` prompt, alone or as a list of one.

    Raises:
        RowError: it is several, or token ids.
    """
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if isinstance(value, list) and value:
        what = f"{len(value)} texts" if all(isinstance(text, str) for text in value) else "token ids"
        raise RowError(f"`{column}` is a list of {what}; accepted: one text")
    return check_text(value, f"`{column}`")


def read_items(items: list[Any], column: str) -> list[dict[str, Any]]:
    """The messages of a `/v1/responses` input.

    Reasoning, text and calls that follow each other are one turn of the assistant's, as in the other endpoints.

    Raises:
        RowError: an item is none of `ITEMS`, or cannot be read.
    """
    messages: list[dict[str, Any]] = []

    def of_assistant(*has: str) -> dict[str, Any]:
        """The assistant's turn at the end; a new one where there is none, or where it `has` one of these already."""
        if not messages or messages[-1]["role"] != "assistant" or any(messages[-1].get(key) for key in has):
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    for i, item in enumerate(items):
        where = f"item {i} of `{column}`"
        if not isinstance(item, dict):
            raise RowError(f"{where} is {kind(item)}, not an object")
        what = item.get("type") or "message"
        if what == "message":
            message = read_turn({key: item.get(key) for key in ("role", "content")}, where)
            if message["role"] == "assistant":
                of_assistant("content", "tool_calls").update(message)
            else:
                messages.append(message)
        elif what == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            if not all(isinstance(text, str) for text in function.values()):
                raise RowError(f"{where}: the call has no `name` and `arguments` as text")
            of_assistant().setdefault("tool_calls", []).append({"id": item.get("call_id")} | as_call(function))
        elif what == "function_call_output":
            message = {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}
            messages.append(read_turn(message, where))
        elif what == "reasoning":
            # encrypted thoughts have neither
            parts = item.get("content") or item.get("summary") or []
            parts = parts if isinstance(parts, list) else [parts]
            texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
            if not all(isinstance(text, str) for text in texts):
                raise RowError(f"{where} has reasoning that is no text")
            if texts:
                of_assistant("content", "tool_calls", "reasoning_content")["reasoning_content"] = "\n\n".join(texts)
        else:
            raise RowError(f"{where} is of type {what!r}; accepted: {', '.join(ITEMS)}")
        check_no_media(item, f"{where}: ")
    return messages


def check_whole(body: dict[str, Any], endpoint: str) -> None:
    """Refuse a request whose prompt is more than what is read of it.

    Raises:
        RowError: a part of it is kept by OpenAI, stands behind the answer, or is a tool that is no function.
    """
    if endpoint == COMPLETIONS and body.get("suffix"):
        raise RowError("`body.suffix` is not empty: q* answers what comes before, and does not see what comes after")
    if endpoint == RESPONSES:
        if name := next((name for name in ELSEWHERE if body.get(name)), None):
            raise RowError(f"`body.{name}` is not empty: a part of the conversation is not in the request")
        tools = body.get("tools")
        for tool in tools if isinstance(tools, list) else ():
            if isinstance(tool, dict) and tool.get("type", "function") != "function":
                raise RowError(f"`body.tools` has a tool of type {tool['type']!r}; accepted: function")


@dataclass(frozen=True)
class Asked:
    """What a request asks of sampling, in place of what the run has.

    Attributes:
        settings: fields of `Settings`.
        max_new_tokens, samples, seed: None where it says nothing.
        stop: texts that end a sample, beside those of the run.
    """

    settings: dict[str, float] = field(default_factory=dict)
    max_new_tokens: int | None = None
    samples: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


def asked_by(body: dict[str, Any]) -> Asked:
    """What the body of a request asks of sampling.

    Raises:
        RowError: a parameter is out of its range, or one that q* does not have.
    """
    said = {name: value for name, value in body.items() if value is not None}
    for name, value in said.items():
        if name in NEUTRAL and value != NEUTRAL[name]:
            raise RowError(f"`body.{name}` is {value!r:.60}, which q* does not have; accepted: {NEUTRAL[name]!r}")
        if not (name in NEUTRAL or name in USED or name in APART):
            raise RowError(f"`body.{name}` has no meaning for q*; leave it out")
    settings = {name: said[name] for name in OF_SETTINGS if name in said}
    if settings.get("top_k") == -1:
        settings["top_k"] = 0
    try:
        Settings(**settings)
    except ValueError as error:
        raise RowError(f"`body`: {error}") from None
    limits = {said[name] for name in LIMITS if name in said and _count(said, name)}
    if len(limits) > 1:
        raise RowError(f"`body` has several token limits: {', '.join(map(str, sorted(limits)))}")
    stop = said.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise RowError(f"`body.stop` is {said['stop']!r:.60}; accepted: a text or a list of texts, none empty")
    seed = said.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise RowError(f"`body.seed` is {seed!r:.60}; accepted: a whole number")
    stop = tuple(check_text(text, "`body.stop`") for text in stop)
    return Asked(settings, next(iter(limits), None), _count(said, "n"), seed, stop)


def _count(said: dict[str, Any], name: str) -> int | None:
    count = said.get(name)
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise RowError(f"`body.{name}` is {count!r:.60}; accepted: a whole number of at least 1")
    return count
