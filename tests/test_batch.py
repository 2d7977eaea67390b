"""OpenAI's batch requests: what both models see of each endpoint's, what they ask of sampling, and the answers."""

import json

import pytest
from chats import ADD, ASKED, PARTS, TEXT, TOOLS, assistant, call, in_parts, system, tool, user
from runs import lines, write_lines

from qstar.data.batch import CHAT, COMPLETIONS, ENDPOINTS, NEUTRAL, RESPONSES, USED, endpoint_of
from qstar.data.prompts import DataError, load_prompts
from qstar.generate import main as generate
from qstar.score import main as score

pytestmark = pytest.mark.usefixtures("loaded_once")


def request(url: str, prompt, custom_id: str = "a", /, **body) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", ENDPOINTS[url]: prompt} | body}


def said(role: str, text: str, kind: str = "input_text") -> dict:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


ITEM_CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 2}', "id": "fc_1"}
ITEM_RESULT = {"type": "function_call_output", "call_id": "c1", "output": "5"}
WITH_ID = assistant("", tool_calls=[{"id": "c1", **call({"a": 2})[0]}])
RESULT = tool("5", tool_call_id="c1")
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}

# Inputs of `/v1/responses` with what else the body has, and what of them transformers gets: messages, and what else.
INPUTS = {
    "text": ("What is 2 + 3?", {}, [ASKED], {}),
    "easy messages": ([user("Hi"), assistant("Yes?"), ASKED], {}, [user("Hi"), assistant("Yes?"), ASKED], {}),
    "messages of parts": (
        [said("developer", "Sum."), said("user", "Hi"), said("assistant", "Yes?", "output_text"), said("user", "2?")],
        {},
        [system("Sum."), user("Hi"), assistant("Yes?"), user("2?")],
        {},
    ),
    "instructions": ("What is 2 + 3?", {"instructions": "Sum."}, [system("Sum."), ASKED], {}),
    "instructions before a system message": (
        [system("Be brief."), ASKED],
        {"instructions": "Sum."},
        [system("Sum."), system("Be brief."), ASKED],
        {},
    ),
    "a call and its result": ([ASKED, ITEM_CALL, ITEM_RESULT], {}, [ASKED, WITH_ID, RESULT], {}),
    "a result in parts": (
        [ASKED, ITEM_CALL, ITEM_RESULT | {"output": [{"type": "input_text", "text": "5"}]}],
        {},
        [ASKED, WITH_ID, RESULT],
        {},
    ),
    "a thought, a text and two calls are one turn": (
        [ASKED, THOUGHT, said("assistant", "So:", "output_text"), ITEM_CALL, ITEM_CALL, ITEM_RESULT, ITEM_RESULT],
        {},
        [
            ASKED,
            assistant("So:", reasoning_content="hm", tool_calls=WITH_ID["tool_calls"] * 2),
            RESULT,
            RESULT,
        ],
        {},
    ),
    "thoughts that are encrypted": (
        [ASKED, {"type": "reasoning", "summary": [], "encrypted_content": "x"}, ITEM_CALL, ITEM_RESULT],
        {},
        [ASKED, WITH_ID, RESULT],
        {},
    ),
    "an answer at the end": ([ASKED, assistant("5")], {}, [ASKED], {}),
    "tools": ([ASKED], {"tools": [{"type": "function", **ADD}]}, [ASKED], {"tools": TOOLS}),
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_both_models_see_of_responses(run, rendered, name):
    given, body, messages, options = INPUTS[name]
    (sample,), (numbers,), errors = run([request(RESPONSES, given, **body)])
    assert not errors
    assert numbers["prompt_ids_theta"] == rendered(messages, TEXT, **options)
    assert numbers["prompt_ids_t"] == rendered(in_parts(messages), PARTS, **options)
    assert [m["role"] for m in sample["messages"]] == [*(m["role"] for m in messages), "assistant"]
    assert sample["id"] == "a-0"
    assert sample["metadata"]["body"] == {"model": "m"} | body


@pytest.mark.parametrize("prompt", ["What is 2 + 3?\n", ["What is 2 + 3?\n"]])
def test_completions_have_no_template(run, tokenizer, prompt):
    (sample,), (numbers,), _ = run([request(COMPLETIONS, prompt)])
    assert numbers["prompt_ids_theta"] == numbers["prompt_ids_t"] == tokenizer("What is 2 + 3?\n")["input_ids"]
    assert sample["messages"][0] == user("What is 2 + 3?\n")


BAD_REQUESTS = [
    (request(COMPLETIONS, ["a", "b"]), "`body.prompt` is a list of 2 texts; accepted: one text"),
    (request(COMPLETIONS, [5, 6]), "`body.prompt` is a list of token ids; accepted: one text"),
    (request(COMPLETIONS, [[5], [6]]), "`body.prompt` is a list of token ids; accepted: one text"),
    (request(COMPLETIONS, []), "`body.prompt` is an empty list, not text"),
    (request(COMPLETIONS, ""), "`body.prompt` is empty"),
    (
        request(COMPLETIONS, "a", suffix="b"),
        "`body.suffix` is not empty: q* answers what comes before, and does not see what comes after",
    ),
    (request(CHAT, [ASKED]), f"is a request of {CHAT}; accepted: one of {COMPLETIONS}, as the first is"),
    (
        {"custom_id": "x", "url": "/v1/embeddings", "body": {"prompt": "a"}},
        f"is no request; accepted: one of {COMPLETIONS}, as the first is",
    ),
    ({"custom_id": "x", "body": {}}, f"is no request; accepted: one of {COMPLETIONS}, as the first is"),
]
BAD_INPUTS = [
    ([], "`body.input` has no user turn"),
    (5, "`body.input` is of type int, not text, a list of messages or a list of user turns"),
    ([5], "item 0 of `body.input` is of type int, not an object"),
    ([{"role": "narrator", "content": "a"}], "item 0 of `body.input`: the role is 'narrator'; accepted: system"),
    (
        [ASKED, {"type": "item_reference", "id": "msg_1"}],
        "item 1 of `body.input` is of type 'item_reference'; accepted: message, function_call, function_call_output, "
        "reasoning",
    ),
    ([ASKED, {"type": "web_search_call", "id": "ws_1"}], "item 1 of `body.input` is of type 'web_search_call'"),
    ([ASKED, ITEM_CALL | {"arguments": {}}], "item 1 of `body.input`: the call has no `name` and `arguments` as text"),
    ([ASKED, ITEM_RESULT | {"output": None}], "item 1 of `body.input` is missing, not text"),
    ([ASKED, THOUGHT | {"summary": ["hm"]}], "item 1 of `body.input` has reasoning that is no text"),
    ([ASKED, THOUGHT | {"content": 5}], "item 1 of `body.input` has reasoning that is no text"),
    ([ASKED | {"images": ["a.png"]}], "item 0 of `body.input`: `images` is not empty; accepted: text only"),
    ([ASKED, ITEM_CALL, ITEM_RESULT | {"image_url": "a"}], "item 2 of `body.input`: `image_url` is not empty"),
    (
        [{"role": "user", "content": [{"type": "input_image", "image_url": "a.png"}]}],
        "item 0 of `body.input` has a part of type 'input_image'; accepted: text, reasoning, tool_call, refusal",
    ),
]
BAD_BODIES = [
    ({"previous_response_id": "resp_1"}, "`body.previous_response_id` is not empty: a part of the conversation is not"),
    ({"conversation": "conv_1"}, "`body.conversation` is not empty"),
    ({"prompt": {"id": "pmpt_1"}}, "`body.prompt` is not empty"),
    ({"tools": [{"type": "web_search"}]}, "`body.tools` has a tool of type 'web_search'; accepted: function"),
    ({"instructions": 5}, "`body.instructions` is of type int, not text"),
]


def test_bad_requests_are_errors_and_the_others_run(run):
    rows = [
        request(COMPLETIONS, "Hi", "good"),
        *(row | {"custom_id": str(i)} for i, (row, _) in enumerate(BAD_REQUESTS)),
    ]
    samples, _, errors = run(rows)
    assert [error["error"] for error in errors] == [reason for _, reason in BAD_REQUESTS]
    assert [sample["id"] for sample in samples] == ["good-0"]
    rows = [request(RESPONSES, given, str(i)) for i, (given, _) in enumerate(BAD_INPUTS)]
    rows += [request(RESPONSES, "Hi", f"body {i}", **body) for i, (body, _) in enumerate(BAD_BODIES)]
    samples, _, errors = run([*rows, request(RESPONSES, "Hi", "good")])
    reasons = [reason for _, reason in BAD_INPUTS + BAD_BODIES]
    assert all(e["error"].startswith(reason) for e, reason in zip(errors, reasons, strict=True)), errors
    assert [sample["id"] for sample in samples] == ["good-0"]


@pytest.mark.parametrize(
    ("row", "endpoint"),
    [
        ({"custom_id": "a", "body": {"messages": []}}, CHAT),
        ({"custom_id": "a", "body": {"prompt": "b"}}, COMPLETIONS),
        ({"custom_id": "a", "body": {"input": "b"}}, RESPONSES),
        ({"custom_id": "a", "url": "https://x/openai/responses?api-version=1", "body": {"input": "b"}}, RESPONSES),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"messages": []}}, COMPLETIONS),
        ({"custom_id": "a", "url": "/chat/completions", "body": {}}, CHAT),
        ({"custom_id": "a", "url": "http://[/v1/responses#a", "body": {"input": "b"}}, RESPONSES),
        ({"custom_id": "a", "url": "http://[", "body": {"messages": []}}, CHAT),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {"input": "b"}}, None),
        ({"custom_id": "a", "body": {"model": "m"}}, None),
        ({"custom_id": "a", "params": {"messages": []}}, None),
        ({"body": {"messages": []}}, None),
    ],
)
def test_the_endpoint_of_a_request(row, endpoint):
    assert endpoint_of(row) == endpoint


