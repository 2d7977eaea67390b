"""Conversations as people write them: what each model sees is what transformers' own rendering gives."""

import copy
import json
from pathlib import Path

import pytest
import transformers
from chats import (
    ADD,
    ASKED,
    BOTH,
    CALLED,
    PART,
    PARTS,
    TEXT,
    TEXT_CALL,
    TOOLS,
    assistant,
    call,
    in_parts,
    system,
    tool,
    user,
)
from runs import lines, write_lines

from qstar.conversation import RowError, read_turn
from qstar.data.prompts import load_prompts
from qstar.demo import THETA
from qstar.generate import main as generate
from qstar.prompting import PromptError, PromptFormat, content_forms
from qstar.score import main as score

pytestmark = pytest.mark.usefixtures("loaded_once")

CASES = Path(__file__).parents[2] / "shared" / "cases"


# Rows, and what of them transformers gets: messages, and what else.
ROWS = {
    "ends with a tool's result": ({"messages": [ASKED, CALLED, tool("5")]}, [ASKED, CALLED, tool("5")], {}),
    "a request that ends with a tool's result": (
        {"custom_id": "a", "body": {"messages": [ASKED, TEXT_CALL, tool("5", tool_call_id="1")]}},
        [ASKED, CALLED, tool("5", tool_call_id="1")],
        {},
    ),
    "an answer after a tool's result": (
        {"messages": [ASKED, CALLED, tool("5"), assistant("It is 5.")]},
        [ASKED, CALLED, tool("5")],
        {},
    ),
    "two calls at once": (
        {"prompt": [ASKED, assistant("", tool_calls=call({}) * 2), tool("5"), tool("6")]},
        [ASKED, assistant("", tool_calls=call({}) * 2), tool("5"), tool("6")],
        {},
    ),
    "a preference pair behind a tool's result": (
        {"chosen": [ASKED, CALLED, tool("5"), assistant("5")], "rejected": [ASKED, CALLED, tool("5"), assistant("6")]},
        [ASKED, CALLED, tool("5")],
        {},
    ),
    "tools": ({"messages": [ASKED], "tools": TOOLS}, [ASKED], {"tools": TOOLS}),
    "tools as JSON text": ({"messages": [ASKED], "tools": json.dumps(TOOLS)}, [ASKED], {"tools": TOOLS}),
    "tools as JSON texts": ({"prompt": "What is 2 + 3?", "tools": [json.dumps(TOOLS[0])]}, [ASKED], {"tools": TOOLS}),
    "tools without a type": ({"prompt": "What is 2 + 3?", "tools": [ADD]}, [ASKED], {"tools": TOOLS}),
    "tools of the Responses API": (
        {"prompt": "What is 2 + 3?", "tools": [{"type": "function", **ADD}]},
        [ASKED],
        {"tools": TOOLS},
    ),
    "one tool, its parameters as JSON text": (
        {"prompt": "What is 2 + 3?", "tools": json.dumps(ADD | {"parameters": json.dumps(ADD["parameters"])})},
        [ASKED],
        {"tools": TOOLS},
    ),
    "tools of a request": ({"custom_id": 1, "body": {"messages": [ASKED], "tools": TOOLS}}, [ASKED], {"tools": TOOLS}),
    "functions": ({"messages": [ASKED], "functions": [ADD]}, [ASKED], {"tools": TOOLS}),
    "functions as JSON text": ({"messages": [ASKED], "functions": json.dumps([ADD])}, [ASKED], {"tools": TOOLS}),
    "functions as JSON texts": (
        {"prompt": "What is 2 + 3?", "functions": [json.dumps(ADD)]},
        [ASKED],
        {"tools": TOOLS},
    ),
    "one function": ({"prompt": "What is 2 + 3?", "tools": [], "functions": ADD}, [ASKED], {"tools": TOOLS}),
    "no tools": ({"messages": [ASKED], "tools": []}, [ASKED], {}),
    "no tools as text": ({"messages": [ASKED], "tools": ""}, [ASKED], {}),
    "arguments as JSON text": (
        {"messages": [ASKED, TEXT_CALL, tool("5"), user("Thanks.")]},
        [ASKED, CALLED, tool("5"), user("Thanks.")],
        {},
    ),
    "calls as JSON text": (
        {"messages": [ASKED, assistant("", tool_calls=json.dumps(call({"a": 2}))), tool("5")]},
        [ASKED, CALLED, tool("5")],
        {},
    ),
    "no arguments": (
        {"messages": [ASKED, assistant("", tool_calls=call("")), tool("5")]},
        [ASKED, assistant("", tool_calls=call({})), tool("5")],
        {},
    ),
    "a legacy function_call": (
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}},
                {"role": "function", "name": "add", "content": "5"},
            ]
        },
        [ASKED, CALLED, tool("5", name="add")],
        {},
    ),
    "a legacy function_call as JSON text": (
        {
            "messages": [
                ASKED,
                {"role": "assistant", "function_call": json.dumps({"name": "add", "arguments": {"a": 2}})},
                {"role": "function", "content": "5"},
            ]
        },
        [ASKED, CALLED, tool("5")],
        {},
    ),
    "nothing is called": (
        {"messages": [ASKED] + [assistant("So:", tool_calls=nothing) for nothing in (False, 0, "", [], {})] + [ASKED]},
        [ASKED, *[assistant("So:")] * 5, ASKED],
        {},
    ),
    "a call beside an empty list of them": (
        {
            "messages": [
                ASKED,
                {"role": "assistant", "tool_calls": [], "function_call": {"name": "add", "arguments": {"a": 2}}},
                {"role": "assistant", "content": [], "tool_calls": []},
                tool("5"),
            ]
        },
        [ASKED, CALLED, assistant(""), tool("5", tool_call_id="call00000")],
        {},
    ),
    "capitals": (
        {
            "System": "Use tools.",
            "Tools": TOOLS,
            "Messages": [
                {"Role": "User", "Content": "What is 2 + 3?"},
                {"ROLE": "Assistant", "CONTENT": None, "tool_calls": call({"a": 2})},
                {"Role": "Tool", "Content": "5"},
            ],
        },
        [system("Use tools."), ASKED, CALLED, tool("5")],
        {"tools": TOOLS},
    ),
    "capitals of ShareGPT": (
        {
            "Conversations": [
                {"From": "System", "Value": "Sum."},
                {"From": "Human", "Value": "What is 2 + 3?"},
                {"From": "GPT", "Value": "5"},
            ]
        },
        [system("Sum."), ASKED],
        {},
    ),
    "capitals of Alpaca": (
        {"Instruction": "What is", "Input": "2 + 3?", "Output": "5", "History": [["Hi", "Yes?"]]},
        [user("Hi"), assistant("Yes?"), user("What is\n\n2 + 3?")],
        {},
    ),
    "capitals of a pair": (
        {"Chosen": [ASKED, assistant("5")], "Rejected": [ASKED, assistant("6")]},
        [ASKED],
        {},
    ),
    "no pictures": (
        {
            "prompt": "What is <image>?",
            "images": [],
            "image": None,
            "videos": None,
            "audio": {"bytes": None, "path": ""},
        },
        [user("What is <image>?")],
        {},
    ),
    "LLaMA-Factory's calls": (
        {
            "conversations": [
                {"from": "human", "value": "What is 2 + 3?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "5"},
            ],
            "system": "Use tools.",
            "tools": json.dumps([ADD]),
        },
        [system("Use tools."), ASKED, CALLED, tool("5")],
        {"tools": TOOLS},
    ),
    "LLaMA-Factory's calls with thoughts": (
        {
            "conversations": [
                {"from": "human", "value": "What is 2 + 3?"},
                {"from": "function_call", "value": '<think>a</think>[{"name": "add", "arguments": "{\\"a\\": 2}"}]'},
                {"from": "observation", "value": "5"},
            ]
        },
        [ASKED, CALLED | {"content": "<think>a</think>"}, tool("5")],
        {},
    ),
    "system and history": (
        {"instruction": "And 1?", "input": "", "output": "4", "system": "Be brief.", "history": [["2?", "5"]]},
        [system("Be brief."), user("2?"), assistant("5"), user("And 1?")],
        {},
    ),
    "history as JSON text": (
        {"question": "And 1?", "history": '[["2?", "5"], ["3?", "6"]]', "system_prompt": "Be brief."},
        [system("Be brief."), user("2?"), assistant("5"), user("3?"), assistant("6"), user("And 1?")],
        {},
    ),
    "history of messages": (
        {"prompt": "And 1?", "history": [user("2?"), assistant("5")]},
        [user("2?"), assistant("5"), user("And 1?")],
        {},
    ),
    "history that is none": (
        {"instruction": "And 1?", "history": "asthma", "system": ""},
        [user("And 1?")],
        {},
    ),
    "a system message of its own": (
        {"conversations": [{"from": "system", "value": "Mine."}, {"from": "human", "value": "Hi"}], "system": "Other."},
        [system("Mine."), user("Hi")],
        {},
    ),
    "other roles": (
        {
            "conversations": [
                {"from": "Human", "value": "a"},
                {"from": "chatgpt", "value": "b"},
                {"from": "USER", "value": "c"},
                {"from": "bing", "value": "d"},
                {"from": "user", "value": "e"},
                {"from": "GPT-4o", "value": "f"},
                {"role": "prompter", "text": "g"},
            ]
        },
        [user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f"), user("g")],
        {},
    ),
    "null beside a refusal": (
        {"messages": [ASKED, assistant(None, refusal="No."), user("And?")]},
        [ASKED, assistant(""), user("And?")],
        {},
    ),
    "null beside reasoning": (
        {"messages": [ASKED, assistant(None, reasoning_content="hm"), user("And?")]},
        [ASKED, assistant("", reasoning_content="hm"), user("And?")],
        {},
    ),
    "reasoning by another name": (
        {"messages": [ASKED, assistant("5", thinking="hm", tool_calls=None), user("And?")]},
        [ASKED, assistant("5", reasoning_content="hm"), user("And?")],
        {},
    ),
    "parts with value": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "value": "What is "}, {"type": "text", "value": "2 + 3?"}],
                },
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "hm"},
                        {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                    ],
                },
                {"role": "tool", "content": [{"type": "text", "value": "5"}]},
            ],
            "tools": json.dumps(TOOLS),
        },
        [ASKED, assistant("", reasoning_content="hm", tool_calls=call({"a": 2})), tool("5")],
        {"tools": TOOLS},
    ),
    "chosen_messages": (
        {
            "chosen_messages": [{"role": "user", "content": [{"type": "text", "value": "Hi"}]}, assistant("a")],
            "rejected_messages": [{"role": "user", "content": [{"type": "text", "value": "Hi"}]}, assistant("b")],
        },
        [user("Hi")],
        {},
    ),
    "messages as JSON text": ({"messages": json.dumps([system("Be brief."), ASKED])}, [system("Be brief."), ASKED], {}),
    "prompt as JSON text": ({"prompt": " " + json.dumps([ASKED, assistant("5")])}, [ASKED], {}),
    "conversations as JSON text": ({"conversations": '[{"from": "human", "value": "Hi"}]'}, [user("Hi")], {}),
    "a text that is other JSON": ({"prompt": '[{"a": 1}]'}, [user('[{"a": 1}]')], {}),
    "the row's own variables": (
        {"prompt": "Hi", "chat_template_kwargs": {"enable_thinking": False, "effort": "low"}},
        [user("Hi")],
        {"enable_thinking": False, "effort": "low"},
    ),
    "variables as JSON text": (
        {"custom_id": "a", "body": {"messages": [user("Hi")], "chat_template_kwargs": '{"effort": "low"}'}},
        [user("Hi")],
        {"effort": "low"},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_both_models_see(run, rendered, name):
    row, messages, options = ROWS[name]
    (sample,), (numbers,), errors = run([row])
    assert not errors
    assert numbers["prompt_ids_theta"] == rendered(messages, TEXT, **options)
    assert numbers["prompt_ids_t"] == rendered(in_parts(messages), PARTS, **options)
    assert [m["role"] for m in sample["messages"]] == [*(m["role"] for m in messages), "assistant"]
    assert all(isinstance(m["content"], str) for m in sample["messages"])


def test_arguments_stay_as_they_were_in_the_output(run):
    (sample,), _, _ = run([{"messages": [ASKED, TEXT_CALL, tool("5")], "tools": json.dumps(TOOLS)}])
    assert sample["messages"][:3] == [ASKED, TEXT_CALL, tool("5")]
    assert sample["metadata"]["tools"] == json.dumps(TOOLS)


TEXTS = [{"type": "text", "text": "What is"}, {"type": "text", "text": " 2 + 3?"}]


@pytest.mark.parametrize(
    ("template", "content"),
    [(TEXT, "What is\n 2 + 3?"), (PARTS, TEXTS), (BOTH, TEXTS)],
    ids=["text", "parts", "both"],
)
def test_text_parts_are_joined_by_templates_that_take_them(run, rendered, template, content):
    messages = [system("Sum."), {"role": "user", "content": TEXTS}]
    (sample,), (numbers,), _ = run([{"messages": messages}], theta=template, t=template)
    seen = [{"role": "user", "content": content}]
    expected = rendered((in_parts if template == PARTS else list)([system("Sum.")]) + seen, template)
    assert numbers["prompt_ids_theta"] == numbers["prompt_ids_t"] == expected
    assert sample["messages"][1] == user("What is\n 2 + 3?")


MIXED = "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% else %}" + PART + "{% endif %}{% endfor %}"
FIRST = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    "{% for m in messages %}{{ m.content[0]['text'] if m.content[0].type == 'text' else 1 / 0 }}{% endfor %}"
)
FORMS = {
    "text": (TEXT, {"user": {"text"}, "system": {"text"}, "tool": {"text"}}),
    "parts": (PARTS, {"user": {"parts"}, "assistant": {"parts"}, "tool": {"parts"}}),
    "both": (BOTH, {"user": {"text", "parts"}, "assistant": {"text", "parts"}}),
    "by role": (MIXED, {"user": {"parts"}, "system": {"text"}, "assistant": {"parts"}}),
    "one part": (FIRST, {"user": set(), "system": set()}),
    "one part, or an error": (STRICT, {"user": set(), "system": set()}),
    "as Python prints a list": ("{{ messages }}", {"user": {"text"}, "tool": {"text"}}),
    "no text at all": ("{{ messages | length }}", {"user": {"text"}}),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_that_a_template_takes(tokenizer, name):
    template, expected = FORMS[name]
    assert {role: content_forms(tokenizer, template, role) for role in expected} == expected


def test_a_hint_in_parts(run, rendered):
    rows = [{"messages": [{"role": "user", "content": TEXTS}, CALLED, tool("5")], "note": "Add."}]
    _, (numbers,), _ = run(rows, "--t-hint-field", "note")
    hinted = in_parts([user("What is 2 + 3?\n\nHint: Add."), CALLED, tool("5")])
    assert numbers["prompt_ids_t"] == rendered(hinted, PARTS)
    assert numbers["prompt_ids_theta"] == rendered([user("What is\n 2 + 3?"), CALLED, tool("5")], TEXT)


def test_variables_of_each_side(run, rendered):
    rows = [{"prompt": "Hi"}, {"prompt": "Hi", "chat_template_kwargs": {"effort": "high"}}]
    given = ["--theta-template-kwargs", '{"effort": "low"}', "--t-template-kwargs", '{"enable_thinking": false}']
    _, (plain, own), _ = run(rows, *given)
    for numbers, theta, t in ((plain, {"effort": "low"}, {}), (own, {"effort": "high"}, {"effort": "high"})):
        assert numbers["prompt_ids_theta"] == rendered([user("Hi")], TEXT, **theta)
        assert numbers["prompt_ids_t"] == rendered(in_parts([user("Hi")]), PARTS, enable_thinking=False, **t)


def test_other_variables_are_another_run(tmp_path, capsys):
    template = tmp_path / "x.jinja"
    template.write_text(TEXT)
    argv = ["--num-samples", "2", "--max-new-tokens", "2", "--output", str(tmp_path / "x.jsonl")]
    argv += ["--theta-chat-template", str(template)]
    assert generate([*argv, "--theta-template-kwargs", '{"effort": "low"}']) == 0
    assert generate([*argv, "--theta-template-kwargs", '{"effort": "low"}']) == 0
    for other in ([], ["--theta-template-kwargs", '{"effort": "high"}']):
        capsys.readouterr()
        assert generate([*argv, *other]) == 1
        error = capsys.readouterr().err
        assert "--theta-template-kwargs = {'effort': 'low'}" in error
        assert error.count("\n") == 1


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    argv = ["--num-samples", "2", "--max-new-tokens", "2", "--output", str(tmp_path / "x.jsonl")]
    assert generate(argv) == 0
    path = tmp_path / "x.run.json"
    new = ("template-kwargs", "--continue-final-message", "--stop-token-ids", "--keep-special-tokens")
    settings = {k: v for k, v in json.loads(path.read_text()).items() if not k.endswith(new)}
    path.write_text(json.dumps(settings))
    assert generate(argv) == 0


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--theta-template-kwargs", "5"], "--theta-template-kwargs: '5' must be a JSON object"),
        (["--t-template-kwargs", '{"tools": []}'], "--t-template-kwargs: 'tools' is no variable for a chat template"),
        (["--t-template-kwargs", '{"messages": []}'], "'messages' is no variable"),
        (["--stop-token-ids", "-1"], "must be a token's id"),
    ],
)
def test_options_that_cannot_be(capsys, argv, named):
    with pytest.raises(SystemExit):
        generate(argv)
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--theta-template-kwargs", '{"efort": 1}'], "the chat template of theta does not read 'efort'"),
        (["--t-chat-template", "none", "--t-template-kwargs", '{"effort": 1}'], "of t does not read 'effort'"),
        (["--stop", "<|end|>\n"], "stop '<|end|>\\n' has the special token '<|end|>' among other text"),
        (["--stop-token-ids", "5", "2048"], "stop token 2048 is beyond the vocabulary, up to 2047"),
    ],
)
def test_options_that_the_models_cannot_follow(tmp_path, capsys, argv, named):
    assert generate(["--num-samples", "2", "--output", str(tmp_path / "x.jsonl"), *argv]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_what_a_template_does_not_read_is_said(run, capsys):
    turns = [ASKED, CALLED, tool("5")]
    (_,), _, _ = run([{"prompt": turns, "tools": TOOLS, "chat_template_kwargs": {"x": 1}}], theta=None, t=TEXT)
    said = capsys.readouterr().out
    for name in ("tools", "tool_calls"):
        assert f"the chat template of theta does not read `{name}`, which rows have" in said
        assert f"of t does not read `{name}`" not in said
    assert "the chat template of t does not read `x`, which rows have" in said
    run([{"prompt": turns}], "--theta-chat-template", "none", theta=None, t=TEXT)
    assert "the chat template of theta does not read `tool_calls`, which rows have" in capsys.readouterr().out
    run([{"prompt": [ASKED, CALLED]}], theta=None, t=TEXT)  # it is the answer
    assert "tool_calls" not in capsys.readouterr().out


def test_what_the_vocabulary_leaves_out_is_said(run, capsys, demo_pair, monkeypatch):
    monkeypatch.setattr(demo_pair, "notes", ["the pad token '[pad]' of t (2048) is left out"])
    run([{"prompt": "Hi"}])
    assert "Warning: the pad token '[pad]' of t (2048) is left out" in capsys.readouterr().out


NO_MEDIA = "is not empty; accepted: text only, which is all that the models would see"
BAD_ROWS = [
    *(
        ({"prompt": "<image>What is this?", name: value}, f"`{name}` {NO_MEDIA}")
        for name, value in (
            ("images", ["a.png"]),
            ("image", {"bytes": "iVBORw0KGgo=", "path": None}),
            ("videos", [["a.png", "b.png"]]),
            ("video", "a.mp4"),
            ("audios", ["a.wav"]),
            ("audio", {"array": [0.0], "sampling_rate": 16000}),
            ("Images", ["a.png"]),
            ("image_url", "a.png"),
            ("images", '["a.png"]'),
            ("images", [0]),
        )
    ),
    *(
        ({"prompt": [user("What is this?") | {name: "a.png"}]}, f"turn 0 of `prompt`: `{name}` {NO_MEDIA}")
        for name in ("image_url", "Audio_URL")
    ),
    *(
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What is this?", name: "a.png"}]}]},
            f"turn 0 of `prompt`: `{name}` {NO_MEDIA}",
        )
        for name in ("image", "image_url", "input_audio")
    ),
    ({"prompt": [user("<image>") | {"images": ["a.png"]}]}, f"turn 0 of `prompt`: `images` {NO_MEDIA}"),
    *(
        (
            {"prompt": [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]},
            f"turn 0 of `prompt` has a part of type '{kind}'; accepted: text, reasoning, tool_call, refusal",
        )
        for kind, part in (
            ("image", {"type": "image"}),
            ("image", {"image": "a.png"}),
            ("image_url", {"image_url": {"url": "a.png"}}),
            ("input_audio", {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
            ("audio_url", {"type": "audio_url", "audio_url": "a.wav"}),
            ("file", {"type": "file", "file": {"file_id": "a"}}),
        )
    ),
    ({"prompt": "Hi", "tools": "a calculator"}, "`tools` is no list of objects, nor the JSON of one"),
    ({"prompt": "Hi", "tools": ["add"]}, "`tools` is no list of objects, nor the JSON of one"),
    ({"prompt": "Hi", "functions": ["add"]}, "`functions` is no list of objects, nor the JSON of one"),
    (
        {"prompt": "Hi", "tools": [ADD | {"parameters": "a"}]},
        "`tools`: the parameters of 'add' are no JSON object",
    ),
    (
        {"prompt": "Hi", "tools": '{"name": "f", "x": ' + '{"x": ' * 600 + "1" + "}" * 601},
        "is nested too deep",
    ),
    ({"prompt": "Hi", "system": 5}, "`system` is of type int, not text"),
    ({"prompt": "Hi", "history": [["a"]]}, "`history` is no list of pairs of what the user and the assistant said"),
    ({"prompt": "Hi", "history": [["a", None]]}, "turn 1 of `history` is missing, not text"),
    (
        {"prompt": "Hi", "chat_template_kwargs": "low"},
        "`chat_template_kwargs` is text, not an object nor the JSON of one",
    ),
    (
        {"prompt": "Hi", "chat_template_kwargs": {"tokenize": False}},
        "'tokenize' is no variable for a chat template: transformers or the command itself sets it",
    ),
    (
        {"prompt": [ASKED, assistant("", tool_calls=call("{a}")), tool("5")]},
        "the arguments of the call of 'add' are no JSON object",
    ),
    (
        {"prompt": [ASKED, assistant("", tool_calls=call([2])), tool("5")]},
        "the arguments of the call of 'add' are no JSON object",
    ),
    ({"prompt": [ASKED, assistant("", tool_calls="add(2)"), tool("5")]}, "`tool_calls` is no list of calls"),
    (
        {"prompt": [ASKED, {"from": "function_call", "value": "add(2)"}, tool("5")]},
        "turn 1 of `prompt`: the call is no JSON with `name` and `arguments`",
    ),
    (
        {"prompt": [ASKED, assistant(None, function_call="add(2)"), tool("5")]},
        "turn 1 of `prompt`: the call is no JSON with `name` and `arguments`",
    ),
    ({"prompt": [ASKED, assistant(None), user("And?")]}, "turn 1 of `prompt` is missing, not text"),
    (
        {"prompt": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}]},
        "turn 0 of `prompt` has a part of type \"['text']\"; accepted: text, reasoning, tool_call, refusal",
    ),
    (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "video", "video": "b"}]}]},
        "turn 0 of `prompt` has a part of type 'video'; accepted: text, reasoning, tool_call, refusal",
    ),
]


