"""From chat messages to the token ids of each side."""

import inspect
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path
from string import ascii_letters
from typing import Any

from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from qstar.conversation import HINT_TEMPLATE, as_text, from_json, text_of

# Put in front of a template, so that its `strftime_now` is this macro: transformers lets no function through to a
# template, only texts. The line's end is dropped after a block, as everywhere in a chat template.
AT_A_MOMENT = """\
{%- macro strftime_now(format) -%}
{%- for part in format.split("%%") -%}
{{- "" if loop.first else "%" -}}
{%- for piece in part.split("%") -%}
{%- set length = 2 if piece[:2] in _qstar_moment else 1 -%}
{{- piece if loop.first else _qstar_moment.get(piece[:length], "%" ~ piece[:length]) ~ piece[length:] -}}
{%- endfor -%}
{%- endfor -%}
{%- endmacro %}
"""


# Arguments of `apply_chat_template` that are set here, and the name under which a template sees the messages.
RESERVED = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"documents"} | {
    "messages"
}

PROBE, SECOND = "qstarprobe", "secondprobe"
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}
# For each role a conversation in which templates expect it: the turns before its own, with what it has beside its
# content, and the turns after.
AROUND: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]] = {
    "user": ([], {}, []),
    "system": ([], {}, [{"role": "user", "content": "a"}]),
    "assistant": ([{"role": "user", "content": "a"}], {}, [{"role": "user", "content": "b"}]),
    "tool": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        {"name": "f", "tool_call_id": CALL["id"]},
        [],
    ),
}


class PromptError(ValueError):
    """A prompt that cannot be used; the message is one line."""


