"""Rows of every schema with anything in any place of them: each is read, or refused by itself."""

import copy
import json
from contextlib import suppress
from unittest import mock

from chats import ASKED, CALLED, TOOLS, assistant, tool, user
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar.conversation import CALLS, MEDIA, PARTS, ROLES
from qstar.data.answers import DatasetAnswers
from qstar.data.batch import CHAT, COMPLETIONS, ENDPOINTS, RESPONSES
from qstar.data.prompts import DataError, load_prompts
from qstar.data.rows import Part, Rows

CALL = {"name": "add", "arguments": "{}"}
THOUGHT = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "content": []}
IN_PARTS = [{"type": name, "value": json.dumps(CALL)} for name in PARTS]
TURNS = [ASKED, CALLED, tool("5", tool_call_id="1", images=[]), {"role": "assistant", "content": IN_PARTS}]
TURNS += [{"from": "function_call", "value": json.dumps(CALL)}, user("So?"), assistant(None, function_call=CALL)]
ITEMS = [ASKED, THOUGHT, {"type": "function_call", "call_id": "1", **CALL}]
ITEMS += [{"type": "function_call_output", "call_id": "1", "output": IN_PARTS[:1]}, {"role": "user", "content": "So?"}]
BESIDE = {"tools": TOOLS, "functions": [CALL], "chat_template_kwargs": {"a": 1}, "image": None}
ASKS = {"temperature": 1, "top_k": 2, "max_tokens": 5, "n": 2, "seed": 1, "stop": ["a"], "logit_bias": {}}
ROWS = [
    {"messages": TURNS, "system": "a", "reference_messages": 1} | BESIDE,
    {"conversations": json.dumps(TURNS), "system": "a"},
    {"prompt": ["a", "b"], "completion": [assistant("b")], "history": [["a", "b"]]},
    {"chosen": [ASKED, assistant("b")], "rejected": [ASKED, CALLED]},
    {"instruction": "a", "instances": [{"input": "b", "output": "c"}], "history": TURNS},
    {"question": [ASKED], "responses": ["a", "b"], "finish_reason": "stop"},
    {"custom_id": "a", "url": CHAT, "body": {"messages": TURNS} | BESIDE | ASKS},
    {"custom_id": "a", "url": COMPLETIONS, "body": {"prompt": ["a"], "suffix": None} | ASKS},
    {"custom_id": "a", "url": RESPONSES, "body": {"input": ITEMS, "instructions": "a"} | BESIDE | ASKS},
]
WORDS = ["", "a", "[]", "[{}]", '{"name": 1}', "\ud800", "http://[", "1e999", "text", "role", "content", "type", "name"]
WORDS += ["arguments", "function", "tool_calls", "body", "input", "value", *ENDPOINTS, *CALLS, *MEDIA, *ROLES]
VALUES = st.recursive(
    st.sampled_from([None, False, True, 0, 1, -1, 2**70, 0.5, float("nan"), b"\xff", *WORDS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([0, 1.5, *WORDS]), inner, max_size=3),
    max_leaves=8,
)


def places(value, path=()):
    """The paths to everything in a value, and to a new key of each of its objects."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))
    if isinstance(value, dict):
        yield from ((*path, new) for new in (0, "image_url", "tool_calls", "function_call", "type"))


PLACES = [(row, path) for row in ROWS for path in places(row)]


@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3), st.booleans(), st.booleans())
@settings(max_examples=500, deadline=None)
def test_a_row_of_anything_is_a_prompt_or_an_error(changes, continued, uses_parameters):
    rows = []
    for (row, (*path, last)), value in changes:
        changed = inner = copy.deepcopy(row)
        for key in path:
            inner = inner[key]
        inner[last] = value
        rows += [changed, row]
    opened = Rows([Part("x", lambda: iter(rows))], None), [], ""
    with mock.patch("qstar.data.prompts.open_rows", return_value=opened), suppress(DataError):
        source = load_prompts("x", continue_final_message=continued, use_request_parameters=uses_parameters)
        prompts = list(source)
        assert len(prompts) == len(rows)
        json.dumps([vars(prompt) for prompt in prompts], default=vars, allow_nan=False).encode()
        list(DatasetAnswers(source))
