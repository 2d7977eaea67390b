"""Prompts out of datasets: what is recognised, what the metadata keeps, and what is said when it does not work."""

import datetime
import gzip
import json
import random
import tarfile
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qstar.data.prompts import PEEK_ROWS, DataError, Prompt, load_prompts

FIXTURES = Path(__file__).parent / "fixtures" / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def load_row(write):
    """The prompt of a file with one row."""

    def load_row(row, prompt_field=None) -> Prompt:
        (prompt,) = load_prompts(write([row]), prompt_field=prompt_field)
        return prompt

    return load_row


SCHEMAS = {
    "messages": (
        {"messages": [user("Hi"), assistant("Hello"), user("Bye"), assistant("See you")], "score": 1},
        [user("Hi"), assistant("Hello"), user("Bye")],
        {"score": 1, "reference_messages": [assistant("See you")]},
    ),
    "messages stand before prompt": (
        {"prompt": "Hi", "messages": [user("Hi"), assistant("Yes?"), user("Bye")]},
        [user("Hi"), assistant("Yes?"), user("Bye")],
        {"prompt": "Hi"},
    ),
    "conversation with roles": ({"conversation": [user("Hi")]}, [user("Hi")], {}),
    "conversations with from": (
        {"conversations": [{"from": "human", "value": "Hi", "weight": 0}]},
        [{**user("Hi"), "weight": 0}],
        {},
    ),
    "preference": (
        {"prompt": "The sky", "chosen": " is blue", "rejected": " is not"},
        [user("The sky")],
        {"chosen": " is blue", "rejected": " is not"},
    ),
    "conversational preference": (
        {"prompt": [user("Sky?")], "chosen": [assistant("blue")], "rejected": [assistant("red")]},
        [user("Sky?")],
        {"chosen": [assistant("blue")], "rejected": [assistant("red")]},
    ),
    "implicit prompt": (
        {"chosen": [user("Sky?"), assistant("blue")], "rejected": [user("Sky?"), assistant("red")]},
        [user("Sky?")],
        {"chosen": [assistant("blue")], "rejected": [assistant("red")]},
    ),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, [user("a")], {"completion": "b"}),
    "conversational prompt and completion": (
        {"prompt": [user("a")], "completion": [assistant("b")]},
        [user("a")],
        {"completion": [assistant("b")]},
    ),
    "instruction and input": (
        {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Add. 1, 2 3"},
        [user("Add.\n\n1, 2")],
        {"output": "3", "text": "Add. 1, 2 3"},
    ),
    "instruction and empty input": (
        {"instruction": "Sing.", "input": "", "output": "La"},
        [user("Sing.")],
        {"output": "La"},
    ),
    "instruction and context": (
        {"instruction": "Sum up.", "context": "It rained."},
        [user("Sum up.\n\nIt rained.")],
        {},
    ),
    "instruction and instances": (
        {"instruction": "Negate.", "instances": [{"input": "yes", "output": "no"}, {"input": "up", "output": "down"}]},
        [user("Negate.\n\nyes")],
        {"instances": [{"input": "yes", "output": "no"}, {"input": "up", "output": "down"}]},
    ),
    "question and answer": (
        {"id": "q7", "question": "Why?", "answer": "So.", "error": "e", "index": 5},
        [user("Why?")],
        {"id": "q7", "answer": "So.", "error": "e", "index": 5},
    ),
    "question and responses": (
        {"question": "Why?", "response_j": "a", "response_k": "b"},
        [user("Why?")],
        {"response_j": "a", "response_k": "b"},
    ),
    "problem and solution": ({"problem": "1+1", "solution": "2"}, [user("1+1")], {"solution": "2"}),
    "query": ({"query": "Where?"}, [user("Where?")], {}),
    "text": ({"text": "Once"}, [user("Once")], {}),
    "input": ({"input": "Once"}, [user("Once")], {}),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(load_row, name):
    row, messages, metadata = SCHEMAS[name]
    assert load_row(row) == Prompt(0, "0", messages, [], metadata, None)


@pytest.mark.parametrize("column", ["turns", "prompt"])
def test_user_turns(load_row, column):
    prompt = load_row({"question_id": 81, column: ["First", "Second", "Third"], "reference": ["x"]})
    assert prompt == Prompt(0, "0", [user("First")], ["Second", "Third"], {"question_id": 81, "reference": ["x"]}, None)


def test_openai_requests():
    source = load_prompts(str(FIXTURES / "openai_batch.jsonl"))
    first, parts, repeated, image = source
    assert first.id == "tea-1"
    assert first.messages == [
        {"role": "system", "content": "Be brief."},
        user("How long does green tea steep?"),
    ]
    assert first.metadata["body"] == {"model": "m", "max_tokens": 9}
    texts = [{"type": "text", "text": text} for text in ("Name a tea", "from Assam.")]
    assert parts.messages == [{"role": "user", "content": texts}]
    assert repeated.error == "`custom_id` 'tea-1' is taken by row 0"
    assert (
        image.error
        == "turn 0 of `body.messages` has a part of type 'image_url'; accepted: text, reasoning, tool_call, refusal"
    )
    assert [image.id, image.messages] == ["tea-3", []]
    assert len({prompt.id for prompt in source}) == 4
    assert source.description == (
        "OpenAI batch requests: the prompt is `body.messages` but for an answer at its end, the id is `custom_id`; "
        "carried along: `custom_id`, `method`, `url`, `body`; not used for sampling: `model`, `max_tokens` of `body`"
    )


def test_ids_of_requests_stay_unique(write):
    def request(custom_id):
        return {"custom_id": custom_id, "body": {"messages": [user("a")]}}

    path = write([request("row-2"), request("a"), request("a"), request("row-3"), request(None), request(7)])
    prompts = list(load_prompts(path))
    assert [p.id for p in prompts] == ["row-2", "a", "row-2-", "row-3", "row-4", "7"]
    assert [p.index for p in prompts if p.error] == [2, 4]
    path = write([request(""), request("row-0"), request("\ud800"), request("\\ud800")])
    assert [p.error for p in load_prompts(path)] == [
        "`custom_id` is ''; accepted: text, not empty",
        None,
        None,
        "`custom_id` '\\\\ud800' is taken by row 2",
    ]


def test_ids_of_requests_behind_other_rows(write):
    """A row's number is its only id, so it is the request that is refused; named first, no row is."""
    requests = write(
        [{"custom_id": x, "body": {"messages": [user("a")]}} for x in ("1", "x", "row-1")], "requests.jsonl"
    )
    rows = write([{"prompt": "a"}] * 4, "rows.jsonl")
    *_, number, named, last = load_prompts([rows, requests])
    reason = "`custom_id` '1' is the id of row 1, which has no other; name the file of requests first"
    assert [number.error, named.error, last.error] == [reason, None, None]
    prompts = list(load_prompts([requests, rows]))
    assert [p.id for p in prompts] == ["1", "x", "row-1", "3", "4", "5", "6"]
    assert not any(p.error for p in prompts)


def test_sharegpt_file():
    birds, no_question = load_prompts(str(FIXTURES / "sharegpt.json"))
    assert [m["role"] for m in birds.messages] == ["system", "user", "assistant", "user"]
    assert birds.metadata == {"id": "a", "reference_messages": [assistant("The duck.")]}
    assert no_question.error == "`conversations` has no user turn"
    assert no_question.metadata["conversations"] == [{"from": "gpt", "value": "Hello."}]


def test_tool_turns_are_kept(load_row):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}], "name": None}
    answer = {"role": "tool", "content": "4", "tool_call_id": "1"}
    prompt = load_row({"messages": [user("2+2?"), call, answer, user("Sure?")]})
    assert prompt.messages[1] == {"role": "assistant", "content": "", "tool_calls": call["tool_calls"]}
    assert prompt.messages[2] == answer


