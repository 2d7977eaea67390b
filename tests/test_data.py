"""Prompts out of datasets: what is recognised, what the metadata keeps, and what is said when it does not work."""

import bz2
import datetime
import gzip
import io
import json
import lzma
import os
import random
import zipfile
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qstar.data import PEEK_ROWS, DataError, Prompt, load_prompts
from qstar.files import ARCHIVE, PACKED

FIXTURES = Path(__file__).parent / "fixtures" / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pack(content: bytes, how: str, name: str = "rows.jsonl") -> bytes:
    """The content as a file of that extension has it."""
    if how == ARCHIVE:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(name, content)
        return packed.getvalue()
    codec = {".zst": "zstd", ".lz4": "lz4"}.get(how)
    if codec is not None:
        packed = pa.BufferOutputStream()
        with pa.CompressedOutputStream(packed, codec) as file:
            file.write(content)
        return packed.getvalue().to_pybytes()
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[how](content)


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON Lines, or text as it is, and returns the path."""

    def write(content, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", '[{"prompt": "a"},\n {"prompt": "b"}]'),
        ("list_in_one_line.jsonl", '[{"prompt": "a"}, {"prompt": "b"}]'),
        ("lines.json", '{"prompt": "a"}\n{"prompt": "b"}'),
        ("crlf.jsonl", '{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n'),
        ("bom.jsonl", '\ufeff{"prompt": "a"}\n{"prompt": "b"}'),
        ("wrapped.json", '{"version": 1, "data": [{"prompt": "a"}, {"prompt": "b"}]}'),
        ("strings.json", '["a", "b"]'),
        ("string_lines.jsonl", '"a"\n"b"'),
        ("lines.txt", "\ufeffa\r\n\r\nb"),
        ("table.csv", "\ufeffprompt,x\na,1\n\nb,2\n"),
        ("table.tsv", "prompt\tx\na\t1\nb\t2\n"),
        ("[a]*.jsonl", '{"prompt": "a"}\n{"prompt": "b"}'),
    ],
)
@pytest.mark.parametrize("packed", ["", *PACKED, ARCHIVE])
def test_file_format(write, name, content, packed):
    path = write(pack(content.encode(), packed, name), name + packed)
    source = load_prompts(path)
    assert [p.messages for p in source] == [[user("a")], [user("b")]]
    assert list(source) == list(source)


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


@pytest.mark.parametrize("how", [".gz", ".bz2", ".xz", ".zst"])
def test_files_of_several_streams_are_read_to_their_end(write, how):
    parts = [pack(b'{"prompt": "%d"}\n' % i, how) for i in range(3)]
    assert [p.messages[0]["content"] for p in load_prompts(write(b"".join(parts), "rows.jsonl" + how))] == [
        "0",
        "1",
        "2",
    ]


@pytest.mark.parametrize("how", [".gz", ".bz2", ".xz", ".zst"])
def test_files_cut_short_break_off(write, how):
    content = b"".join(b'{"prompt": "%d %d"}\n' % (i, random.Random(i).getrandbits(99)) for i in range(20_000))
    path = write(pack(content, how)[:-30], "rows.jsonl" + how)
    with pytest.raises(DataError, match="breaks off after") as caught:
        list(load_prompts(path))
    assert "\n" not in str(caught.value)


def texts(*names: str, **options) -> list[str]:
    """What the prompts of several datasets say, and that their indices and ids go on from one to the next."""
    prompts = list(load_prompts(names, **options))
    assert [p.index for p in prompts] == list(range(len(prompts)))
    assert [p.id for p in prompts] == [str(i) for i in range(len(prompts))]
    return [p.error or p.messages[-1]["content"] for p in prompts]


@pytest.fixture
def folder(write, tmp_path):
    """Files of several kinds in a folder, a table of Arrow's own in both of its forms among them."""
    write([{"prompt": "b0"}, {"prompt": "b1"}], "all/b.jsonl.zst.jsonl")
    write(pack(b'{"prompt": "a0"}\n{"prompt": "a1"}\n', ".zst"), "all/a.jsonl.zst")
    write("no rows", "all/README.md")
    write("{}", "all/.hidden.json")
    write("prompt\ne0\n", "all/deep/e.csv")
    table = pa.table({"prompt": ["c0", "c1"]})
    pq.write_table(table, tmp_path / "all" / "c.parquet")
    for name, opener in (("d.arrow", pa.ipc.new_file), ("z.arrow", pa.ipc.new_stream)):
        with opener(str(tmp_path / "all" / name), table.schema) as writer:
            writer.write_table(pa.table({"prompt": [f"{name[0]}0", f"{name[0]}1"]}))
    return tmp_path / "all"


ALL = ["a0", "a1", "b0", "b1", "c0", "c1", "d0", "d1", "e0", "z0", "z1"]


def test_folder(folder):
    assert texts(str(folder)) == ALL
    source = load_prompts(str(folder))
    assert source.description.endswith(
        "6 files of the folder, with those below it, by name (1 of other kinds left out)"
    )
    assert source.count() == len(ALL)
    assert texts(str(folder), limit=5) == ALL[:5]


