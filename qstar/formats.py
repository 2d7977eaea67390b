"""What is written about a sample: its line or row in every output format, field by field as in `docs/guide.md`."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from qstar.data import Prompt
from qstar.decode import FIELDS, Sample
from qstar.speculate import Tally
from qstar_kernels.types import OF_TOKEN

Key = tuple[int, int]  # prompt_index, sample_index


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


def finite(value: float) -> float | None:
    """The value as JSON has it: null for −inf."""
    return float(value) if np.isfinite(value) else None


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
    sample, fields = done.sample, {name: np.asarray(done.sample.fields[name]) for name in FIELDS}
    alpha, kl_theta, kl_t = fields["alpha"], fields["kl_theta"], fields["kl_t"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = fields["ess_theta"] / fields["ess_t"]
    ratio = ratio[np.isfinite(ratio)]  # a model with mass outside q*'s support has ESS 0
    return {
        "id": done.id,
        "prompt_index": done.prompt.index,
        "sample_index": done.sample_index,
        "num_tokens": len(sample.token_ids),
        "alpha_mean": alpha.mean(),
        "alpha_std": alpha.std(),
        "alpha_min": alpha.min(),
        "alpha_max": alpha.max(),
        "kl_theta_mean": kl_theta.mean(),
        "kl_t_mean": kl_t.mean(),
        "kl_gap_max": np.abs(kl_theta - kl_t).max(),
        "ess_theta_mean": fields["ess_theta"].mean(),
        "ess_t_mean": fields["ess_t"].mean(),
        "ess_ratio_mean": ratio.mean() if len(ratio) else None,
        "ess_ratio_std": ratio.std() if len(ratio) else None,
        **{f"{name}_sum": finite(fields[name].sum()) for name in OF_TOKEN},
        **(drafts(sample.tally) if sample.tally.drafted else {}),
        "prompt_ids_theta": sample.request.ids_theta,
        "prompt_ids_t": sample.request.ids_t,
        "tokens": {"id": sample.token_ids}
        | {name: short(sample.fields[name]) for name in FIELDS}
        | {"status": sample.status},
    }


def drafts(tally: Tally) -> dict[str, Any]:
    """What speculative decoding did for a sample."""
    return {"verify_passes": tally.passes, "drafted": tally.drafted, "accepted": tally.accepted}


def openai_line(done: Finished, tokenizer, model: str, single: bool) -> dict[str, Any]:
    """The line OpenAI's batch API returns for this sample; `logprobs` are log q*."""
    sample = done.sample
    content = []
    for token, logq in zip(sample.token_ids, short(sample.fields["logq"]), strict=True):
        text = tokenizer.decode([token])
        content.append({"token": text, "logprob": logq, "bytes": list(text.encode()), "top_logprobs": []})
    used, drawn = len(sample.request.ids_theta), len(sample.token_ids)
    body = {
        "id": f"chatcmpl-{done.id}",
        "object": "chat.completion",
        "created": 0,  # a time of day would make a resumed run differ from an uninterrupted one
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": sample.text},
                "logprobs": {"content": content},
                "finish_reason": "length" if sample.finish_reason == "length" else "stop",
            }
        ],
        "usage": {"prompt_tokens": used, "completion_tokens": drawn, "total_tokens": used + drawn},
    }
    return {
        "id": f"batch_req_{done.prompt.index}_{done.sample_index}",
        "custom_id": done.prompt.id if single else done.id,
        "response": {"status_code": 200, "request_id": f"req_{done.prompt.index}_{done.sample_index}", "body": body},
        "error": None,
    }


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMAS = {
    "parquet": pa.schema(
        [
            ("id", pa.string()),
            ("prompt_index", pa.int64()),
            ("sample_index", pa.int64()),
            ("messages", MESSAGES),
            ("finish_reason", pa.string()),
            ("num_tokens", pa.int64()),
            ("metadata", pa.string()),
        ]
    ),
    "verl": pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", MESSAGES),
            ("response", pa.string()),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            (
                "extra_info",
                pa.struct(
                    [
                        ("id", pa.string()),
                        ("index", pa.int64()),
                        ("sample_index", pa.int64()),
                        ("finish_reason", pa.string()),
                        ("num_tokens", pa.int64()),
                        ("metadata", pa.string()),
                    ]
                ),
            ),
        ]
    ),
}


def metadata_text(line: dict[str, Any]) -> str:
    """The metadata as JSON; turns with more than role and content, which a Parquet column cannot hold, are added."""
    extra = {} if all(m.keys() == {"role", "content"} for m in line["messages"]) else {"messages": line["messages"]}
    return json.dumps(line["metadata"] | extra, ensure_ascii=False)


def parquet_row(line: dict[str, Any]) -> dict[str, Any]:
    """A row of format `parquet`: the `jsonl` line with the metadata, whose columns vary, as JSON text."""
    return line | {"metadata": metadata_text(line)}


def verl_row(line: dict[str, Any], data_source: str) -> dict[str, Any]:
    """A row of format `verl`: its RL columns for the prompt, and the answer as `response`."""
    metadata = line["metadata"]
    truth = next(
        (metadata[k] for k in ("answer", "solution", "completion", "output") if metadata.get(k) is not None), ""
    )
    return {
        "data_source": str(metadata.get("data_source", data_source)),
        "prompt": line["messages"][:-1],
        "response": line["messages"][-1]["content"],
        "ability": str(metadata.get("ability", "general")),
        "reward_model": {"style": "rule", "ground_truth": truth if isinstance(truth, str) else json.dumps(truth)},
        "extra_info": {
            "id": line["id"],
            "index": line["prompt_index"],
            "sample_index": line["sample_index"],
            "finish_reason": line["finish_reason"],
            "num_tokens": line["num_tokens"],
            "metadata": metadata_text(line),
        },
    }


def key_of(line: dict[str, Any]) -> Key:
    """The sample that a line of any journal belongs to."""
    if "prompt_index" in line:
        return line["prompt_index"], line["sample_index"]
    _, _, prompt_index, sample_index = line["id"].split("_")
    return int(prompt_index), int(sample_index)
