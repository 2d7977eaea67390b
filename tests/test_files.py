"""Files, folders and archives as datasets: what is read, in what order, and that a broken row fails alone."""

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import os
import random
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import user
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar.data.files import ARCHIVE, CODECS, PACKED, TABLE_EXTENSIONS, title_of
from qstar.data.prompts import DataError, load_prompts
from qstar.data.rows import DEEPEST, DOUBT

CASES = Path(__file__).parents[2] / "shared" / "cases"


def pack(content: bytes, how: str, name: str = "rows.jsonl") -> bytes:
    """The content as a file of that extension has it."""
    if how == ARCHIVE:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(name, content)
        return packed.getvalue()
    if how in CODECS:
        packed = pa.BufferOutputStream()
        with pa.CompressedOutputStream(packed, CODECS[how]) as file:
            file.write(content)
        return packed.getvalue().to_pybytes()
    if how == ".xz":
        return lzma.compress(content, preset=0)  # others have a window of megabytes
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[how](content)


def splitext(name: str) -> tuple[str, str]:
    """The name of a file before it was packed, and how it is."""
    how = Path(name).suffix if Path(name).suffix in (*PACKED, ARCHIVE) else ""
    return name.removesuffix(how), how


def texts(*names: str, **options) -> list[str]:
    """What the prompts of several datasets say, and that their indices and ids go on from one to the next."""
    prompts = list(load_prompts(names, **options))
    assert [p.index for p in prompts] == list(range(len(prompts)))
    assert [p.id for p in prompts] == [str(i) for i in range(len(prompts))]
    return [p.error or p.messages[-1]["content"] for p in prompts]


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


@pytest.mark.parametrize("how", [".gz", ".bz2", ".xz", ".zst"])
def test_files_of_several_streams_are_read_to_their_end(write, how):
    parts = [pack(b'{"prompt": "%d"}\n' % i, how) for i in range(3)]
    assert texts(write(b"".join(parts), "rows.jsonl" + how)) == ["0", "1", "2"]


@pytest.mark.parametrize("how", [".gz", ".bz2", ".xz", ".zst"])
def test_files_cut_short_break_off(write, how):
    content = b"".join(b'{"prompt": "%d %d"}\n' % (i, random.Random(i).getrandbits(99)) for i in range(20_000))
    path = write(pack(content, how)[:-30], "rows.jsonl" + how)
    with pytest.raises(DataError, match="breaks off after") as caught:
        list(load_prompts(path))
    assert "\n" not in str(caught.value)


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
    said = "6 files of the folder, with those below it, by name (1 of other kinds left out)"
    assert source.description.endswith(said)
    assert source.count() == len(ALL)
    assert texts(str(folder), limit=5) == ALL[:5]


def test_folders_are_read_through_links_and_to_their_end(write, tmp_path):
    write([{"prompt": "a"}], "all/a.jsonl")
    write([{"prompt": "b"}], "elsewhere/b.jsonl")
    write([{"prompt": "no"}], "all/_temporary/c.jsonl")
    (tmp_path / "all" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "all")
    assert texts(str(tmp_path / "all")) == ["a", "b"]
    (tmp_path / "all" / "z.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"z.jsonl' does not exist, or is a link to nothing"):
        load_prompts(str(tmp_path / "all"))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**/*.jsonl", ["c", "a", "b"]),
        ("**", ["c", "a", "b"]),
        ("all/**/*.jsonl", ["a", "c", "b"]),
        ("all/**/elsewhere/**/b*", ["b"]),
        ("*/*.jsonl", ["a", "b"]),
        ("*/back/*.jsonl", ["c"]),
    ],
)
def test_patterns_go_through_links_once(write, tmp_path, pattern, found):
    """Two links that lead back are more ways round than anything could go."""
    write([{"prompt": "a"}], "all/a.jsonl")
    write([{"prompt": "b"}], "elsewhere/b.jsonl")
    write([{"prompt": "c"}], "_c.jsonl")
    write([{"prompt": "no"}], ".hidden/c.jsonl")
    for name in ("all/back", "elsewhere/back"):
        (tmp_path / name).symlink_to(tmp_path)
    assert texts(str(tmp_path / pattern)) == found


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("sub[1]/train/x.jsonl", "test/x.jsonl"),
        ("poems-train.jsonl", "poems-eval.jsonl"),
    ],
)
def test_splits_of_a_folder(write, tmp_path, names):
    """As `datasets` reads the names of files, where all of them say a split."""
    for name, text in zip(names, ("a", "b"), strict=True):
        write([{"prompt": text}], f"[all]/{name}")
    folder = str(tmp_path / "[all]")
    assert texts(folder) == texts(folder, split="train") == ["a"]
    assert texts(folder, split="test") == ["b"]
    assert "1 file of split 'train' of the folder, whose files are called " in load_prompts(folder).description
    with pytest.raises(DataError, match=r"--dataset-split 'dev': .* has the splits 'train', 'test'; choose one"):
        load_prompts(folder, "dev")
    assert sorted(texts(os.path.join(tmp_path, "[[]all]", "**", "*.jsonl"))) == ["a", "b"]
    write([{"prompt": "c"}], "[all]/more.jsonl")
    assert sorted(texts(folder)) == ["a", "b", "c"]
    with pytest.raises(DataError, match="is local, and has none"):
        load_prompts(folder, "train")