def test_own_column_reference_messages_is_not_overwritten(load_row):
    prompt = load_row({"messages": [user("a"), assistant("b")], "reference_messages": "mine"})
    assert prompt.metadata == {"row.reference_messages": "mine", "reference_messages": [assistant("b")]}


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": " \n"}, "`prompt` is empty"),
        ({"prompt": 5}, "`prompt` is of type int, not text, a list of messages or a list of user turns"),
        ({"prompt": None}, "`prompt` is missing, not text, a list of messages or a list of user turns"),
        ({"prompt": []}, "`prompt` has no user turn"),
        ({"prompt": ["a", ""]}, "turn 1 of `prompt` is empty"),
        ({"prompt": ["a", {}]}, "`prompt` is a list, not text, a list of messages or a list of user turns"),
        ({"prompt": [assistant("a")]}, "`prompt` has no user turn"),
        ({"prompt": [user("")]}, "turn 0 of `prompt` is empty"),
        ({"prompt": [{"role": "user", "content": None}]}, "turn 0 of `prompt` is missing, not text"),
        (
            {"prompt": [{"role": "user", "content": [5]}]},
            "turn 0 of `prompt` has a part of type 'text'; accepted: text, reasoning, tool_call, refusal",
        ),
        ({"prompt": "\ud800"}, "`prompt` has half of a surrogate pair, which is no character"),
        ({"answer": "b"}, "has no `prompt`"),
        (["a"], "is a list, not an object"),
    ],
)
def test_row_that_is_no_prompt(write, row, error):
    good, bad = load_prompts(write([{"prompt": "a"}, row]))
    assert good.error is None
    assert (bad.index, bad.id, bad.error, bad.messages) == (1, "1", error, [])
    json.dumps(bad.metadata, ensure_ascii=False).encode()
    assert set(bad.metadata) == (set(row) if isinstance(row, dict) else {"row"})