def test_pattern_and_several(folder, write):
    assert texts(str(folder / "**" / "*.[jc]s*"), limit=4) == ["a0", "a1", "b0", "b1"]
    assert texts(str(folder / "z.arrow"), str(folder / "a*"), str(folder / "deep")) == ["z0", "z1", "a0", "a1", "e0"]
    with pytest.raises(DataError, match="no file matches the pattern"):
        load_prompts(str(folder / "*.tsv"))
    with pytest.raises(DataError, match=r"has no file of rows; accepted: \.json, "):
        load_prompts(str(Path(write("x", "other/README.md")).parent))


def test_files_with_columns_of_their_own(write):
    """Each file is read by its own columns; a row that lacks what its file has is an error."""
    files = [write([{"prompt": "a"}], "a.jsonl"), write([{"messages": [user("b")]}, {"prompt": "c"}], "b.jsonl")]
    files.append(write([{"prompt": "d", "messages": [user("e")]}], "c.jsonl"))
    assert texts(*files) == ["a", "b", "has no `messages`", "d"]


def test_archive_of_several_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, text in (("b.jsonl", "b"), ("sub/a.jsonl", "a"), ("__MACOSX/._b.jsonl", "no"), ("notes.md", "no")):
            archive.writestr(name, json.dumps({"prompt": text}))
        archive.writestr("c.jsonl.gz", gzip.compress(b'{"prompt": "c"}'))
    assert texts(str(tmp_path / "x.zip")) == ["b", "c", "a"]


def test_saved_dataset(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": f"{i}", "x": {"a": None, "b": i}} for i in range(5)])
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert texts(str(tmp_path / "one")) == list("01234")
    assert next(iter(load_prompts(str(tmp_path / "one")))).metadata == {"x": {"b": 0}}
    with pytest.raises(DataError, match="was saved without splits; leave --dataset-split out"):
        load_prompts(str(tmp_path / "one"), "train")
    both = datasets.DatasetDict({"test": rows.select([1]), "validation": rows.select([2, 3])})
    both.save_to_disk(str(tmp_path / "two"))
    assert texts(str(tmp_path / "two"), split="validation") == ["2", "3"]
    with pytest.raises(DataError, match="has the splits 'test', 'validation'; choose one"):
        load_prompts(str(tmp_path / "two"))


def test_fingerprint_follows_order_and_content(folder, write):
    first, second = str(folder / "z.arrow"), str(folder / "a.jsonl.zst")
    prints = [load_prompts(names).fingerprint for names in ([first, second], [second, first], [first], [str(folder)])]
    os.rename(folder / "deep" / "e.csv", folder / "e.csv")
    assert load_prompts(str(folder)).fingerprint == prints[-1]
    os.rename(folder / "e.csv", folder / "zz.csv")
    prints.append(load_prompts(str(folder)).fingerprint)
    assert len(set(prints)) == 5


DEEP = "[" * 100_000 + "]" * 100_000
BROKEN = {
    "a number of too many digits": (f'{{"prompt": "x", "n": {"1" * 5000}}}', "cannot be read: ValueError: Exceeds"),
    "nesting": (f'{{"prompt": "x", "n": {DEEP}}}', "is nested too deep"),
    "half a line": ('{"prompt": "x', "is not JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', "is not UTF-8"),
    "half a surrogate": ('{"prompt": "\\ud800"}', "`prompt` has half of a surrogate pair"),
    "a number": ("5", "is of type int, not an object"),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_fails_alone(write, kind, place):
    content, reason = BROKEN[kind]
    lines = [b'{"prompt": "a"}', b'{"prompt": "b"}']
    lines.insert(place, content if isinstance(content, bytes) else content.encode())
    prompts = list(load_prompts(write(b"\n".join(lines) + b"\n")))
    assert [p.error is None for p in prompts] == [i != place for i in range(3)]
    assert prompts[place].error.startswith(reason)
    json.dumps(prompts[place].metadata)


def test_csv_cell_that_is_not_utf8(write):
    first, second = load_prompts(write(b"prompt,x\na\xe9,1\nb,2\n", "latin.csv"))
    assert (first.error, first.metadata) == ("is not UTF-8", {"row": {"prompt": "a\ufffd", "x": "1"}})
    assert second.messages == [user("b")]


def test_parquet_maps(tmp_path):
    schema = pa.schema({"prompt": pa.string(), "m": pa.map_(pa.string(), pa.list_(pa.map_(pa.int32(), pa.float32())))})
    rows = [{"prompt": "a", "m": [("k", [[(1, 0.5)]])]}, {"prompt": "b", "m": None}]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "m.parquet")
    first, second = load_prompts(str(tmp_path / "m.parquet"))
    assert json.loads(json.dumps(first.metadata)) == {"m": {"k": [{"1": 0.5}]}}
    assert (second.messages, second.metadata) == ([user("b")], {"m": None})


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