README = """---
configs:
- config_name: short
  data_files:
  - split: train
    path: x/*.jsonl
- config_name: long
  data_files:
  - split: dev
    path: y/a.csv.bz2
---
"""


def test_configurations_of_a_folder(write, tmp_path):
    """A folder as it lies on the hub, with a README.md that says which files are what."""
    write(README, "all/README.md")
    for name, text in (("x/b", "b"), ("x/a", "a"), ("z", "no")):
        write([{"prompt": text}], f"all/{name}.jsonl")
    write(bz2.compress(b"prompt\nc\n"), "all/y/a.csv.bz2")
    folder = str(tmp_path / "all")
    assert texts(folder, config="short") == ["a", "b"]
    assert texts(folder, config="long") == texts(folder, config="long", split="dev") == ["c"]
    for config in (None, "other"):
        with pytest.raises(DataError, match=r"the README.md of .*short.*long") as caught:
            load_prompts(folder, config=config)
        assert "\n" not in str(caught.value)


def test_the_folder_of_the_parts_of_a_run(write, tmp_path):
    """Its samples are the rows, and nothing else is; a manifest.json of another's is a file as any other."""
    for kind in ("samples", "diagnostics", "errors"):
        write([{"prompt": kind}], f"out/{kind}/part-000000.jsonl")
    write(json.dumps({"complete": True, "format": "jsonl", "parts": [0], "settings": {}}), "out/manifest.json")
    assert texts(str(tmp_path / "out")) == ["samples"]
    write(json.dumps({"prompt": "manifest"}), "out/manifest.json")
    assert texts(str(tmp_path / "out")) == ["diagnostics", "errors", "manifest", "samples"]


def test_folders_of_the_hub_cache(write, tmp_path):
    cache = tmp_path / "datasets--nobody--poems"
    for revision, text in (("0a1b", "old"), ("f00d", "new")):
        blob = Path(write([{"prompt": text}], f"{cache.name}/blobs/{revision}"))
        (cache / "snapshots" / revision).mkdir(parents=True)
        (cache / "snapshots" / revision / "x.jsonl").symlink_to(blob)
    write("f00d", f"{cache.name}/refs/main")
    assert texts(str(cache)) == ["new"]
    assert texts(str(cache / "snapshots" / "0a1b")) == ["old"]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("a/train.jsonl.gz", "train"),
        ("nobody/poems", "poems"),
        ("a/poems/", "poems"),
        ("a/poems/*/x*.csv", "poems"),
        ("v1.2.parquet", "v1.2"),
    ],
)
def test_title(name, title):
    assert title_of(name) == title


def test_pattern_and_several(folder, write):
    assert texts(str(folder / "**" / "*.[jc]s*"), limit=4) == ["a0", "a1", "b0", "b1"]
    assert texts(str(folder / "z.arrow"), str(folder / "a*"), str(folder / "deep")) == ["z0", "z1", "a0", "a1", "e0"]
    with pytest.raises(DataError, match="no file matches the pattern"):
        load_prompts(str(folder / "*.tsv"))
    with pytest.raises(DataError, match=r"has no file of rows; accepted: \.json, "):
        load_prompts(str(Path(write("x", "other/README.md")).parent))