def test_unknown_role(load_row):
    error = load_row({"messages": [{"role": "narrator", "content": "a"}]}).error
    assert error.startswith("turn 0 of `messages`: the role is 'narrator'; accepted: system, developer, user")


def test_instruction_with_input_that_is_no_text(load_row):
    assert load_row({"instruction": "a", "input": {"b": 1}}).error == "`input`: the input is an object, not text"
    error = load_row({"instruction": "a", "instances": ["b"]}).error
    assert error == "`instances` is a list, not a list of objects with `input`"


def test_types_may_change_over_the_rows(write):
    rows = [
        {"prompt": "a", "x": 1},
        {"prompt": [user("b")], "x": "one"},
        {"prompt": ["c", "d"], "x": [{}, {"k": None}]},
    ]
    prompts = list(load_prompts(write(rows)))
    assert [p.messages for p in prompts] == [[user("a")], [user("b")], [user("c")]]
    assert [p.metadata["x"] for p in prompts] == [1, "one", [{}, {"k": None}]]


def test_rows_stay_as_they_were(write):
    metadata = {"date": "2024-01-01T00:00:00", "kwargs": [{}, {"n": 3}], "number": 1, "big": 2**70}
    rows = [{"prompt": "a", **metadata}, {"prompt": "b", "number": 0.5, "kwargs": [{"relation": "less"}]}]
    first, second = load_prompts(write(rows))
    assert first.metadata == metadata
    assert second.metadata == {"number": 0.5, "kwargs": [{"relation": "less"}]}


@pytest.mark.parametrize(
    ("field", "row", "messages"),
    [
        ("text", {"prompt": "a", "text": "b"}, [user("b")]),
        ("body.messages", {"body": {"messages": [user("c")]}}, [user("c")]),
        ("a.b", {"a.b": "d", "a": {"b": "e"}}, [user("d")]),
        ("chat", {"chat": [{"from": "human", "value": "f"}]}, [user("f")]),
        ("asks", {"asks": ["g", "h"]}, [user("g")]),
    ],
)
def test_prompt_field(load_row, field, row, messages):
    assert load_row(row, field).messages == messages