def test_bad_rows_are_errors_and_the_others_run(run):
    samples, _, errors = run([*(row for row, _ in BAD_ROWS), {"prompt": "Hi"}])
    assert [error["error"] for error in errors] == [reason for _, reason in BAD_ROWS]
    assert [sample["prompt_index"] for sample in samples] == [len(BAD_ROWS)]
    assert run.code == 1


PREFIXED = [ASKED, assistant("The answer is")]


def test_a_final_message_is_continued(run, rendered):
    rows = [{"prompt": PREFIXED}, {"prompt": "Hi"}, {"prompt": json.dumps(PREFIXED)}]
    samples, diagnostics, _ = run(rows, "--continue-final-message")
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    for messages, options, numbers in zip(
        (PREFIXED, [user("Hi")], PREFIXED), (continued, {}, continued), diagnostics, strict=True
    ):
        assert numbers["prompt_ids_theta"] == rendered(messages, TEXT, **options)
        assert numbers["prompt_ids_t"] == rendered(in_parts(messages), PARTS, **options)
    first, plain, _ = samples
    assert [m["role"] for m in first["messages"]] == ["user", "assistant"]
    assert first["messages"][1]["content"].startswith("The answer is")
    assert "reference_messages" not in first["metadata"]
    assert plain["messages"][0] == user("Hi")
    (cut, *_), _, _ = run(rows)
    assert cut["metadata"]["reference_messages"] == PREFIXED[1:]