@pytest.mark.parametrize("name", ["", "s3://bucket/x.jsonl", "hf://datasets/nobody/poems"])
def test_what_is_neither_here_nor_on_the_hub(name):
    with pytest.raises(DataError, match="accepted: files and folders of this machine, names of hub datasets"):
        load_prompts(name)


def test_files_with_columns_of_their_own(write):
    """Each file is read by its own columns; a row that lacks what its file has is an error."""
    files = [write([{"prompt": "a"}], "a.jsonl"), write([{"messages": [user("b")]}, {"prompt": "c"}], "b.jsonl")]
    files.append(write([{"prompt": "d", "messages": [user("e")]}], "c.jsonl"))
    assert texts(*files) == ["a", "b", "has no `messages`", "d"]


def test_ids_are_unique_over_several_files(write):
    def requests(name, *ids):
        return write([{"custom_id": i, "body": {"messages": [user("a")]}} for i in ids], name)

    def ids(*names):
        return [p.id for p in load_prompts(names)], [p.index for p in load_prompts(names) if p.error]

    plain, others = write([{"prompt": "a"}, {"prompt": "b"}], "a.jsonl"), requests("b.jsonl", "0", "x", "5", "x")
    assert ids(plain, others, plain) == (["0", "1", "row-2", "x", "5", "row-5", "6", "7"], [2, 5])
    assert ids(others, plain) == (["0", "x", "5", "row-3", "4", "row-5"], [3])


def test_archive_of_several_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, text in (("b.jsonl", "b"), ("sub/a.jsonl", "a"), ("__MACOSX/._b.jsonl", "no"), ("notes.md", "no")):
            archive.writestr(name, json.dumps({"prompt": text}))
        archive.writestr("c.jsonl.gz", gzip.compress(b'{"prompt": "c"}'))
    assert texts(str(tmp_path / "x.zip")) == ["b", "c", "a"]
    said = "3 files of the archive, by name (1 of other kinds left out)"
    assert load_prompts(str(tmp_path / "x.zip")).description.endswith(said)