def test_requests_are_described(tmp_path):
    path = str(write_lines(tmp_path / "x.jsonl", [request(COMPLETIONS, ["Hi"])]))
    begins = "OpenAI batch requests of /v1/completions: the prompt is `body.prompt`, without a chat template, the id is"
    assert load_prompts(path).description.startswith(begins)
    rows = [request(RESPONSES, "Hi", instructions="Sum.", tools=TOOLS, max_output_tokens=5, temperature=0.5)]
    path = str(write_lines(tmp_path / "x.jsonl", rows))
    begins = "OpenAI batch requests of /v1/responses: the prompt is `body.input`, the id is `custom_id`; "
    begins += "in front of it: `instructions`; for the template: `tools`; "
    begins += "carried along: `custom_id`, `method`, `url`, `body`; "
    parameters = "not used for sampling: `model`, `max_output_tokens`, `temperature` of `body`"
    assert load_prompts(path).description == begins + parameters
    parameters = (
        "used for sampling: `max_output_tokens`, `temperature` of `body`; not used for sampling: `model` of `body`"
    )
    assert load_prompts(path, use_request_parameters=True).description == begins + parameters
    path = str(write_lines(tmp_path / "x.jsonl", [{"prompt": "Hi"}]))
    with pytest.raises(DataError, match=r"--use-request-parameters: '.*' has no OpenAI batch requests"):
        load_prompts(path, use_request_parameters=True)