def test_space_at_the_end_of_a_continued_message(run, rendered):
    """It is what the answer goes on after, or the row is refused."""
    rows = [{"prompt": [ASKED, assistant("The answer is ")]}]
    _, (numbers,), _ = run(rows, "--continue-final-message", t=TEXT)
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert numbers["prompt_ids_t"] == rendered(rows[0]["prompt"], TEXT, **options)
    trimmed = TEXT.replace("{{ m.content }}", "{{ m.content | trim }}")
    _, _, (error,) = run(rows, "--continue-final-message", t=trimmed)
    assert error["error"] == "the chat template drops the space at the end of the message to be continued"


@pytest.mark.parametrize("template", [TEXT, "none"])
def test_a_call_is_not_continued(run, template):
    """transformers would cut it off."""
    argv = ["--continue-final-message"]
    argv += ["--theta-chat-template", template, "--t-chat-template", template] if template == "none" else []
    of_sides = dict.fromkeys(("theta", "t"), None if template == "none" else template)
    rows = [{"prompt": [ASKED, assistant("So:", tool_calls=call({"a": 2}))]}, {"prompt": [ASKED, CALLED, tool("5")]}]
    samples, _, (error,) = run(rows, *argv, **of_sides)
    assert error["error"] == "the message to be continued calls tools, and no text goes on behind a call"
    assert [sample["prompt_index"] for sample in samples] == [1]