def test_an_archive_with_two_files_of_one_name(tmp_path):
    """Which is meant nobody can tell; of those that are no rows it does not matter."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, warnings.catch_warnings(action="ignore"):
        for name in ("notes.md", "notes.md", "a.jsonl", "b.jsonl", "a.jsonl"):
            archive.writestr(name, '{"prompt": "a"}')
    with pytest.raises(DataError, match=r"x\.zip::a\.jsonl': the archive has two files of that name"):
        load_prompts(str(tmp_path / "x.zip"))


ENTRY = b"PK\x01\x02"  # of an archive's directory; the flags are 8 bytes from its beginning


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:60], "is not readable as an archive"),
        (
            lambda content: content[: content.index(ENTRY) + 8] + b"\1" + content[content.index(ENTRY) + 9 :],
            "encrypted",
        ),
        (lambda content: content.replace(b"poem", b"poen"), "Bad CRC-32"),
        (lambda content: content.replace(b"rows.", b"rows_"), "has no file of rows; accepted: .json, "),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_archives_that_cannot_be_read(write, damage, message, name):
    path = write(damage(pack(b'"prompt"\n"a poem"\n', ARCHIVE, name)), "x.zip")
    with pytest.raises(DataError) as caught:
        list(load_prompts(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_saved_dataset(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": f"{i}", "x": {"a": None, "b": i}} for i in range(5)])
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert texts(str(tmp_path / "one")) == list("01234")
    assert next(iter(load_prompts(str(tmp_path / "one")))).metadata == {"x": {"b": 0}}
    with pytest.raises(DataError, match="one' is local, and has none; leave --dataset-split out"):
        load_prompts(str(tmp_path / "one"), "train")
    both = datasets.DatasetDict({"test": rows.select([1]), "validation": rows.select([2, 3])})
    both.save_to_disk(str(tmp_path / "two"))
    assert texts(str(tmp_path / "two"), split="validation") == ["2", "3"]
    with pytest.raises(DataError, match="has the splits 'test', 'validation'; choose one"):
        load_prompts(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r"--dataset-config 'main': .* is local, and has none"):
        load_prompts(str(tmp_path / "one"), config="main")
    for name in ("", "one/*"):
        with pytest.raises(DataError, match=r"`save_to_disk` wrote .*one'; name that by itself"):
            load_prompts(str(tmp_path / name))
    assert texts(str(tmp_path / "one" / "*.arrow")) == list("01234")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="is not readable as a saved dataset"):
        load_prompts(str(tmp_path / "one"))


def saved(path: Path, table: pa.Table, how: dict) -> str:
    datasets.Dataset(table).with_format(**how).save_to_disk(str(path), num_shards=2)
    return str(path)


@pytest.mark.parametrize(
    "how",
    [{}, {"type": "numpy"}, {"type": "pandas"}, {"type": "torch"}, {"type": "numpy", "columns": ["x"]}],
    ids=str,
)
def test_a_saved_dataset_is_read_as_it_was_before_its_format(tmp_path, how):
    rows = pa.table({"prompt": ["a", "b", "c"], "x": [[1], None, [2, 3]], "n": [1, 2, None]})
    prompts = list(load_prompts(saved(tmp_path / "one", rows, how)))
    assert [p.messages for p in prompts] == [[user("a")], [user("b")], [user("c")]]
    assert [p.metadata for p in prompts] == [{"x": [1], "n": 1}, {"x": None, "n": 2}, {"x": [2, 3], "n": None}]


def test_a_broken_row_of_a_saved_dataset_fails_alone(tmp_path):
    rows = pa.table({"prompt": list("abcd"), "x": pa.array([0, 1, 2**45, 3]).view(pa.timestamp("s"))})
    found = texts(saved(tmp_path / "one", rows, {}))
    assert found[:2] + found[3:] == ["a", "b", "d"]
    assert found[2].startswith("cannot be read: OverflowError")


def test_saved_datasets_that_cannot_be_read(tmp_path):
    folder = Path(saved(tmp_path / "one", pa.table({"prompt": ["a", "b"]}), {}))
    state = json.loads((folder / "state.json").read_text())
    for damage, message in (
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "was saved with indices"),
        ({"_data_files": [{"filename": "other.arrow"}]}, "is not readable as a saved dataset: FileNotFoundError"),
        ({"_data_files": 5}, "is not readable as a saved dataset: TypeError"),
        ({"_data_files": []}, "has no rows"),
    ):
        (folder / "state.json").write_text(json.dumps(state | damage))
        with pytest.raises(DataError, match=message):
            load_prompts(str(folder))


def test_fingerprint_follows_order_and_content(folder, write):
    first, second = str(folder / "z.arrow"), str(folder / "a.jsonl.zst")
    prints = [load_prompts(names).fingerprint for names in ([first, second], [second, first], [first], [str(folder)])]
    os.rename(folder / "deep" / "e.csv", folder / "e.csv")
    assert load_prompts(str(folder)).fingerprint == prints[-1]
    os.rename(folder / "e.csv", folder / "zz.csv")
    prints.append(load_prompts(str(folder)).fingerprint)
    assert len(set(prints)) == 5


def nested(levels: int) -> str:
    """A row of so many levels."""
    return f'{{"prompt": "x", "n": {"[" * (levels - 1)}{"]" * (levels - 1)}}}'


BROKEN = {
    "a number of too many digits": (f'{{"prompt": "x", "n": {"1" * 5000}}}', "has a number of more than 4300 digits"),
    "nesting": (nested(100_000), "is nested too deep; accepted: 100 levels"),
    "some nesting": (nested(500), "is nested too deep; accepted: 100 levels"),
    "a little too much nesting": (nested(DEEPEST + 1), "is nested too deep; accepted: 100 levels"),
    "not UTF-8": (b'{"prompt": "\xff"}', "is not UTF-8"),
    "half a surrogate": ('{"prompt": "\\ud800"}', "`prompt` has half of a surrogate pair"),
    "a number": ("5", "is of type int, not an object"),
    "a list": ("[5, 6]", "is a list, not an object"),
    "nothing": ("null", "is missing, not an object"),
}
BROKEN_LINES = {
    "half a line": ('{"prompt": "x', "is not JSON: JSONDecodeError: Unterminated string"),
    "less than half a line": ('{"prompt":', "is not JSON: JSONDecodeError: Expecting value"),
    "no JSON": ("prompt: x", "is not JSON"),
    "two rows": ('{"prompt": "x"} {"prompt": "y"}', "is not JSON: JSONDecodeError: Extra data"),
    "zeros": (b"\x00" * 10, "is not JSON"),
}


FORM_OF_ROWS = {
    "lines": (b"%b\n", b"\n"),
    "list": (b"[%b]", b","),
    "list over lines": (b"[\n%b\n]\n", b",\n"),
}


# Of other broken items of a list nobody can tell where they end.
KINDS = [("lines", kind) for kind in BROKEN_LINES] + [(form, kind) for form in FORM_OF_ROWS for kind in BROKEN]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("form", "kind"), KINDS)
def test_a_broken_row_fails_alone(write, form, kind, place):
    content, reason = (BROKEN | BROKEN_LINES)[kind]
    rows = [b'{"prompt": "a"}', b'{"prompt": "b, [}", "x": {"y": [1, 2]}}']
    rows.insert(place, content if isinstance(content, bytes) else content.encode())
    around, between = FORM_OF_ROWS[form]
    prompts = list(load_prompts(write(around % between.join(rows))))
    assert [p.error is None for p in prompts] == [i != place for i in range(3)]
    assert prompts[place].error.startswith(reason)
    assert [p.messages for p in prompts if p.error is None] == [[user("a")], [user("b, [}")]]
    assert json.dumps(prompts[place].metadata).isascii()


def test_what_is_unusual_is_read(write):
    odd = '{"prompt": "a", "n": NaN, "i": -Infinity, "s": "\\udc00", "k\\ud800": 1e999, "d": 1, "d": 2, "z": "\\u0000"}'
    source = load_prompts(write(f"{odd}\n{nested(DEEPEST)}\n"))
    first, second = source
    assert first.metadata == {"n": "nan", "i": "-inf", "s": "\\udc00", "k\\ud800": "inf", "d": 2, "z": "\0"}
    assert (second.error, second.messages) == (None, [user("x")])
    source.description.encode()
    long = "long " * 2_000_000
    assert texts(write([{"prompt": long}, {"prompt": "a"}])) == [long, "a"]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('{"data": [\n{"prompt": "a"},\n{"prompt": "b"}\n]}', ["a", "b"]),
        ('{"prompt":\n"a"}', ["a"]),
        ('[{"prompt": "a"}\n,{"prompt": "b"}\n]', ["a", "b"]),
        ("[\n" + ",\n".join(f'{{"prompt": "{i}"}}' for i in range(50)) + "\n]", [str(i) for i in range(50)]),
        (json.dumps([{"prompt": "a", "x": list(range(99))}, {"prompt": "b"}], indent=1), ["a", "b"]),
    ],
)
def test_documents_over_several_lines(write, content, rows):
    assert texts(write(content)) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "a"},\n{"prompt": "b"},\n{"prompt": "c"}', "is not JSON"),
        (f'[{nested(500)},\n{{"prompt": "b"}}', "is not JSON"),
        (f"[{nested(100_000)}]]", "is not JSON: ValueError: the list does not end where the file does"),
        ('{"data": [\n{"prompt": "a"},\n', "is not JSON"),
        (f'{{"data": [{nested(500)}]}}', "is nested too deep; accepted: 100 levels"),
        (b'{"data":\n [{"prompt": "\xff"}]}', "is not UTF-8"),
        ('{"prompt": "a"}\n'.encode("utf-16"), "is not UTF-8"),
        ("x\ny\n", "is not JSON"),
    ],
)
def test_documents_that_cannot_be_read(write, content, message):
    with pytest.raises(DataError, match=message):
        load_prompts(write(content))


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not beside this checkout")
@pytest.mark.parametrize(("name", "broken"), [("bigint.jsonl", 1), ("badfirst.jsonl", 1), ("map.parquet", 0)])
def test_cases(name, broken):
    prompts = list(load_prompts(str(CASES / name)))
    assert len([p for p in prompts if p.error is not None]) == broken < len(prompts)


def test_documents_are_read_anew_when_they_change(write):
    path = write('[{"prompt": "a"}]', "x.json")
    assert texts(path) == ["a"]
    write('[{"prompt": "a"}, {"prompt": "b"}]', "x.json")
    assert texts(path) == ["a", "b"]


@given(st.lists(st.binary(max_size=40), max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_whatever_lies_between_rows_they_are_read(tmp_path_factory, junk, rng):
    """Lines of bytes among rows are errors, one a line; nothing else is raised and no row is lost."""
    lines = [line for line in (line.translate(None, b"\r\n") for line in junk) if line.strip()]
    lines += [b'{"prompt": "first"}', b'{"prompt": "second"}']
    rng.shuffle(lines)
    path = tmp_path_factory.mktemp("junk") / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    read = [p.messages[0]["content"] for p in load_prompts(str(path)) if p.error is None]
    assert [text for text in read if text in ("first", "second")] == [
        json.loads(line)["prompt"] for line in lines if line.startswith(b'{"prompt": ')
    ]


def test_csv_cell_that_is_not_utf8(write):
    first, second = load_prompts(write(b"prompt,x\na\xe9,1\nb,2\n", "latin.csv"))
    assert (first.error, first.metadata) == ("is not UTF-8", {"row": {"prompt": "a\ufffd", "x": "1"}})
    assert second.messages == [user("b")]


NOT_CSV = "is not CSV: Error: ',' expected after '\"'"


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('prompt,x\n"a"b,1\nc,2\n', [NOT_CSV, "c"]),
        ('prompt,x\nb,2\n"a\na"a,1\nc,2\n', ["b", NOT_CSV, "c"]),
        ('prompt,x\n"a"b,1\n"c",2\n\nd,4\n', [NOT_CSV, "c", "d"]),
        ("prompt,x\na\nc,\n", ["has 1 fields where the header has 2", "c"]),
        ("prompt,x\nb,1,2\nc,\n", ["has 3 fields where the header has 2", "c"]),
        ("\n\nprompt,x\r\na,1\r\n\r\nc,2", ["a", "c"]),
        ("prompt,x\n,1\nc,2\n", ["`prompt` is empty", "c"]),
        ('prompt,x\n"a\nb",1\n"c""",2\n', ["a\nb", 'c"']),
    ],
)
def test_csv(write, content, rows):
    assert texts(write(content, "x.csv")) == rows