PROMPTS = {CHAT: [ASKED], COMPLETIONS: "<|user|>\nWhat is 2 + 3?<|end|>\n<|assistant|>\n", RESPONSES: [ASKED]}


@pytest.fixture
def models() -> dict:
    """The client's own classes of what the endpoints answer with."""
    types = pytest.importorskip("openai.types", reason="openai is not installed")
    return {CHAT: types.chat.ChatCompletion, COMPLETIONS: types.Completion, RESPONSES: types.responses.Response}


def test_tools_of_any_kind_are_in_the_answer(tmp_path):
    tools = ["a", {"function": 5}], ["b", {"x": 1}], ["c", {"type": "function", **ADD}]
    rows = [request(RESPONSES, "Hi", name, tools=[tool]) for name, tool in tools]
    argv = ["--dataset", str(write_lines(tmp_path / "data.jsonl", rows)), "--max-new-tokens", "2"]
    assert generate([*argv, "--output", str(tmp_path / "x.jsonl"), "--output-format", "openai-batch"]) == 0
    assert [line["response"]["body"]["tools"] for line in lines(tmp_path / "x.jsonl")] == [[t] for _, t in tools]


@pytest.mark.parametrize("url", ENDPOINTS)
def test_answers_are_those_of_the_endpoint(tmp_path, models, url):
    body = {"metadata": {"k": "v"}} | ({} if url == COMPLETIONS else {"tools": TOOLS})
    rows = [request(url, PROMPTS[url], name, **body) for name in ("tea", "milk")]
    data = str(write_lines(tmp_path / "data.jsonl", rows))
    argv = ["--dataset", data, "--max-new-tokens", "4"]
    assert generate([*argv, "--output", str(tmp_path / "x.jsonl"), "--output-format", "openai-batch"]) == 0
    assert generate([*argv, "--output", str(tmp_path / "y.jsonl"), "--save-diagnostics"]) == 0
    answers, diagnostics = lines(tmp_path / "x.jsonl"), lines(tmp_path / "y.diagnostics.jsonl")
    assert [line["custom_id"] for line in answers] == ["tea", "milk"]
    for line, plain, numbers in zip(answers, lines(tmp_path / "y.jsonl"), diagnostics, strict=True):
        assert (line["error"], line["response"]["status_code"]) == (None, 200)
        answer = models[url].model_validate(line["response"]["body"], strict=True)
        assert not answer.model_extra
        assert answer.usage.total_tokens == len(numbers["prompt_ids_theta"]) + numbers["num_tokens"]
        logq = numbers["tokens"]["logq"]
        if url == RESPONSES:
            (message,) = answer.output
            text = answer.output_text
            assert [token.logprob for token in message.content[0].logprobs] == logq
            assert answer.metadata == {"k": "v"}
            assert [tool.name for tool in answer.tools] == ["add"]
            cut = plain["finish_reason"] == "length"
            assert answer.status == message.status == ("incomplete" if cut else "completed")
            assert (answer.incomplete_details is not None) == cut
        elif url == COMPLETIONS:
            text = answer.choices[0].text
            assert answer.choices[0].logprobs.token_logprobs == logq
            of_token = answer.choices[0].logprobs
            assert "".join(of_token.tokens)[of_token.text_offset[1] :].startswith(of_token.tokens[1])
        else:
            text = answer.choices[0].message.content
            assert [token.logprob for token in answer.choices[0].logprobs.content] == logq
        assert text == plain["messages"][-1]["content"]