def test_a_continued_text_without_a_template(run, tokenizer):
    _, (numbers,), _ = run(
        [{"prompt": PREFIXED}], "--continue-final-message", "--theta-chat-template", "none", theta=None
    )
    assert numbers["prompt_ids_theta"] == tokenizer("What is 2 + 3?\n\nThe answer is")["input_ids"]


def test_continued_answers_are_scored(run, rendered, tokenizer):
    rows = [{"prompt": PREFIXED, "completion": " 5."}]
    (sample,), (numbers,), _ = run(rows, "--continue-final-message", command=score)
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert numbers["prompt_ids_theta"] == rendered(PREFIXED, TEXT, **options)
    answer = tokenizer(" 5.", add_special_tokens=False)["input_ids"]
    assert numbers["tokens"]["id"] == [*answer, tokenizer.eos_token_id]
    assert sample["messages"] == [ASKED, assistant("The answer is 5.")]


def test_a_continued_run_is_scored_again(run):
    (sample,), _, _ = run([{"prompt": PREFIXED}], "--continue-final-message")
    (again,), _, _ = run(run.folder / "x.jsonl", theta=None, t=None, command=score)
    assert again == sample


ANSWERED = {
    "behind a tool's result": (
        {"messages": [ASKED, TEXT_CALL, tool("5"), assistant("It is 5.")]},
        [ASKED, CALLED, tool("5")],
    ),
    "of a pair": (
        {"chosen_messages": [ASKED, assistant("It is 5.")], "rejected_messages": [ASKED, assistant("6")]},
        [ASKED],
    ),
    "as JSON text": ({"messages": json.dumps([ASKED, assistant("It is 5.")])}, [ASKED]),
    "a completion as JSON text": (
        {"prompt": "What is 2 + 3?", "completion": json.dumps([assistant("It is 5.")])},
        [ASKED],
    ),
    "in parts": (
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "value": "It is 5."}]}]},
        [ASKED],
    ),
    "in capitals": ({"Question": "What is 2 + 3?", "Answer": "It is 5."}, [ASKED]),
    "a completion in capitals": (
        {"prompt": "What is 2 + 3?", "completion": {"Role": "Assistant", "Content": "It is 5."}},
        [ASKED],
    ),
    "with history": (
        {"instruction": "What is 2 + 3?", "output": "It is 5.", "history": [["a", "b"]]},
        [user("a"), assistant("b"), ASKED],
    ),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_score_finds_the_answer(run, rendered, tokenizer, name):
    row, messages = ANSWERED[name]
    (sample,), (numbers,), errors = run([row], command=score)
    assert not errors
    assert numbers["prompt_ids_theta"] == rendered(messages, TEXT)
    assert numbers["prompt_ids_t"] == rendered(in_parts(messages), PARTS)
    assert numbers["tokens"]["id"] == [*tokenizer("It is 5.")["input_ids"], tokenizer.eos_token_id]
    assert sample["messages"][-1] == assistant("It is 5.")


