"""What a run writes, and how it never loses a sample.

Every format is written through a journal of one JSON line a sample, appended and synced before the sample counts:
the output itself for `jsonl` and `openai-batch`, `x.journal.jsonl` for `parquet` and `verl`, which are made from it at
the end. Beside the output `x.jsonl` stand `x.run.json` (the settings it was started with), `x.errors.jsonl`,
`x.lock` and, on request, `x.diagnostics.jsonl`. Fields are described in `docs/guide.md`.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from qstar.data import Prompt
from qstar.decode import FIELDS, Sample

FORMATS = {"jsonl": ".jsonl", "openai-batch": ".jsonl", "parquet": ".parquet", "verl": ".parquet"}
Key = tuple[int, int]  # prompt_index, sample_index


class OutputError(RuntimeError):
    """The output cannot be written or resumed; the message is one line."""


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
        "logq_sum": fields["logq"].sum(),
        "logp_theta_sum": fields["logp_theta"].sum(),
        "logp_t_sum": fields["logp_t"].sum(),
        "prompt_ids_theta": sample.request.ids_theta,
        "prompt_ids_t": sample.request.ids_t,
        "tokens": {"id": sample.token_ids}
        | {name: short(sample.fields[name]) for name in FIELDS}
        | {"status": sample.status},
    }


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


class Output:
    """The files of one run; a context manager that holds the lock.

    Args:
        path: the output file.
        output_format: one of `FORMATS`.
        save_diagnostics: write `x.diagnostics.jsonl` too.
        settings: everything that a resumed run must have in common with the first start, JSON-serialisable.

    Attributes:
        done: keys of the samples that are on disk.

    Raises:
        OutputError: another process writes this output, it was started with other settings, or its files were changed.
    """

    def __init__(self, path: Path, output_format: str, save_diagnostics: bool, settings: dict[str, Any]):
        self.path, self.format, self.settings = path, output_format, settings
        stem = path.with_suffix("") if path.suffix == FORMATS[output_format] else path
        self.journal = path if FORMATS[output_format] == ".jsonl" else Path(f"{stem}.journal.jsonl")
        self.run_file, self.lock_file = Path(f"{stem}.run.json"), Path(f"{stem}.lock")
        self.errors_file = Path(f"{stem}.errors.jsonl")
        self.diagnostics_file = Path(f"{stem}.diagnostics.jsonl") if save_diagnostics else None
        self.done: set[Key] = set()
        self.errors = 0
        self._files: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> "Output":
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock_file.open("a").close()  # a folder that cannot be written to would look like a held lock
            self._lock = FileLock(self.lock_file)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise OutputError(
                    f"another process is writing {self.path}; wait for it or choose another --output"
                ) from None
            try:
                self._check_settings()
                self._repair()
                self.errors_file.unlink(missing_ok=True)  # what failed is tried again, and recorded again if it must be
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()
        self._lock.release()

    def _check_settings(self) -> None:
        if self.run_file.exists():
            try:
                before = json.loads(self.run_file.read_text(encoding="utf-8"))
            except ValueError:
                raise OutputError(f"{self.run_file} is not JSON; restore it or choose another --output") from None
            for name in [*self.settings, *(before.keys() - self.settings.keys())]:
                if before.get(name) != self.settings.get(name):
                    raise OutputError(
                        f"{self.path} was started with {name} = {before.get(name)!r} and this run has "
                        f"{self.settings.get(name)!r}; use the same setting to resume it, or another --output"
                    )
            return
        existing = [p for p in (self.path, self.journal) if p.exists() and p.stat().st_size]
        if existing:
            raise OutputError(
                f"{existing[0]} exists and {self.run_file} does not, so it cannot be resumed; choose another --output"
            )
        temporary = Path(f"{self.run_file}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self.settings, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.run_file)

    def _repair(self) -> None:
        """Cut the journal and the diagnostics back to the samples that both hold completely.

        The diagnostics of a sample are written first, so whatever a kill leaves behind is at the end of the files.
        """
        journal = list(complete_lines(self.journal))
        whole = len(journal)
        if self.diagnostics_file is not None:
            diagnostics = list(complete_lines(self.diagnostics_file))
            whole = min(whole, len(diagnostics))
            for number, ((key, _), (other, _)) in enumerate(zip(journal, diagnostics, strict=False), 1):
                if key != other:
                    raise OutputError(
                        f"line {number} of {self.diagnostics_file} belongs to sample {other} "
                        f"and that of {self.journal} to {key}; the files were changed, so choose another --output"
                    )
            truncate(self.diagnostics_file, diagnostics[whole - 1][1] if whole else 0)
        truncate(self.journal, journal[whole - 1][1] if whole else 0)
        self.done = {key for key, _ in journal[:whole]}
        if len(self.done) != whole:
            raise OutputError(f"{self.journal} holds a sample twice; it was changed, so choose another --output")

    def write(self, done: list[Finished], lines: list[dict[str, Any]]) -> None:
        """Put finished samples on disk; `lines` are their lines in the journal.

        Raises:
            OutputError: the disk is full or fails; what was written before is safe, and a new start goes on from there.
        """
        if self.diagnostics_file is not None:
            self._append(self.diagnostics_file, [diagnostics_line(d) for d in done])
        self._append(self.journal, lines)
        self.done.update(d.key for d in done)

    def write_error(self, prompt: Prompt, sample_index: int | None, error: str) -> None:
        """Record why a prompt (or one sample of it) failed."""
        self.errors += 1
        line = {"prompt_index": prompt.index, "sample_index": sample_index, "error": error, "metadata": prompt.metadata}
        self._append(self.errors_file, [{"id": prompt.id} | line])

    def _append(self, path: Path, lines: list[dict[str, Any]]) -> None:
        data = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
        with explained(path, f"{len(self.done)} samples are safe; start the same command again to go on"):
            # unbuffered: a failed write leaves nothing behind that would be written later
            file = self._files.get(path) or self._files.setdefault(path, path.open("ab", buffering=0))
            size = os.fstat(file.fileno()).st_size
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise

    def finish(self, data_source: str) -> None:
        """Make the Parquet file from the journal, in the order of the prompts."""
        if self.journal == self.path:
            return
        row = parquet_row if self.format == "parquet" else lambda line: verl_row(line, data_source)
        offsets = sorted((key, start) for key, start in line_starts(self.journal))
        temporary = Path(f"{self.path}.tmp")
        with explained(temporary, "all samples are safe in the journal"), self.journal.open("rb") as file:

            def read(start: int) -> dict[str, Any]:
                file.seek(start)
                return row(json.loads(file.readline()))

            with pq.ParquetWriter(temporary, SCHEMAS[self.format]) as writer:
                for i in range(0, len(offsets), 1000):
                    rows = [read(start) for _, start in offsets[i : i + 1000]]
                    writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMAS[self.format]))
            temporary.replace(self.path)


def complete_lines(path: Path) -> Iterator[tuple[Key, int]]:
    """The sample of each complete line and the offset of its end; a torn last line is left out.

    Raises:
        OutputError: a line before the last is not what this program writes.
    """
    if not path.exists():
        return
    end, broken = 0, None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if broken:
                raise OutputError(
                    f"line {broken} of {path} is not a sample's line; the file was changed, so choose another --output"
                )
            end += len(line)
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("torn")
                yield key_of(json.loads(line)), end
            except (ValueError, KeyError, TypeError, AttributeError):
                broken = number


def line_starts(path: Path) -> Iterator[tuple[Key, int]]:
    """The sample of each complete line and the offset of its start."""
    start = 0
    for key, end in complete_lines(path):
        yield key, start
        start = end


def truncate(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


@contextmanager
def explained(path: Path, then: str = "") -> Iterator[None]:
    """Turn an operating system's error into one line that says what to do."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {what}{'; ' if then else ''}{then}") from error
