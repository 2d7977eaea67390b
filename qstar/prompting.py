"""From chat messages to the token ids of each side."""

from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from string import ascii_letters

HINT_TEMPLATE = "{prompt}\n\nHint: {hint}"

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

    Raises:
        ValueError: the template file does not exist, or the hint template lacks a field.
    """

    chat_template: str = "auto"
    system_prompt: str | None = None
    hint_template: str = HINT_TEMPLATE
    moment: datetime | None = None
    _jinja: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.chat_template not in ("auto", "none"):
            path = Path(self.chat_template)
            if not path.is_file():
                raise ValueError(f"chat template {self.chat_template!r} is no file; give auto, none or a Jinja file")
            object.__setattr__(self, "_jinja", path.read_text(encoding="utf-8"))
        if "{prompt}" not in self.hint_template or "{hint}" not in self.hint_template:
            raise ValueError(f"hint template {self.hint_template!r} must contain {{prompt}} and {{hint}}")

    def encode(self, tokenizer, messages: list[dict[str, str]], hint: str | None = None) -> list[int]:
        """Token ids of the conversation up to where the model answers.

        Raises:
            PromptError: the template refuses the conversation, or nothing is left to condition on.
        """
        messages = [dict(m) for m in messages]
        if self.system_prompt is not None:
            messages = [m for m in messages if m["role"] != "system"]
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if hint is not None:
            last = messages[-1]
            last["content"] = self.hint_template.replace("{prompt}", last["content"]).replace("{hint}", hint)
        if self._jinja is not None or (self.chat_template == "auto" and tokenizer.chat_template):
            template, seen = self._jinja, {}
            try:
                if self.moment is not None and "strftime_now" in str(template or tokenizer.chat_template):
                    template = AT_A_MOMENT + (template or tokenizer.get_chat_template())
                    seen = {"_qstar_moment": directives(self.moment)}
                ids = tokenizer.apply_chat_template(
                    messages,
                    chat_template=template,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                    **seen,
                )
            except Exception as error:  # templates raise whatever they like
                raise PromptError(f"the chat template refuses this conversation: {error}") from error
        else:
            ids = tokenizer("\n\n".join(m["content"] for m in messages))["input_ids"]
        if not ids:
            raise PromptError("the prompt has no tokens")
        return list(ids)


@cache
def directives(moment: datetime) -> dict[str, str]:
    """What every directive of `strftime` gives, alone and with the flags that some systems have, without its %."""
    names = [flag + letter for letter in ascii_letters for flag in ("", *"-_0^#EO")]
    return {name: moment.strftime(f"%{name}") for name in names}