@pytest.mark.parametrize(
    ("field", "left"),
    [
        ('he said "hi"\nto me', ["c", "d"]),
        ('he said "hi" to me\none,two\nthree', ["c", "d"]),
        ('to me\none,two\nhe said "hi"\nfour,five\nsix', ["c", "d"]),
        ('he said "hi", then\none,two\n\nleft', ["c", "d"]),
        ('he "said":\n"hi"\none,two\nbye', ["c", "d"]),
        ('he said "hi"\none,two\n', ["d"]),  # the quote at its end looks like the beginning of another field
    ],
)
def test_a_field_of_csv_that_is_broken_is_refused_to_its_end(write, field, left):
    """Its lines may look like rows."""
    rows = {"a": "a,1\n", "": f'"{field}",2\n', "c": '"c",3\n', "d": "d,4\n"}
    first, broken, *others = load_prompts(write("prompt,x\n" + "".join(rows.values()), "x.csv"))
    refused = "".join(row for text, row in rows.items() if text not in ("a", *left))
    last = 2 + refused.count("\n")
    assert broken.error == f"{NOT_CSV}; up to line {last} nobody can tell where a row begins"
    assert broken.metadata == {"row": refused}
    assert [p.messages for p in (first, *others)] == [[user(text)] for text in ("a", *left)]