@dataclass(frozen=True)
class PromptFormat:
    """How one side sees a prompt.

    Args:
        chat_template: `auto` takes the tokenizer's own template and plain text where it has none, `none` joins the
            contents with blank lines, anything else is the path of a Jinja template.
        system_prompt: put in front of the conversation, in place of its own system message.
        hint_template: how a hint is added to the last user message: `{prompt}` and `{hint}` are replaced.
        moment: what templates show as the date and time (`strftime_now`); the time at which they are asked by default.
        template_kwargs: variables for the template (`enable_thinking`, `reasoning_effort`, …).
        continue_final_message: an assistant's turn at the end is the beginning of the answer, which goes on there.

    Raises:
        ValueError: the template file does not exist, the hint template lacks a field, or a variable has a name of
            transformers' own.
    """

    chat_template: str = "auto"
    system_prompt: str | None = None
    hint_template: str = HINT_TEMPLATE
    moment: datetime | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False
    _jinja: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.chat_template not in ("auto", "none"):
            path = Path(self.chat_template)
            if not path.is_file():
                raise ValueError(f"chat template {self.chat_template!r} is no file; give auto, none or a Jinja file")
            object.__setattr__(self, "_jinja", path.read_text(encoding="utf-8"))
        if "{prompt}" not in self.hint_template or "{hint}" not in self.hint_template:
            raise ValueError(f"hint template {self.hint_template!r} must contain {{prompt}} and {{hint}}")
        check_template_kwargs(self.template_kwargs)

    def template(self, tokenizer, tools: list[dict[str, Any]] | None = None) -> str | None:
        """The chat template, by the tokenizer's own rule where that has several; None for plain text."""
        if self._jinja is not None or self.chat_template == "none" or not tokenizer.chat_template:
            return self._jinja
        return tokenizer.get_chat_template(tools=tools)

    def unread(self, tokenizer, names: Collection[str], tools: list[dict[str, Any]] | None = None) -> list[str]:
        """Those of the names of variables (`tools` among them), and of messages' `tool_calls`, that the template does
        not read."""
        template = self.template(tokenizer, tools) if names else None
        if template is None:
            return list(names)
        return [name for name in names if name not in (template if name == "tool_calls" else variables(template))]

    def encode(
        self,
        tokenizer,
        messages: list[dict[str, Any]],
        hint: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the conversation up to where the model answers.

        Args:
            tokenizer: the model's.
            messages: contents are text or lists of text parts, arguments of `tool_calls` objects or their JSON text.
            hint: text for the last user message.
            tools: JSON schemas of what the model may call; templates without `tools` do not show them.
            template_kwargs: variables for the template, before those of the format.

        Raises:
            PromptError: the template refuses the conversation, or nothing is left to condition on.
        """
        try:
            template, messages = self.template(tokenizer, tools), self._with_system(messages)
            if self._continues(messages) and messages[-1].get("tool_calls"):
                raise PromptError("the message to be continued calls tools, and no text goes on behind a call")
            if template is None:
                ids = plain_ids(tokenizer, "\n\n".join(m["content"] for m in self._hinted(as_text(messages), hint)))
            else:
                messages = [for_template(tokenizer, template, message) for message in messages]
                ids = self._render(
                    tokenizer, self._hinted(messages, hint), self._seen(template, tools, template_kwargs)
                )
        except PromptError:
            raise
        except Exception as error:  # templates raise whatever they like
            raise PromptError(f"the chat template refuses this conversation: {error}") from error
        if not ids:
            raise PromptError("the prompt has no tokens")
        return list(ids)

    def encode_turn(
        self,
        tokenizer,
        messages: list[dict[str, Any]],
        answer: dict[str, Any],
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of an assistant's turn behind the conversation, as the template writes its text, thoughts and
        calls, up to the end of the turn; the other arguments are those of `encode`.

        Raises:
            PromptError: there is no template, it refuses the turn, or it writes the turn in another place or not whole.
        """
        template = self.template(tokenizer, tools)
        if template is None:
            raise PromptError("the answer calls tools or has thoughts, which only a chat template can write")
        if messages[-1]["role"] == "assistant":
            raise PromptError("the answer calls tools or has thoughts, and cannot go on from a message")

        def rendered(*turns: dict[str, Any], **options: Any) -> str:
            turns = [for_template(tokenizer, template, message) for message in (*self._with_system(messages), *turns)]
            seen = self._seen(template, tools, template_kwargs)
            return tokenizer.apply_chat_template(turns, tokenize=False, **options, **seen)

        try:
            prompt, whole = rendered(add_generation_prompt=True), rendered(answer)
            without = rendered({key: value for key, value in answer.items() if key != "tool_calls"})
        except PromptError:
            raise
        except Exception as error:  # templates raise whatever they like
            raise PromptError(f"the chat template refuses this conversation: {error}") from error
        if answer.get("tool_calls") and whole == without:
            raise PromptError("the answer calls tools, and the chat template does not write `tool_calls`")
        if not whole.startswith(prompt):
            raise PromptError("the chat template does not write the answer behind what it asks with")
        return tokenizer(whole.removeprefix(prompt), add_special_tokens=False)["input_ids"]

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.system_prompt is None:
            return messages
        return [{"role": "system", "content": self.system_prompt}, *(m for m in messages if m["role"] != "system")]

    def _seen(self, template: str, tools, template_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        """What `apply_chat_template` is to have beside the messages."""
        check_template_kwargs(template_kwargs or {})
        seen = self.template_kwargs | (template_kwargs or {})
        if self.moment is not None and "strftime_now" in template:
            template = AT_A_MOMENT + template
            seen |= {"_qstar_moment": directives(self.moment)}
        return seen | {"tools": tools, "chat_template": template}

    def _continues(self, messages: list[dict[str, Any]]) -> bool:
        """Whether the answer goes on where the conversation ends."""
        return self.continue_final_message and messages[-1]["role"] == "assistant"

    def _render(self, tokenizer, messages: list[dict[str, Any]], seen: dict[str, Any]) -> list[int]:
        if self._continues(messages):
            text = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False, **seen)
            beginning = text_of(messages[-1]["content"])
            if not text.endswith(beginning[len(beginning.rstrip()) :]):
                raise PromptError("the chat template drops the space at the end of the message to be continued")
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **seen
        )

    def _hinted(self, messages: list[dict[str, Any]], hint: str | None) -> list[dict[str, Any]]:
        """The messages with the hint in the last that is the user's."""
        if hint is None:
            return messages
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
        content = messages[last]["content"]
        prompt = content if isinstance(content, str) else "".join(part["text"] for part in content)
        text = self.hint_template.replace("{prompt}", prompt).replace("{hint}", hint)
        hinted = messages[last] | {"content": text if isinstance(content, str) else in_parts(text)}
        return [*messages[:last], hinted, *messages[last + 1 :]]