WRITES_CALLS = {
    "a call": assistant("", tool_calls=call({"a": 2})),
    "a call as JSON text": assistant(None, tool_calls=call('{"a": 2}')),
    "a text and a call": assistant("So:", tool_calls=call({"a": 2})),
    "a thought": assistant("5", reasoning_content="hm"),
}


@pytest.mark.parametrize("name", WRITES_CALLS)
@pytest.mark.parametrize("column", ["messages", "completion"])
def test_an_answer_that_is_more_than_text_is_scored_as_the_template_writes_it(run, rendered, tokenizer, name, column):
    answer = WRITES_CALLS[name]
    row = {"messages": [ASKED, answer]} if column == "messages" else {"prompt": [ASKED], "completion": [answer]}
    (sample,), (numbers,), errors = run([row | {"tools": TOOLS}], command=score)
    assert not errors
    whole = [ASKED, answer | {"content": answer["content"] or ""}]
    if "tool_calls" in answer:
        whole[1]["tool_calls"] = call({"a": 2})
    both = numbers["prompt_ids_theta"] + numbers["tokens"]["id"]
    end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert both + end == rendered(whole, TEXT, tools=TOOLS, add_generation_prompt=False)
    assert both[-1] == tokenizer.eos_token_id
    assert sample["messages"] == [ASKED, answer | {"content": answer["content"] or ""}]