def test_csv_errors_far_from_one_another_are_of_their_own(write):
    broken, good = '"a"b,1\n', f"c,{'2' * 1000}\n" * (DOUBT // 1000)
    assert texts(write(f"prompt,x\n{broken}{good}{broken}{good}", "x.csv")) == 2 * [NOT_CSV, *["c"] * (DOUBT // 1000)]
    with pytest.raises(
        DataError, match=r"x\.csv': a row is not CSV: .*; up to line \d+ nobody can tell where a row begins"
    ):
        load_prompts(write(f"prompt,x\n{broken * (DOUBT // 6)}c,2\n", "x.csv")).count()


CELLS = st.text('ab,"\n', min_size=1, max_size=9)
WITHOUT_QUOTES = st.text("ab,\n", max_size=9)


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
@given(st.lists(st.tuples(CELLS, CELLS), max_size=5), st.integers(0, 5), WITHOUT_QUOTES, WITHOUT_QUOTES)
@settings(max_examples=150, deadline=None)
def test_a_stray_quote_in_csv_makes_no_row_of_what_is_none(tmp_path_factory, quoting, rows, place, before, after):
    """Every row that is read was written."""
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=quoting, lineterminator="\n")
        writer.writerows([("prompt", "x"), *rows[:place]])
        file.write(f'"{before}"c{after}",b\n')
        writer.writerows(rows[place:])
    try:
        read = [(p.messages[0]["content"], p.metadata["x"]) for p in load_prompts(str(path)) if p.error is None]
    except DataError:
        read = []  # none is left, or a quote of the last ones is never closed
    assert [row for row in read if row not in rows] == []


def test_csv_errors_keep_what_was_there(write):
    first, second = load_prompts(write('prompt,x\n"a"b,1\nc,\n', "x.csv"))
    assert first.metadata == {"row": '"a"b,1\n'}
    assert second.metadata == {"x": ""}
    with pytest.raises(DataError, match="the header is not UTF-8"):
        load_prompts(write(b"prompt,\xff\na,1\n", "x.csv"))


def table(path: Path, columns: dict[str, pa.Array]) -> str:
    columns = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(columns, path)
    else:
        with pa.ipc.new_stream(path, columns.schema) as writer:
            writer.write_table(columns)
    return str(path)


MAP = pa.map_(pa.string(), pa.int64())
DAY = datetime.datetime(2024, 5, 1, 12, 30)
TYPES = {
    "decimals": (pa.array([decimal.Decimal("1.50"), None]), "1.50"),
    "seconds": (pa.array([DAY, None], pa.timestamp("s", tz="UTC")), "2024-05-01T12:30:00+00:00"),
    "nanoseconds": (pa.array([1_714_566_600_000_000_001, None], pa.timestamp("ns")), "2024-05-01T12:30:00.000000001"),
    "days": (pa.array([DAY.date(), None]), "2024-05-01"),
    "times": (pa.array([DAY.time(), None]), "12:30:00"),
    "durations": (pa.array([datetime.timedelta(hours=30), None]), "1 day, 6:00:00"),
    "categories": (pa.array(["x", None]).dictionary_encode(), "x"),
    "bytes": (pa.array([b"\xff\x00", None]), "/wA="),
    "bytes of text": (pa.array([b"ab", None], pa.binary(2)), "ab"),
    "views": (pa.array(["x", None], pa.string_view()), "x"),
    "halves": (pa.array([1.5, None], pa.float16()), 1.5),
    "not a number": (pa.array([float("nan"), None]), "nan"),
    "unsigned": (pa.array([2**64 - 1, None], pa.uint64()), 2**64 - 1),
    "lists": (pa.array([[{"a": 1, "b": [None, "x"]}, {"b": []}], None]), [{"a": 1, "b": [None, "x"]}, {"b": []}]),
    "views of lists": (pa.array([[1], None], pa.list_view(pa.int32())), [1]),
    "maps": (pa.array([[("a", [1])], None], pa.map_(pa.string(), pa.list_(pa.int64()))), {"a": [1]}),
    "maps of numbers": (pa.array([[(1, 2.0)], None], pa.map_(pa.int32(), pa.float32())), {"1": 2.0}),
    "maps of bytes": (pa.array([[(b"a", 1)], None], pa.map_(pa.binary(), pa.int64())), {"a": 1}),
    "maps with a key twice": (pa.array([[("a", 1), ("a", 2)], None], MAP), [["a", 1], ["a", 2]]),
    "JSON": (pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None])), {"a": 1}),
    "nothing": (pa.nulls(2), None),
}  # fmt: skip


