"""What is written about a sample: its line or row in every output format, field by field as in `docs/guide.md`."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import index
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qstar.data.batch import COMPLETIONS, RESPONSES
from qstar.data.prompts import TRUTH_COLUMNS, Prompt
from qstar.sample import Sample, finite
from qstar.weights import derived
from qstar_kernels.types import FIELDS, OF_ROW, OF_TOKEN

Key = tuple[int, int]  # prompt_index, sample_index
# What reading a line or a table raises that this program did not write
FOREIGN = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, pa.ArrowException)
# What the diagnostics have of a sample as a whole
OF_SAMPLES = (
    *(f"alpha_{name}" for name in ("mean", "std", "min", "max")),
    *("kl_theta_mean", "kl_t_mean", "kl_gap_max", "ess_theta_mean", "ess_t_mean", "ess_ratio_mean", "ess_ratio_std"),
    *(f"{name}_sum" for name in OF_TOKEN),
)


@dataclass(frozen=True)
class Finished:
    """A finished sample with the prompt it answers; `messages` is the conversation with the answer last."""

    prompt: Prompt
    sample_index: int
    messages: list[dict[str, str]]
    sample: Sample

    @property
    def key(self) -> Key:
        return self.prompt.index, self.sample_index

    @property
    def id(self) -> str:
        return f"{self.prompt.id}-{self.sample_index}"


def short(values: list[float]) -> list[float | None]:
    """The shortest decimals that give back the same float32 numbers, null for −inf, which JSON does not have."""
    return [float(str(x)) if np.isfinite(x) else None for x in np.asarray(values, dtype=np.float32)]


def sample_line(done: Finished) -> dict[str, Any]:
    """The line of format `jsonl`."""
    return {
        "id": done.id,
        "prompt_index": done.prompt.index,
        "sample_index": done.sample_index,
        "messages": done.messages,
        "finish_reason": done.sample.finish_reason,
        "num_tokens": len(done.sample.token_ids),
        "metadata": done.prompt.metadata,
    }


def diagnostics_line(done: Finished) -> dict[str, Any]:
    """The line of `x.diagnostics.jsonl`; all in nats, per-token arrays under `tokens`."""
    sample, fields = done.sample, {name: np.asarray(values) for name, values in done.sample.fields.items()}
    fields |= derived(fields)
    alpha, ratio, tally = fields["alpha"], fields["ess_ratio"][~np.isnan(fields["ess_ratio"])], sample.tally
    drafts = {"verify_passes": tally.passes, "drafted": tally.drafted, "accepted": tally.accepted}
    return {
        "id": done.id,
        "prompt_index": done.prompt.index,
        "sample_index": done.sample_index,
        "num_tokens": len(sample.token_ids),
        "alpha_mean": alpha.mean(),
        "alpha_std": alpha.std(),
        "alpha_min": alpha.min(),
        "alpha_max": alpha.max(),
        "kl_theta_mean": fields["kl_theta"].mean(),
        "kl_t_mean": fields["kl_t"].mean(),
        "kl_gap_max": fields["kl_gap"].max(),
        "ess_theta_mean": fields["ess_theta"].mean(),
        "ess_t_mean": fields["ess_t"].mean(),
        "ess_ratio_mean": ratio.mean() if len(ratio) else None,
        "ess_ratio_std": ratio.std() if len(ratio) else None,
        **{f"{name}_sum": finite(fields[name].sum()) for name in OF_TOKEN},
        **(drafts if tally.drafted else {}),
        "prompt_ids_theta": sample.request.ids_theta,
        "prompt_ids_t": sample.request.ids_t,
        "tokens": {"id": sample.token_ids}
        | {name: short(sample.fields[name]) for name in OF_TOKEN + OF_ROW}
        | {"status": sample.status},
    }


def openai_line(done: Finished, tokenizer, model: str, single: bool) -> dict[str, Any]:
    """The line OpenAI's batch API returns for this sample, with the object of its request's endpoint."""
    make = {COMPLETIONS: completion, RESPONSES: response}.get(done.prompt.endpoint, chat_completion)
    tokens = [
        {"token": text, "logprob": logq, "bytes": list(text.encode()), "top_logprobs": []}
        for text, logq in zip(
            (tokenizer.decode([token]) for token in done.sample.token_ids),
            short(done.sample.fields["logq"]),
            strict=True,
        )
    ]
    return {
        "id": f"batch_req_{done.prompt.index}_{done.sample_index}",
        "custom_id": done.prompt.id if single else done.id,
        "response": {
            "status_code": 200,
            "request_id": f"req_{done.prompt.index}_{done.sample_index}",
            "body": make(done, tokens, model),
        },
        "error": None,
    }


def chat_completion(done: Finished, tokens: list[dict[str, Any]], model: str) -> dict[str, Any]:
    """The body that `/v1/chat/completions` answers with; `logprobs` are log q*."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": done.sample.text},
        "logprobs": {"content": tokens},
        "finish_reason": finish_reason(done.sample),
    }
    return made(done, "chatcmpl", "chat.completion", model) | {"choices": [choice], "usage": usage(done.sample)}