def test_wrapped_list_is_said(write):
    path = write('{"version": 1, "data": [{"prompt": "a", "x": 1}]}', "wrapped.json")
    assert load_prompts(path).description == (
        "prompt: the prompt is `prompt`; carried along: `x`; "
        "the rows are the list `data` of the file (left out: `version`)"
    )


def test_single_object_is_one_row(write):
    (prompt,) = load_prompts(write(json.dumps({"conversations": [user("a")]}, indent=1), "one.json"))
    assert prompt.messages == [user("a")]


def test_line_separators_inside_a_string_are_no_lines(write):
    prompts = list(load_prompts(write('{"prompt": "a\u2028b\x85c"}\n{"prompt": "d"}')))
    assert [p.messages[0]["content"] for p in prompts] == ["a\u2028b\x85c", "d"]


def test_csv_cells_stay_text():
    numbers, lines, short = load_prompts(str(FIXTURES / "questions.csv"))
    assert numbers.metadata == {"answer": "007"}
    assert (lines.messages, lines.metadata) == ([user("Two lines,\none question?")], {"answer": "NA"})
    assert short.error == "has 1 fields where the header has 2"
    assert short.metadata == {"row": ["Only a question?"]}


@pytest.mark.parametrize("nothing", ["", " ", "[]", "{}", "null", "0", "false", "[null]", '""'])
def test_csv_cell_without_images(write, nothing):
    cell = '"' + nothing.replace('"', '""') + '"'
    none, some = load_prompts(write(f"prompt,images\na,{cell}\nb,x.png\n", "images.csv"))
    assert (none.error, none.metadata) == (None, {"images": nothing})
    assert some.error.startswith("`images` is not empty")


@pytest.mark.parametrize("nothing", [0, 0.0, False, [None], {"bytes": None}])
def test_row_without_images(load_row, nothing):
    assert load_row({"prompt": "a", "images": nothing}).error is None


def test_csv_takes_long_prompts(write):
    (prompt,) = load_prompts(write("prompt\n" + "a" * 2**18, "long.csv"))
    assert len(prompt.messages[0]["content"]) == 2**18


def test_parquet_values_become_json(tmp_path):
    path = tmp_path / "[rows].parquet"
    columns = {
        "prompt": ["a", "b"],
        "when": [datetime.datetime(2024, 5, 1), None],
        "raw": [b"\xff", b"text"],
        "x": [float("nan"), 0.5],
        "kwargs": [[{"n": 1}], [{}, {"relation": "less"}]],
    }
    pq.write_table(pa.table(columns), path)
    source = load_prompts(str(path))
    first, second = source
    assert first.metadata == {"when": "2024-05-01T00:00:00", "raw": "/w==", "x": "nan", "kwargs": [{"n": 1}]}
    assert second.metadata == {"when": None, "raw": "text", "x": 0.5, "kwargs": [{}, {"relation": "less"}]}
    assert list(source) == [first, second]


def test_parquet_images_are_not_decoded_but_json_is(tmp_path):
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "i": datasets.List(datasets.Image()), "j": datasets.Json()}
    )
    columns = {"prompt": ["a"], "i": [[{"bytes": b"\xff", "path": None}]], "j": ['{"b": [1]}']}
    pq.write_table(pa.table(columns, schema=features.arrow_schema), tmp_path / "rows.parquet")
    (prompt,) = load_prompts(str(tmp_path / "rows.parquet"))
    assert prompt.metadata == {"i": [{"bytes": "/w=="}], "j": {"b": [1]}}


