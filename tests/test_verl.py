"""Format `verl`: what its reader, `RLHFDataset`, and its reward managers find in a row."""

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from runs import lines, write_lines

from qstar.demo import THETA
from qstar.generate import main as generate
from qstar.run.formats import SCHEMAS, schema_of, table_of, verl_row
from qstar.run.merging import merge
from qstar.run.output import OutputError
from qstar.run.parts import Parts

pytestmark = pytest.mark.usefixtures("loaded_once")

CASE = Path(__file__).parents[2] / "shared" / "cases" / "verl.jsonl"
ASKED = [{"role": "system", "content": "Sum."}, {"role": "user", "content": "What is 2 + 3?"}]


def row(ground_truth, **extra_info) -> dict:
    """A row by verl's documentation (docs/preparation/prepare_data.rst)."""
    return {
        "data_source": "gsm",
        "prompt": ASKED,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": "train", "index": 7} | extra_info,
    }


LINE = {"id": "0-0", "sample_index": 0, "finish_reason": "eos", "num_tokens": 1}
LINE["messages"] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def written(tmp_path):
    """Generates in format verl; returns the rows as verl reads them."""

    def written(rows: list[dict] | Path, *others: str) -> list[dict]:
        data = rows if isinstance(rows, Path) else write_lines(tmp_path / "data.jsonl", rows)
        argv = ["--dataset", str(data), "--output", str(tmp_path / "x.parquet"), "--output-format", "verl"]
        assert generate([*argv, "--max-new-tokens", "4", *others]) == 0
        cache = str(tmp_path / "cache")
        return list(datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), cache_dir=cache)["train"])

    return written


def reward_of(found: dict) -> dict:
    """What verl's `RLHFDataset` and `NaiveRewardManager` look up, and write, in a row."""
    extra_info = found["extra_info"]
    seen = {"ground_truth": found["reward_model"]["ground_truth"], "data_source": found["data_source"]}
    seen |= {"index": extra_info.get("index", 0), "tools_kwargs": extra_info.get("tools_kwargs", {})}
    extra_info["num_turns"] = 2
    return seen


TRUTHS = {
    "text": "5",
    "a number": 5,
    "a list of texts": ["5", "five"],
    "an object": {"target": ["5"], "tests": [{"input": "2 3", "output": "5"}]},
}


@pytest.mark.parametrize("name", TRUTHS)
def test_a_row_has_what_it_came_with(written, name):
    truth = TRUTHS[name]
    tools = {"add": {"create_kwargs": {"ground_truth": "5"}}}
    (found,) = written([row(truth, tools_kwargs=tools, need_tools_kwargs=True) | {"level": 3}])
    assert found["prompt"] == ASKED
    assert found["ability"] == "math"
    assert found["reward_model"] == {"style": "rule", "ground_truth": truth}
    assert found["extra_info"]["need_tools_kwargs"] is True
    assert reward_of(found) == {"ground_truth": truth, "data_source": "gsm", "index": 7, "tools_kwargs": tools}
    about = {"split": "train", "sample.index": 0, "id": "0-0", "sample_index": 0, "num_tokens": 4}
    assert found["extra_info"].items() >= (about | {"finish_reason": "length"}).items()
    assert json.loads(found["extra_info"]["metadata"]) == {"level": 3}


@pytest.mark.parametrize("column", [{}, {"messages": "mine"}])
def test_turns_that_a_column_cannot_hold_are_in_the_metadata(written, column):
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    turns = [*ASKED, called, {"role": "tool", "content": "5"}]
    (found,) = written([{"chat": turns, **column}], "--prompt-field", "chat")
    metadata = json.loads(found["extra_info"]["metadata"])
    assert metadata.pop("sample.messages" if column else "messages")[2] == called
    assert metadata == column


def test_a_parquet_file_of_verl_comes_out_with_its_types(written, tmp_path):
    rows = [row("5", answer="2 + 3 = 5"), row("6", answer="2 + 4 = 6")]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = written(tmp_path / "rows.parquet")
    assert [f["reward_model"] for f in found] == [r["reward_model"] for r in rows]
    assert [{k: f["extra_info"][k] for k in r["extra_info"]} for f, r in zip(found, rows, strict=True)] == [
        r["extra_info"] for r in rows
    ]
    schema = pq.read_schema(tmp_path / "x.parquet")
    assert schema.field("reward_model").type == SCHEMAS["verl"].field("reward_model").type


def test_rows_of_several_kinds(written):
    """Numbers among numbers stay numbers; what has no common type is text, as JSON writes it."""
    plain = {"prompt": "Hi", "answer": "5", "data_source": 3}
    first, second, third = written([row("5", x=1, y=[]), row({"a": [1]}, x=0.5, y=["z"], index="q"), plain])
    assert [r["reward_model"]["ground_truth"] for r in (first, second, third)] == ["5", '{"a": [1]}', "5"]
    assert [r["extra_info"]["x"] for r in (first, second, third)] == [1.0, 0.5, None]
    assert [r["extra_info"]["y"] for r in (first, second, third)] == [[], ["z"], None]
    assert [r["extra_info"]["index"] for r in (first, second, third)] == ["7", "q", "2"]
    assert [r["data_source"] for r in (first, second, third)] == ["gsm", "gsm", "3"]