def completion(done: Finished, tokens: list[dict[str, Any]], model: str) -> dict[str, Any]:
    """The body that `/v1/completions` answers with; `logprobs` are log q*, offsets those of the tokens' own texts."""
    texts = [token["token"] for token in tokens]
    logprobs = {
        "tokens": texts,
        "token_logprobs": [token["logprob"] for token in tokens],
        "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
        "top_logprobs": None,
    }
    choice = {"index": 0, "text": done.sample.text, "logprobs": logprobs, "finish_reason": finish_reason(done.sample)}
    return made(done, "cmpl", "text_completion", model) | {"choices": [choice], "usage": usage(done.sample)}


def response(done: Finished, tokens: list[dict[str, Any]], model: str) -> dict[str, Any]:
    """The body that `/v1/responses` answers with; `logprobs` are log q*. What the request said is in it again."""
    asked, sample = done.prompt.metadata.get("body") or {}, done.sample
    status = "incomplete" if finish_reason(sample) == "length" else "completed"
    text = {"type": "output_text", "text": sample.text, "annotations": [], "logprobs": tokens}
    output = {"id": f"msg_{done.id}", "type": "message", "role": "assistant", "status": status, "content": [text]}
    used = usage(sample)
    return made(done, "resp", "response", model, "created_at") | {
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": asked.get("instructions"),
        "metadata": asked.get("metadata"),
        "output": [output],
        "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
        "tool_choice": asked.get("tool_choice") or "auto",
        "tools": [
            {"type": "function"} | tool["function"] if isinstance(tool.get("function"), dict) else tool
            for tool in done.prompt.tools or ()
        ],
        "usage": {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        },
    }


def made(done: Finished, prefix: str, kind: str, model: str, created: str = "created") -> dict[str, Any]:
    """What every body begins with; a time of day would make a resumed run differ from an uninterrupted one."""
    return {"id": f"{prefix}-{done.id}", "object": kind, created: 0, "model": model}


def finish_reason(sample: Sample) -> str:
    """The reason by OpenAI's name for it."""
    return "length" if sample.finish_reason == "length" else "stop"


def usage(sample: Sample) -> dict[str, int]:
    """Tokens of the prompt and of the answer."""
    used, drawn = len(sample.request.ids_theta), len(sample.token_ids)
    return {"prompt_tokens": used, "completion_tokens": drawn, "total_tokens": used + drawn}