def check_template_kwargs(names: Iterable[str]) -> None:
    """Refuse variables for a template that transformers has its own use for.

    Raises:
        PromptError: there is one.
    """
    if taken := sorted(RESERVED.intersection(names)):
        raise PromptError(
            f"{taken[0]!r} is no variable for a chat template: transformers or the command itself sets it"
        )


def plain_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text without a template: a BOS that it brings along is the one that the tokenizer would put."""
    ids, bos = tokenizer(text)["input_ids"], tokenizer.bos_token
    return ids[1:] if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def for_template(tokenizer, template: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message as the template takes it: its content text or parts, the arguments of its calls objects.

    Raises:
        PromptError: arguments are no JSON object.
    """
    content, forms = message.get("content"), content_forms(tokenizer, template, message["role"])
    if not isinstance(content, list) or "parts" not in forms:
        content = text_of(content)
        content = content if "text" in forms else in_parts(content)
    calls = {"tool_calls": with_objects(message["tool_calls"])} if message.get("tool_calls") else {}
    return message | {"content": content} | calls


@lru_cache(maxsize=256)
def variables(template: str) -> set[str]:
    """What a template reads and does not set itself."""
    return find_undeclared_variables(_compile_jinja_template(template).environment.parse(template))


@lru_cache(maxsize=256)
def content_forms(tokenizer, template: str, role: str) -> frozenset[str]:
    """What a template shows whole of a role's content, found by rendering: `text`, `parts` (a list of several), both,
    or neither: a list of one part.

    A template that prints a list as Python does shows its texts, too, so lists are for those that show one as its text.
    """
    before, others, after = AROUND.get(role, AROUND["user"])
    of_user = content_forms(tokenizer, template, "user") if role != "user" else frozenset(("text",))

    def rendered(content: Any) -> str:
        around = [m if "text" in of_user else m | {"content": in_parts(m["content"])} for m in (*before, *after)]
        messages = [*around[: len(before)], {"role": role, "content": content, **others}, *around[len(before) :]]
        try:
            return tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except Exception:  # templates raise whatever they like
            return ""

    text, part, parts = rendered(PROBE), rendered(in_parts(PROBE)), rendered(in_parts(PROBE) + in_parts(SECOND))
    if PROBE not in text and PROBE not in part:
        return of_user
    takes_parts = PROBE in parts and SECOND in parts and (PROBE not in text or part == text)
    shown = {"text": PROBE in text, "parts": takes_parts}
    return frozenset(form for form, is_shown in shown.items() if is_shown)


def in_parts(text: str) -> list[dict[str, str]]:
    """A text as the list of its one part."""
    return [{"type": "text", "text": text}]


def with_objects(calls: Any) -> list[dict[str, Any]]:
    """`tool_calls` with objects for the arguments that are JSON text, as templates go through them.

    Raises:
        PromptError: they are no list of calls, or arguments are no JSON object.
    """
    calls = from_json(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise PromptError("`tool_calls` is no list of calls")
    return [with_object(call) for call in calls]


def with_object(call: dict[str, Any]) -> dict[str, Any]:
    """One of `tool_calls`, or its `function`, with an object for its arguments; raises PromptError."""
    if isinstance(call.get("function"), dict):
        return call | {"function": with_object(call["function"])}
    if "arguments" not in call:
        return call
    arguments = call["arguments"]
    arguments = (from_json(arguments) if isinstance(arguments, str) else arguments) or {}
    if not isinstance(arguments, dict):
        raise PromptError(f"the arguments of the call of {call.get('name')!r} are no JSON object")
    return call | {"arguments": arguments}


@cache
def directives(moment: datetime) -> dict[str, str]:
    """What every directive of `strftime` gives, alone and with the flags that some systems have, without its %."""
    names = [flag + letter for letter in ascii_letters for flag in ("", *"-_0^#EO")]
    return {name: moment.strftime(f"%{name}") for name in names}