def test_rows_are_read_as_they_are_asked_for(write):
    """The archive is cut short after more than what a file's buffer holds: only reading on finds that."""
    rows = b"".join(b'{"prompt": "%d %s"}\n' % (i, random.Random(i).randbytes(2048).hex().encode()) for i in range(500))
    path = write(gzip.compress(rows)[:-100], "rows.jsonl.gz")
    assert [p.index for p in load_prompts(path, limit=40)] == list(range(40))
    with pytest.raises(DataError, match=r"breaks off after \d+ rows: EOFError"):
        list(load_prompts(path))


def test_limit_counts_rows_not_prompts(write):
    path = write([{"prompt": ""}, {"prompt": "a"}, {"prompt": "b"}])
    assert [p.error is None for p in load_prompts(path, limit=2)] == [False, True]


def test_broken_line_is_a_row(write):
    first, broken, last = load_prompts(write('{"prompt": "a"}\n{"prompt": \n{"prompt": "b"}\n'))
    assert (first.error, last.error) == (None, None)
    assert broken.error.startswith("is not JSON: JSONDecodeError: Expecting value")
    assert broken.metadata == {"row": '{"prompt": '}


def test_columns_come_from_more_than_the_first_row(write):
    source = load_prompts(write([{"id": 1}, {"prompt": "a", "reference": "b"}]))
    assert source.columns == ["id", "prompt", "reference"]
    assert [p.error for p in source] == ["has no `prompt`", None]


def test_recognition_gives_up_after_the_first_rows(write):
    with pytest.raises(DataError, match="no prompt recognised in the columns `x`"):
        load_prompts(write([{"x": 1}] * PEEK_ROWS + [{"prompt": "a"}]))


def test_fingerprint_follows_the_bytes(write):
    path = write([{"prompt": "a"}])
    before = load_prompts(path).fingerprint
    assert load_prompts(path, limit=1).fingerprint == before
    write([{"prompt": "b"}])
    assert load_prompts(path).fingerprint != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "is empty"),
        ("blank.txt", "\n \n", "has no rows"),
        ("header.csv", "prompt,answer\n", "has no rows"),
        ("none.json", "[]", "has no rows"),
        ("rows.xlsx", "a", "unknown extension; accepted: .json, .jsonl, .ndjson, .csv"),
        ("rows.parquet.gz", "a", "unknown extension"),
        ("broken.json", '[{"prompt": "a"}', "is not JSON: JSONDecodeError: Expecting"),
        ("numbers.json", "[1, 2]", "the first row is of type int, not an object"),
        ("bytes.json", b'{"prompt":\n"\xff\xfe"}', "is not UTF-8"),
        ("bytes.txt", b"\xff\xfe", "the first row is not UTF-8"),
        ("rows.json.gz", "[]", "is not readable as JSON: BadGzipFile"),
        ("broken.parquet", "PAR1", "is not readable as Parquet"),
        ("twice.csv", "a,a\n1,2\n", "the header ['a', 'a'] names a column twice"),
        ("quote.csv", 'prompt\n"a\nb\n', "breaks off after 0 rows: Error: unexpected end of data"),
        ("other.jsonl", '{"cost": 1, "prompt": 2}', "columns `cost`, `prompt`; name it with --prompt-field"),
    ],
)
def test_file_that_holds_no_prompts(write, name, content, message):
    path = write(content, name)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"--dataset {path!r}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "--dataset-split 'test'.* is local, and has none; leave --dataset-split out"),
        ({"config": "main"}, "--dataset-config 'main'.* is local"),
        ({"limit": 0}, "--num-samples 0: accepted: 1 or more"),
        ({"prompt_field": "a.b"}, r"--prompt-field 'a.b': no such column in .*, which has `prompt`"),
    ],
)
def test_option_that_does_not_fit(write, options, message):
    with pytest.raises(DataError, match=message):
        load_prompts(write([{"prompt": "a"}]), **options)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "~/missing"])