NOTHING, TEXT, WHOLE = pa.null(), pa.string(), pa.int64()
LONG = pa.decimal128(19)  # whole numbers among them that float64 has not
MESSAGES = pa.list_(pa.struct({"role": TEXT, "content": TEXT}))
OF_SAMPLE = {"sample_index": WHOLE, "finish_reason": TEXT, "num_tokens": WHOLE, "metadata": TEXT}
SCHEMAS = {
    "parquet": pa.schema({"id": TEXT, "prompt_index": WHOLE, "sample_index": WHOLE, "messages": MESSAGES} | OF_SAMPLE),
    "verl": pa.schema(
        {
            "data_source": TEXT,
            "prompt": MESSAGES,
            "response": TEXT,
            "ability": TEXT,
            "reward_model": pa.struct({"style": TEXT, "ground_truth": TEXT}),
            "extra_info": pa.struct({"id": TEXT, "index": WHOLE} | OF_SAMPLE),
        }
    ),
}


def _lists(of_token: pa.DataType, names: Iterable[str]) -> list[tuple[str, pa.DataType]]:
    return [(name, pa.list_(of_token)) for name in names]


TOKENS = [*_lists(pa.int32(), ("id",)), *_lists(pa.float32(), FIELDS), *_lists(pa.int8(), ("status",))]
# A row of `x.diagnostics.parquet`: the line of `x.diagnostics.jsonl`, with the infinite numbers themselves
DIAGNOSTICS = pa.schema(
    [
        ("id", pa.string()),
        *((name, pa.int64()) for name in ("prompt_index", "sample_index", "num_tokens")),
        *((name, pa.float64()) for name in OF_SAMPLES),
        ("verify_passes", pa.int64()),
        *_lists(pa.int64(), ("drafted", "accepted")),
        *_lists(pa.int32(), ("prompt_ids_theta", "prompt_ids_t")),
        ("tokens", pa.struct(TOKENS)),
    ]
)
# What null stands for where JSON has no number; nothing else is ever null
NULL = {"logq": -math.inf, "logp_theta": -math.inf, "logp_t": -math.inf, "kl_theta": math.inf, "kl_t": math.inf}
NUMBERS = [f"tokens.{name}.list.element" for name in FIELDS]  # the columns that take the space


def diagnostics_table(lines: list[dict[str, Any]]) -> pa.Table:
    """Lines of diagnostics as a table."""
    of_tokens = DIAGNOSTICS.field("tokens").type

    def lists(name: str) -> pa.Array:
        values = [line["tokens"].get(name, ()) for line in lines]
        numbers = np.fromiter(
            (NULL.get(name, np.nan) if x is None else x for of_line in values for x in of_line),
            dtype=of_tokens.field(name).type.value_type.to_pandas_dtype(),
        )
        return pa.ListArray.from_arrays(np.cumsum([0, *map(len, values)], dtype=np.int32), numbers)

    names = [field.name for field in of_tokens]
    tokens = pa.StructArray.from_arrays([lists(name) for name in names], fields=list(of_tokens))
    others = pa.Table.from_pylist(lines, schema=DIAGNOSTICS.remove(DIAGNOSTICS.get_field_index("tokens")))
    return others.append_column(DIAGNOSTICS.field("tokens"), tokens)


def diagnostics_writer(target: IO[bytes]) -> pq.ParquetWriter:
    """Of a file of diagnostics: float32 by their bytes, of which the first are alike."""
    return pq.ParquetWriter(
        target,
        DIAGNOSTICS,
        compression="zstd",
        use_dictionary=["tokens.id.list.element"],
        use_byte_stream_split=NUMBERS,
    )


def metadata_text(line: dict[str, Any]) -> str:
    """The metadata as JSON; turns with more than role and content, which a Parquet column cannot hold, are added as
    `messages`, or `sample.messages` where the row has a column of that name."""
    metadata = line["metadata"]
    if any(m.keys() != {"role", "content"} for m in line["messages"]):
        metadata = metadata | {"sample.messages" if "messages" in metadata else "messages": line["messages"]}
    return json.dumps(metadata, ensure_ascii=False)


def parquet_row(line: dict[str, Any]) -> dict[str, Any]:
    """A row of format `parquet`: the `jsonl` line with the metadata, whose columns vary, as JSON text."""
    return line | {"metadata": metadata_text(line)}


