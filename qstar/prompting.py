"""From chat messages to the token ids of each side."""

from dataclasses import dataclass, field
from pathlib import Path

HINT_TEMPLATE = "{prompt}\n\nHint: {hint}"


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

    Raises:
        ValueError: the template file does not exist, or the hint template lacks a field.
    """

    chat_template: str = "auto"
    system_prompt: str | None = None
    hint_template: str = HINT_TEMPLATE
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
            try:
                ids = tokenizer.apply_chat_template(
                    messages, chat_template=self._jinja, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            except Exception as error:  # templates raise whatever they like
                raise PromptError(f"the chat template refuses this conversation: {error}") from error
        else:
            ids = tokenizer("\n\n".join(m["content"] for m in messages))["input_ids"]
        if not ids:
            raise PromptError("the prompt has no tokens")
        return list(ids)