def test_missing_file(name):
    with pytest.raises(DataError, match="no such file"):
        load_prompts(name)


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"'nobody/nothing' is neither on this machine nor loadable from the hub: .*reach"
    ):
        load_prompts("nobody/nothing")


@pytest.fixture
def hub(monkeypatch, write):
    """Makes `nobody/poems` a hub dataset with the given splits, whose rows `datasets` reads from local files."""
    load_builder = datasets.load_dataset_builder

    def hub(*splits: str) -> None:
        files = {
            s: write([{"prompt": f"{s} poem", "k": {"a": 1}}, {"prompt": "b", "k": {}}], f"{s}.jsonl") for s in splits
        }
        monkeypatch.setattr(
            datasets, "load_dataset_builder", lambda name, config: load_builder("json", data_files=files)
        )

    return hub


def test_hub_split(hub):
    hub("train", "test")
    train, test = load_prompts("nobody/poems"), load_prompts("nobody/poems", split="test")
    assert [p.messages[0]["content"] for p in train] == ["train poem", "b"]
    assert [p.messages[0]["content"] for p in test] == ["test poem", "b"]
    assert [p.metadata for p in test] == [{"k": {"a": 1}}, {"k": {}}]
    assert list(test) == list(test)
    assert train.fingerprint != test.fingerprint
    assert "split 'test' of the hub dataset 'nobody/poems'" in test.description


def test_hub_split_to_be_chosen(hub):
    hub("validation")
    assert "split 'validation'" in load_prompts("nobody/poems").description
    hub("validation", "test")
    for split in (None, "train", "test[:5]"):
        with pytest.raises(DataError, match=r"'nobody/poems' has the splits 'validation', 'test'; choose one"):
            load_prompts("nobody/poems", split=split)


def test_archives_of_the_hub(tmp_path, monkeypatch):
    """WebDataset: its rows have their columns in one order or another."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in (("0.json", b'{"a": 1}'), ("0.txt", b"a"), ("1.txt", b"b"), ("1.json", b'{"a": 2}')):
            (tmp_path / name).write_bytes(content)
            archive.add(tmp_path / name, name)
    builder = datasets.load_dataset_builder("webdataset", data_files=str(tmp_path / "x.tar"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: builder)
    prompts = list(load_prompts("nobody/poems", prompt_field="txt"))
    assert [(p.messages, p.metadata["json"]) for p in prompts] == [([user("a")], {"a": 1}), ([user("b")], {"a": 2})]


def test_a_broken_row_of_the_hub_fails_alone(tmp_path, monkeypatch):
    features = datasets.Features({"prompt": datasets.Value("string"), "j": datasets.Json(), "i": datasets.Image()})
    columns = {"prompt": ["a", "b", "c"], "j": ['{"k": [1]}', "{", None], "i": [{"bytes": b"x", "path": None}] * 3}
    pq.write_table(pa.table(columns, schema=features.arrow_schema), tmp_path / "rows.parquet")
    builder = datasets.load_dataset_builder("parquet", data_files=str(tmp_path / "rows.parquet"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: builder)
    first, broken, last = load_prompts("nobody/poems")
    assert (first.messages, first.metadata) == ([user("a")], {"j": {"k": [1]}, "i": {"bytes": "x"}})
    assert broken.error.startswith("cannot be read: ")
    assert (last.messages, last.metadata) == ([user("c")], {"j": None, "i": {"bytes": "x"}})


def test_nothing_on_the_terminal(write, capfd):
    list(load_prompts(write([{"prompt": "a"}])))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder shared/data beside the repository")
def test_real_files():
    for path in sorted(path for path in SHARED.iterdir() if path.suffix != ".md"):
        source = load_prompts(str(path))
        prompts = list(source)
        print(f"{path.name}: {len(prompts)} rows; {source.description}")
        assert any(prompt.error is None for prompt in prompts), path.name
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        json.dumps([prompt.metadata for prompt in prompts], allow_nan=False)