# What is known of drafts, where there were any
OF_DRAFTS = ("verify_passes", "drafted", "accepted")


def sample_of(row: dict[str, Any]) -> dict[str, Any]:
    """A line or row of any output format as the line of format `jsonl`; of `openai-batch` what its line has of it.

    Raises:
        FOREIGN: it is none.
    """
    if isinstance(row.get("response"), dict):
        row = of_response(row)
    elif "extra_info" in row:
        row = of_verl(row)
    elif isinstance(row.get("metadata"), str):
        row = of_text(row)
    for message in row["messages"]:
        message["role"], message["content"]
    row["messages"][-1].keys(), dict(row.get("metadata") or {})  # is it one?
    return row


def of_text(row: dict[str, Any]) -> dict[str, Any]:
    """The line of a row whose metadata is text (`metadata_text`)."""
    metadata, plain = json.loads(row["metadata"]), row["messages"]
    name = next((name for name in ("sample.messages", "messages") if name in metadata), None)
    messages = metadata.get(name)
    if isinstance(messages, list) and plain == [{"role": m.get("role"), "content": m.get("content")} for m in messages]:
        return row | {"messages": messages, "metadata": {k: v for k, v in metadata.items() if k != name}}
    return row | {"metadata": metadata}


def of_verl(row: dict[str, Any]) -> dict[str, Any]:
    """The line of a row that `verl_row` made; of `metadata` what verl has no column for."""
    extra = row["extra_info"]

    def own(name: str) -> Any:
        """What was written under that name, or behind as many `sample.` as were needed for a free one."""
        found = extra[name]
        while extra.get(name := f"sample.{name}") is not None:
            found = extra[name]
        return found

    line = {name: own(name) for name in ("id", "finish_reason", "metadata")}
    # text, where other rows have something else under that name
    line |= {name: int(own(name)) for name in ("sample_index", "num_tokens")}
    messages = [*row["prompt"], {"role": "assistant", "content": row["response"]}]
    return of_text(line | {"prompt_index": int(own("index")), "messages": messages})