# What requests ask for, and the same of `Pair.generate`; the samples of each, three unless it asks for others.
ASKED_FOR = {
    "nothing": ({}, {}),
    "temperature": ({"temperature": 0}, {"temperature": 0.0}),
    "top_p, top_k and min_p": ({"top_p": 0.5, "top_k": 4, "min_p": 0.1}, {"top_p": 0.5, "top_k": 4, "min_p": 0.1}),
    "no top_k": ({"top_k": -1}, {}),
    "max_tokens": ({"max_tokens": 3}, {"max_new_tokens": 3}),
    "max_completion_tokens": ({"max_completion_tokens": 5}, {"max_new_tokens": 5}),
    "n": ({"n": 2}, {"samples_per_prompt": 2}),
    "seed": ({"seed": 7}, {"seed": 7}),
    "stop": ({"stop": [" is", "5"]}, {"stop": [" is", "5"]}),
    "a stop token": ({"stop": "<|end|>"}, {"stop": ["<|end|>"]}),
    "what does nothing": ({name: value for name, value in NEUTRAL.items() if name not in ("text", "echo")}, {}),
    "null": (dict.fromkeys(USED), {}),
}


@pytest.mark.parametrize("speculate", ["0", "3"])
def test_requests_are_sampled_as_they_ask(tmp_path, demo_pair, speculate):
    """In one run, with the samples that `Pair.generate` has for each by itself."""
    rows = [request(CHAT, [ASKED], name, **{"seed": 1} | body) for name, (body, _) in ASKED_FOR.items()]
    argv = ["--dataset", str(write_lines(tmp_path / "data.jsonl", rows)), "--samples-per-prompt", "3"]
    argv += ["--max-new-tokens", "12", "--use-request-parameters", "--save-diagnostics", "--speculate", speculate]
    path = tmp_path / "x.jsonl"
    assert generate([*argv, "--output", str(path)]) == 0
    written = lines(path)
    for name, (_, options) in ASKED_FOR.items():
        options = {"samples_per_prompt": 3, "max_new_tokens": 12, "seed": 1} | options
        if name == "null":  # then the run's own seed decides
            continue
        expected = demo_pair.generate(["What is 2 + 3?"], **options)
        found = [line for line in written if line["id"].rsplit("-", 1)[0] == name]
        assert [line["messages"][-1]["content"] for line in found] == expected.texts, name
        assert [line["finish_reason"] for line in found] == expected.finish_reasons, name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert generate([*argv, "--output", str(path)]) == 0
    assert path.read_bytes() == whole
    assert score(["--dataset", str(path), "--output", str(tmp_path / "again.jsonl")]) == 0
    pairs = zip(*(lines(tmp_path / f"{x}.diagnostics.jsonl") for x in ("x", "again")), strict=True)
    assert all(ours["logq_sum"] == pytest.approx(again["logq_sum"], abs=1e-4) for ours, again in pairs)