@pytest.mark.parametrize("extension", TABLE_EXTENSIONS)
@pytest.mark.parametrize("kind", TYPES)
def test_columns_of_tables(tmp_path, kind, extension):
    column, value = TYPES[kind]
    first, second = load_prompts(table(tmp_path / f"x{extension}", {"prompt": ["a", "b"], "x": column}))
    assert json.loads(json.dumps(first.metadata)) == {"x": value}
    assert (second.messages, second.metadata) == ([user("b")], {"x": None})


@pytest.mark.parametrize("extension", TABLE_EXTENSIONS)
@pytest.mark.parametrize(
    ("column", "reason", "kept"),
    [
        (pa.array([b"a", b"b\xff", b"c"]).view(pa.string()), "is not UTF-8", "b\ufffd"),
        (
            pa.array([0, 2**45, 1]).view(pa.timestamp("s")),
            "cannot be read: OverflowError",
            "<value out of range: 35184372088832",
        ),
        (pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1", "{", "2"])), "cannot be read: ValueError", "{"),
    ],
)
def test_a_broken_row_of_a_table_fails_alone(tmp_path, extension, column, reason, kept):
    first, second, third = load_prompts(table(tmp_path / f"x{extension}", {"prompt": ["a", "b", "c"], "x": column}))
    assert (first.messages, third.messages) == ([user("a")], [user("c")])
    assert second.error.startswith(reason)
    assert second.metadata["row"]["prompt"] == "b"
    assert second.metadata["row"]["x"].startswith(kept)


@pytest.mark.parametrize("extension", TABLE_EXTENSIONS)
def test_tables_as_a_whole(tmp_path, extension):
    path = tmp_path / f"x{extension}"
    none = table(tmp_path / f"y{extension}", {"prompt": pa.array([], pa.string())})
    many = table(path, {"prompt": [str(i) for i in range(1000)]})
    assert texts(none, many, none) == [str(i) for i in range(1000)]
    with pytest.raises(DataError, match="has no rows"):
        load_prompts(none)
    broken = tmp_path / f"z{extension}"
    broken.write_bytes(path.read_bytes()[20:-20])
    with pytest.raises(DataError, match=r"is not readable as (Parquet|Arrow)"):
        load_prompts([many, str(broken)])
    with pytest.raises(DataError, match="name one twice"):
        load_prompts(table(path, pa.table([["a"], ["b"]], names=["prompt", "prompt"])))


STREAMED = [
    *(f"x.jsonl{how}" for how in ("", *PACKED, ARCHIVE)),
    "x.csv",
    "x.txt",
    *(f"x{e}" for e in TABLE_EXTENSIONS),
]


@pytest.mark.parametrize("name", STREAMED)
def test_rows_are_streamed(write, tmp_path, name):
    rows = [random.Random(i).randbytes(500).hex() for i in range(10_000)]
    inner, how = splitext(name)
    extension = Path(inner).suffix
    if extension in TABLE_EXTENSIONS:
        path = table(tmp_path / name, {"prompt": rows})
    else:
        lines = {".csv": ["prompt", *rows], ".txt": rows}.get(extension, [json.dumps({"prompt": row}) for row in rows])
        path = write(pack("\n".join(lines).encode(), how, inner), name)
    source = load_prompts(path)
    tracemalloc.start()
    try:
        assert sum(1 for _ in source) == len(rows)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


FORMS = [*(f"{form}{how}" for form in (".jsonl", ".json") for how in ("", *PACKED, ARCHIVE)), *TABLE_EXTENSIONS]


@given(st.lists(st.tuples(st.sampled_from(FORMS), st.integers(1, 70)), min_size=1, max_size=5), st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_rows_of_several_files_are_those_of_one(tmp_path_factory, files, limit):
    """In any forms, cut anywhere: the same prompts, indices and ids, as separate datasets and as a folder."""
    folder, rows = tmp_path_factory.mktemp("several"), []
    for number, (form, count) in enumerate(files):
        own = [{"prompt": f"{len(rows) + i} ü", "x": {"y": [str(i), 'a,\n"b']}} for i in range(count)]
        rows += own
        path = folder / f"{number}{form}"
        if form in TABLE_EXTENSIONS:
            table(path, {name: [row[name] for row in own] for name in ("prompt", "x")})
            continue
        inner, how = splitext(path.name)
        text = json.dumps(own) if inner.endswith(".json") else "\n".join(map(json.dumps, own))
        path.write_bytes(pack(text.encode(), how, inner))
    names = [str(path) for path in sorted(folder.iterdir())]
    whole = tmp_path_factory.mktemp("whole") / "x.jsonl"
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = list(load_prompts(str(whole), limit=limit))
    assert list(load_prompts(names, limit=limit)) == list(load_prompts(str(folder), limit=limit)) == expected
    assert load_prompts(names).count() == len(rows)
