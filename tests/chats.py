"""Messages as tests write them, and chat templates that take them in one form or another."""

HEAD = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
ARGUMENTS = "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }}(" + ARGUMENTS + "){% endfor %}"
TAIL = "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TAIL += "{% if enable_thinking is defined and not enable_thinking %}no thoughts\n{% endif %}{{ effort }}"
REASONING = "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
START = "{% for m in messages %}<|{{ m.role }}|>\n"
PART = "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
TEXT = HEAD + START + REASONING + "{{ m.content }}" + CALLS + TAIL
PARTS = HEAD + START + REASONING + PART + CALLS + TAIL
BOTH = HEAD + START + "{% if m.content is string %}{{ m.content }}{% else %}" + PART + "{% endif %}" + CALLS + TAIL


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **others) -> dict:
    return {"role": "assistant", "content": text} | others


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def tool(text: str, **others) -> dict:
    return {"role": "tool", "content": text} | others


def in_parts(messages: list[dict]) -> list[dict]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def call(arguments) -> list[dict]:
    return [{"type": "function", "function": {"name": "add", "arguments": arguments}}]


ADD = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
TOOLS = [{"type": "function", "function": ADD}]
ASKED = user("What is 2 + 3?")
CALLED = assistant("", tool_calls=call({"a": 2}))
TEXT_CALL = assistant("", tool_calls=call('{"a": 2}'))