def of_response(row: dict[str, Any]) -> dict[str, Any]:
    """What a line of `openai-batch` says of its sample: the answer, without the conversation before it."""
    body = row["response"]["body"]
    if "choices" in body:
        (choice,) = body["choices"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        reason, used = choice["finish_reason"], body["usage"]["completion_tokens"]
    else:
        text = body["output"][0]["content"][0]["text"]
        reason = "length" if body["status"] == "incomplete" else "stop"
        used = body["usage"]["output_tokens"]
    prompt_index, sample_index = key_of(row)
    return {
        "prompt_index": prompt_index,
        "sample_index": sample_index,
        "messages": [{"role": "assistant", "content": text}],
        "finish_reason": reason,
        "num_tokens": used,
        "metadata": {},
    }


OWN = ("reward_model", "data_source", "ability", "extra_info")  # columns of verl's that a row may have itself


def verl_row(line: dict[str, Any], data_source: str) -> dict[str, Any]:
    """A row of format `verl`: its RL columns for the prompt, and the answer as `response`.

    What a row has of these columns itself stays as it is; what is written about the sample into an `extra_info` of its
    own goes by `sample.` where a name is taken, and by more of them in rows that this has written before.
    """
    own = {name: line["metadata"][name] for name in OWN if line["metadata"].get(name) is not None}
    own = {name: value for name, value in own.items() if isinstance(value, dict) or name in ("data_source", "ability")}
    metadata = {name: value for name, value in line["metadata"].items() if name not in own}
    truth = next((metadata[name] for name in TRUTH_COLUMNS if metadata.get(name) is not None), "")
    extra = {
        "id": line["id"],
        "index": line["prompt_index"],
        "sample_index": line["sample_index"],
        "finish_reason": line["finish_reason"],
        "num_tokens": line["num_tokens"],
        "metadata": metadata_text(line | {"metadata": metadata}),
    }
    taken = own.get("extra_info", {})

    def free(name: str) -> str:
        return free(f"sample.{name}") if name in taken else name

    return {
        "data_source": str(own.get("data_source", data_source)),
        "prompt": [{"role": m["role"], "content": m["content"]} for m in line["messages"][:-1]],
        "response": line["messages"][-1]["content"],
        "ability": str(own.get("ability", "general")),
        "reward_model": own.get(
            "reward_model",
            {"style": "rule", "ground_truth": truth if isinstance(truth, str) else json.dumps(truth)},
        ),
        "extra_info": {free(name): value for name, value in extra.items()} | taken,
    }


def schema_of(output_format: str, rows: Iterable[dict[str, Any]]) -> pa.Schema:
    """The schema of the Parquet file that has these rows: what rows of verl have themselves varies with the dataset."""
    schema = SCHEMAS[output_format]
    if output_format != "verl":
        return schema
    varying = dict.fromkeys(("reward_model", "extra_info"), NOTHING)
    for row in rows:
        varying = {name: wider(known, type_of(row[name])) for name, known in varying.items()}
    types = {name: settled(known) for name, known in varying.items() if known != NOTHING}  # that of no row
    return pa.schema([(field.name, types.get(field.name, field.type)) for field in schema])


def table_of(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The rows as a table of that schema."""
    return pa.Table.from_pylist([as_type(row, pa.struct(schema)) for row in rows], schema=schema)


def type_of(value: Any) -> pa.DataType:
    """The type of a value as JSON has it, until `settled`: text for whole numbers beyond 64 bits."""
    if value is None:
        return NOTHING
    if isinstance(value, dict):
        return pa.struct([(name, type_of(item)) for name, item in value.items()])
    if isinstance(value, list):
        return pa.list_(reduce(wider, map(type_of, value), NOTHING))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return pa.bool_() if isinstance(value, bool) else pa.string()
    if isinstance(value, float):
        return pa.float64()
    if not -(2**63) <= value < 2**63:
        return pa.string()
    return pa.int64() if float(value) == value else LONG


def wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds the values of both: text, where they have nothing in common. Whole numbers among others are
    numbers, as `datasets` reads them, if they have no more digits than those."""
    if one == other or NOTHING in (one, other):
        return one if other == NOTHING else other
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in one}
        for field in other:
            fields[field.name] = wider(fields.get(field.name, NOTHING), field.type)
        return pa.struct(list(fields.items()))
    if pa.types.is_list(one) and pa.types.is_list(other):
        return pa.list_(wider(one.value_type, other.value_type))
    return next((kind for kind in (pa.float64(), LONG) if {one, other} == {kind, pa.int64()}), pa.string())


def settled(known: pa.DataType) -> pa.DataType:
    """The Parquet type of values of that type; what Parquet does not have, objects without fields, is text."""
    if pa.types.is_struct(known):
        fields = [(field.name, settled(field.type)) for field in known]
        return pa.struct(fields) if fields else pa.string()
    if pa.types.is_list(known):
        return pa.list_(settled(known.value_type))
    return pa.int64() if known == LONG else known


def as_type(value: Any, wanted: pa.DataType) -> Any:
    """The value as a column of that type takes it."""
    if value is None or wanted == NOTHING:
        return None
    if pa.types.is_struct(wanted):
        return {field.name: as_type(value.get(field.name), field.type) for field in wanted}
    if pa.types.is_list(wanted):
        return [as_type(item, wanted.value_type) for item in value]
    if pa.types.is_string(wanted):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return float(value) if pa.types.is_float64(wanted) else value


def key_of(line: dict[str, Any]) -> Key:
    """The sample that a line of any journal belongs to.

    Raises:
        FOREIGN: it is no sample's.
    """
    if "prompt_index" in line:
        return index(line["prompt_index"]), index(line["sample_index"])
    if "extra_info" in line:
        return key_of(of_verl(line))
    _, _, prompt_index, sample_index = line["id"].split("_")
    return int(prompt_index), int(sample_index)