def test_a_row_without_them_has_those_of_the_dataset(written):
    (found,) = written([{"prompt": "Hi", "answer": "5", "reward_model": "none", "extra_info": "x"}])
    assert found["reward_model"] == {"style": "rule", "ground_truth": "5"}
    assert (found["data_source"], found["ability"], found["extra_info"]["index"]) == ("data", "general", 0)
    assert json.loads(found["extra_info"]["metadata"]) == {"answer": "5", "reward_model": "none", "extra_info": "x"}


def test_rows_that_were_written_before_keep_what_they_had():
    first = {"prompt_index": 3, "metadata": row("5")}
    for times in range(3):
        again = verl_row(LINE | first, "data")
        assert {name for name in again["extra_info"] if name.endswith("index")} == {
            *("sample." * n + "index" for n in range(times + 2)),
            *("sample." * n + "sample_index" for n in range(times + 1)),
        }
        first = {"prompt_index": 3, "metadata": again}


LONG = 2**53 + 1  # float64 has only the numbers beside it


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([LONG, 1.5], [str(LONG), "1.5"]),
        ([LONG - 1, 1.5, None], [float(LONG - 1), 1.5, None]),
        ([1.5, 1, LONG], ["1.5", "1", str(LONG)]),
        ([LONG, 1, -LONG], [LONG, 1, -LONG]),
        ([2**63 - 1, -(2**63)], [2**63 - 1, -(2**63)]),
        ([2**63, 1], [str(2**63), "1"]),
        ([10**400, 1.5], [str(10**400), "1.5"]),
        ([[1, LONG], [0.5]], [["1", str(LONG)], ["0.5"]]),
        ([{"a": LONG}, {"a": 0.5}], [{"a": str(LONG)}, {"a": "0.5"}]),
        ([{}], ["{}"]),
        ([{}, None], ["{}", None]),
        ([{}, 5], ["{}", "5"]),
        ([{}, {"a": 1}], [{"a": None}, {"a": 1}]),
        ([[{}], []], [["{}"], []]),
        ([{"a": {}}, {"a": None}], [{"a": "{}"}, {"a": None}]),
    ],
)
def test_what_parquet_has_no_type_for_is_text(tmp_path, values, found):
    """As JSON writes it: no digit is lost, and nothing that is there becomes null."""
    rows = [verl_row(LINE | {"prompt_index": i, "metadata": row("5", x=x)}, "data") for i, x in enumerate(values)]
    pq.write_table(table_of(rows, schema_of("verl", rows)), tmp_path / "x.parquet")
    read = pq.read_table(tmp_path / "x.parquet")["extra_info"].to_pylist()
    assert [extra_info["x"] for extra_info in read] == found
    assert list(map(type, [extra_info["x"] for extra_info in read])) == list(map(type, found))


def test_parts_of_an_earlier_version_are_made_again(tmp_path):
    """Parquet, in which what a row came with cannot be told any more."""
    with Parts(str(tmp_path / "parts"), "verl", False, {}) as parts:
        (tmp_path / "parts" / "samples").mkdir()
        pq.write_table(table_of([], SCHEMAS["verl"]), tmp_path / "parts" / "samples" / "part-000000.parquet")
        parts.done.add(0)
        parts.write_manifest(complete=True)
    with pytest.raises(OutputError, match="is not complete: 0 parts are there; start its run again"):
        merge(str(tmp_path / "parts"), tmp_path / "x.parquet")
    with Parts(str(tmp_path / "parts"), "verl", False, {}) as parts:
        assert parts.done == set()


def test_parts_without_samples_are_merged(tmp_path):
    """All their prompts failed."""
    with Parts(str(tmp_path / "parts"), "verl", False, {}) as parts:
        parts.put_part(0, tmp_path)
        parts.write_manifest(complete=True)
    merge(str(tmp_path / "parts"), tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet") == table_of([], SCHEMAS["verl"])


@pytest.mark.skipif(not CASE.is_file(), reason="the folder of cases is not beside this checkout")
def test_the_case(written):
    (found,), (given,) = written(CASE), lines(CASE)
    assert reward_of(found) == {"ground_truth": "5", "data_source": "gsm", "index": 0, "tools_kwargs": {}}
    assert found["prompt"] == given["prompt"]


def test_verl_itself_reads_it(written, tmp_path):
    """Where it is installed."""
    reader = pytest.importorskip("verl.utils.dataset.rl_dataset", reason="verl is not installed")
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    written([row("5"), row(["5"])])
    config = OmegaConf.create({"cache_dir": str(tmp_path / "verl"), "filter_overlong_prompts_workers": 1})
    data = reader.RLHFDataset(str(tmp_path / "x.parquet"), AutoTokenizer.from_pretrained(THETA), config)
    batch = reader.collate_fn([data[0], data[1]])
    assert [r["ground_truth"] for r in batch["reward_model"]] == ["5", '["5"]']
    assert [r["index"] for r in batch["extra_info"]] == [7, 7]
    assert list(batch["data_source"]) == ["gsm", "gsm"]
    assert batch["raw_prompt"][0] == ASKED