@pytest.mark.parametrize(
    ("ids", "taken"),
    [
        (["a*2", "a-0", "a-1", "a-2", "a-00", "b-0"], ["a-0", "a-1"]),
        (["a-0", "a*2", "b"], ["a"]),
        (["a*2", "a-0*2", "a-0-1"], ["a-0-1"]),
        (["a", "a-0", "a-0-0*3"], []),
    ],
)
def test_no_two_answers_have_one_id(tmp_path, ids, taken):
    rows = [request(CHAT, [ASKED], x.partition("*")[0], n=int(x.partition("*")[2] or 1)) for x in ids]
    argv = ["--dataset", str(write_lines(tmp_path / "data.jsonl", rows)), "--use-request-parameters"]
    argv += ["--max-new-tokens", "1", "--samples-per-prompt", "5"]
    x, y = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    assert generate([*argv, "--output", str(x), "--output-format", "openai-batch"]) == bool(taken)
    written = [line["custom_id"] for line in lines(x)]
    assert (
        len(set(written))
        == len(written)
        == sum(int(n or 1) for x, _, n in (x.partition("*") for x in ids) if x not in taken)
    )
    errors = lines(tmp_path / "x.errors.jsonl") if taken else []
    assert [error["id"] for error in errors] == taken
    assert all("`custom_id`" in error["error"] and "is taken by row" in error["error"] for error in errors)
    assert generate([*argv, "--output", str(y)]) == 0  # whose ids always have a number


def test_seeds_of_requests_do_not_depend_on_their_place(tmp_path):
    rows = [request(CHAT, [ASKED], name, seed=7) for name in ("one", "two")]
    argv = ["--dataset", str(write_lines(tmp_path / "data.jsonl", rows)), "--output", str(tmp_path / "x.jsonl")]
    assert generate([*argv, "--use-request-parameters", "--max-new-tokens", "12"]) == 0
    one, two = lines(tmp_path / "x.jsonl")
    assert one["messages"] == two["messages"]


def test_parameters_stay_unused_unless_asked_for(run):
    (sample,), _, _ = run([request(CHAT, [ASKED], n=3, max_tokens=1, presence_penalty=1)])
    assert sample["num_tokens"] == 2


def test_a_run_of_other_parameters_is_another_run(run, capsys):
    run([request(CHAT, [ASKED])])
    argv = ["--dataset", str(run.folder.parent / "data.jsonl"), "--output", str(run.folder / "x.jsonl")]
    argv += ["--max-new-tokens", "2", "--save-diagnostics", "--use-request-parameters"]
    for side in ("theta", "t"):
        argv += [f"--{side}-chat-template", str(run.folder / side)]
    assert generate(argv) == 1
    assert "--use-request-parameters = None and this run has True" in capsys.readouterr().err


BAD_PARAMETERS = [
    ({"temperature": -1}, "`body`: temperature is -1; it must be 0 (greedy)"),
    ({"temperature": "hot"}, "`body`: temperature is 'hot'; it must be"),
    ({"top_p": 0}, "`body`: top_p is 0; it must be in (0, 1]"),
    ({"n": 0}, "`body.n` is 0; accepted: a whole number of at least 1"),
    ({"n": True}, "`body.n` is True; accepted: a whole number of at least 1"),
    ({"max_tokens": 1.5}, "`body.max_tokens` is 1.5; accepted: a whole number of at least 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "`body` has several token limits: 5, 6"),
    ({"seed": "x"}, "`body.seed` is 'x'; accepted: a whole number"),
    ({"stop": [""]}, "`body.stop` is ['']; accepted: a text or a list of texts, none empty"),
    ({"stop": 5}, "`body.stop` is 5; accepted: a text or a list of texts, none empty"),
    ({"stop": "\ud800"}, "`body.stop` has half of a surrogate pair, which is no character"),
    ({"stop": "a<|end|>"}, "`body`: stop 'a<|end|>' has the special token '<|end|>' among other text"),
    ({"presence_penalty": 0.5}, "`body.presence_penalty` is 0.5, which q* does not have; accepted: 0"),
    ({"logit_bias": {"5": 1}}, "`body.logit_bias` is {'5': 1}, which q* does not have; accepted: {}"),
    (
        {"response_format": {"type": "json_object"}},
        "`body.response_format` is {'type': 'json_object'}, which q* does not have; accepted: {'type': 'text'}",
    ),
    ({"reasoning_effort": "low"}, "`body.reasoning_effort` has no meaning for q*; leave it out"),
]


def test_parameters_that_cannot_be(run):
    rows = [request(CHAT, [ASKED], str(i), **body) for i, (body, _) in enumerate(BAD_PARAMETERS)]
    samples, _, errors = run([*rows, request(CHAT, [ASKED], "good")], "--use-request-parameters")
    reasons = [reason for _, reason in BAD_PARAMETERS]
    assert all(e["error"].startswith(reason) for e, reason in zip(errors, reasons, strict=True)), errors
    assert [sample["id"] for sample in samples] == ["good-0"]
    _, _, errors = run(rows[:1])
    assert not errors
    assert json.loads((run.folder / "x.run.json").read_text())["--use-request-parameters"] is None