def test_an_answer_that_a_template_does_not_write_is_refused(run):
    row = {"messages": [ASKED, CALLED]}
    (error,) = run([row], theta=None, command=score)[2]
    assert error["error"] == "the answer calls tools, and the chat template does not write `tool_calls`"
    (error,) = run([row], "--theta-chat-template", "none", theta=None, command=score)[2]
    assert error["error"] == "the answer calls tools or has thoughts, which only a chat template can write"
    thinks = TEXT.replace("<|assistant|>\n", "<|assistant|>\n<think>")
    (error,) = run([row], theta=thinks, command=score)[2]
    assert error["error"] == "the chat template does not write the answer behind what it asks with"
    (error,) = run([{"prompt": PREFIXED, "completion": [CALLED]}], "--continue-final-message", command=score)[2]
    assert error["error"] == "the answer calls tools or has thoughts, and cannot go on from a message"
    (error,) = run([{"messages": [ASKED, assistant(None, refusal="No.")]}], command=score)[2]
    assert error["error"] == "`reference_messages` is empty"


IDS = TEXT.replace("{{ c.function.name }}", "{{ c.id }}{{ c.function.name }}")
IDS = IDS.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_call_id }}")
LEGACY = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}}
RESULT = {"from": "observation", "value": "5"}


@pytest.mark.parametrize(
    "turns",
    [
        [LEGACY, {"role": "function", "name": "add", "content": "5"}],
        [{"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}, RESULT],
        [
            {
                "role": "assistant",
                "content": [{"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'}],
            },
            {"role": "tool", "content": "5"},
        ],
    ],
)
def test_calls_of_formats_without_ids_get_some(run, rendered, turns):
    """Of nine letters and digits, as Mistral's templates want them."""
    (sample,), (numbers,), _ = run([{"messages": [ASKED, *turns, *turns]}], theta=IDS)
    seen = []
    for number in ("call00000", "call00001"):
        seen += [assistant("", tool_calls=[{"id": number, **call({"a": 2})[0]}]), tool("5", tool_call_id=number)]
    assert numbers["prompt_ids_theta"] == rendered([ASKED, *seen], IDS)
    assert [m.get("tool_call_id") for m in sample["messages"]][1:-1] == [None, "call00000", None, "call00001"]


def test_ids_of_two_calls_at_once(run):
    calls = [{"name": name, "arguments": {}} for name in ("add", "sub")]
    turns = [{"from": "function_call", "value": json.dumps(calls)}, RESULT, RESULT, {"from": "human", "value": "And?"}]
    (sample,), _, _ = run([{"conversations": [{"from": "human", "value": "Hi"}, *turns]}])
    ids = ["call00000", "call00001"]
    assert [c["id"] for c in sample["messages"][1]["tool_calls"]] == ids
    assert [m["tool_call_id"] for m in sample["messages"][2:4]] == ids


def test_an_empty_list_of_calls_closes_none(run):
    turns = [LEGACY, assistant("So:", tool_calls=[]), tool("5"), user("And?")]
    (sample,), _, _ = run([{"messages": [ASKED, *turns]}])
    assert sample["messages"][3]["tool_call_id"] == "call00000"


def test_one_bos(tokenizer):
    """A rendered prompt brings its own BOS, which tokenizers for base models would put, too."""
    adds = transformers.AutoTokenizer.from_pretrained(THETA, bos_token="<|system|>")
    adds._tokenizer.post_processor = transformers.tokenization_utils_tokenizers.processors.TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 1)]
    )
    plain = PromptFormat("none")
    for text, expected in (
        ("<|system|>Hi", adds("Hi")["input_ids"]),
        ("Hi", adds("Hi")["input_ids"]),
        ("<|system|><|system|>Hi", [1, *adds("Hi")["input_ids"]]),
    ):
        assert plain.encode(adds, [user(text)]) == expected
        assert PromptFormat("none").encode(tokenizer, [user(text)]) == tokenizer(text)["input_ids"]


def test_messages_of_the_library_may_have_no_content(tokenizer, rendered, tmp_path):
    (tmp_path / "x.jinja").write_text(TEXT)
    messages = [ASKED, {"role": "assistant", "tool_calls": call("{}")}, tool("5")]
    ids = PromptFormat(str(tmp_path / "x.jinja")).encode(tokenizer, messages)
    assert ids == rendered([ASKED, assistant("", tool_calls=call({})), tool("5")], TEXT)
    with pytest.raises(PromptError, match="no list of calls"):
        PromptFormat(str(tmp_path / "x.jinja")).encode(tokenizer, [ASKED, assistant("", tool_calls=["add"])])


def test_a_role_that_is_none():
    with pytest.raises(RowError, match="the role is None; accepted: system"):
        read_turn({"content": "a"}, "turn 0")


def test_what_goes_into_the_prompt_is_said(tmp_path):
    row = {"prompt": "Hi", "system": "Be brief.", "history": [["a", "b"]], "tools": TOOLS, "x": 1}
    assert load_prompts(str(write_lines(tmp_path / "x.jsonl", [row]))).description == (
        "prompt: the prompt is `prompt`; in front of it: `system`, `history`; for the template: `tools`; "
        "carried along: `tools`, `x`"
    )
    row = {"prompt": "Hi", "tools": TOOLS, "functions": [ADD]}
    said = load_prompts(str(write_lines(tmp_path / "x.jsonl", [row]))).description
    assert "for the template: `tools`; carried along: `tools`, `functions`" in said


@pytest.fixture
def without_eos(demo_pair):
    """The demo pair where `<|end|>`, which it has as the EOS, is one special token of many."""
    pair = copy.copy(demo_pair)
    pair.eos_ids = {1}
    return pair


QUESTIONS = ["Hi.", "How many eggs are 9 eggs and 8 eggs?", "What is 2 + 3?"]


@pytest.mark.parametrize("stop", [{"stop": ["<|end|>"]}, {"stop_token_ids": [0]}, {"stop": ["<|end|>", "<|end|>"]}])
@pytest.mark.parametrize("speculate", [0, 4])
def test_a_special_token_stops(demo_pair, without_eos, stop, speculate):
    """With the samples that the pair has whose EOS it is, and no turn behind it."""
    options = {"samples_per_prompt": 4, "max_new_tokens": 40, "speculate": speculate}
    ended, stopped = demo_pair.generate(QUESTIONS, **options), without_eos.generate(QUESTIONS, **stop, **options)
    assert stopped.token_ids == ended.token_ids
    assert stopped.texts == ended.texts
    assert stopped.finish_reasons == [reason.replace("eos", "stop") for reason in ended.finish_reasons]
    assert "stop" in stopped.finish_reasons


@pytest.mark.parametrize("speculate", [0, 4])
def test_kept_special_tokens(without_eos, tokenizer, speculate):
    """They are in the text, but for the one that ends it, and stop strings are looked for in what is shown."""
    options = {"samples_per_prompt": 4, "max_new_tokens": 60, "speculate": speculate, "keep_special_tokens": True}
    found = without_eos.generate(QUESTIONS, **options)
    assert any("<|end|>" in text for text in found.texts)
    for sample in found.samples:
        ids = sample.token_ids[:-1] if sample.finish_reason == "eos" else sample.token_ids
        assert sample.text == tokenizer.decode(ids)
    stopped = without_eos.generate(QUESTIONS, stop=["<|end|>"], **options)
    assert not any("<|end|>" in text for text in stopped.texts)
    assert [text.partition("<|end|>")[0] for text in found.texts] == stopped.texts


def test_an_ordinary_stop_token_is_left_out(demo_pair, tokenizer):
    whole = demo_pair.generate(QUESTIONS[:1], max_new_tokens=40).token_ids[0]
    (sample,) = demo_pair.generate(QUESTIONS[:1], max_new_tokens=40, stop_token_ids=[whole[3]]).samples
    assert sample.finish_reason == "stop"
    assert sample.token_ids == whole[: whole.index(whole[3]) + 1]
    assert sample.text == tokenizer.decode(sample.token_ids[:-1], skip_special_tokens=True)


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not beside this checkout")
@pytest.mark.parametrize(
    "name", ["tool_last", "tools_col", "args_string", "lf_alpaca", "null_content", "strmsg", "prefill", "two", "verl"]
)
def test_every_case(run, name):
    samples, _, errors = run(CASES / f"{name}.jsonl", "--continue-final-message")
    assert len(samples) == len(lines(CASES / f"{name}.jsonl"))
    assert not errors
    assert run.code == 0
