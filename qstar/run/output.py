"""What a run writes, and how it never loses a sample.

Every format is written through a journal of one JSON line a sample, appended and synced before the sample counts:
the output itself for `jsonl` and `openai-batch`, `x.journal.jsonl` for `parquet` and `verl`, which are made from it at
the end. Beside the output `x.jsonl` stand `x.run.json` (the settings it was started with), `x.errors.jsonl`,
`x.lock` and, on request, `x.diagnostics.jsonl`. Fields are described in `docs/guide.md`.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from qstar.data.prompts import Prompt
from qstar.run.formats import Finished, Key, diagnostics_line, key_of, parquet_row, schema_of, table_of, verl_row

FIRST_START = "first start"  # the name of its moment beside the settings
FORMATS = {"jsonl": ".jsonl", "openai-batch": ".jsonl", "parquet": ".parquet", "verl": ".parquet"}
GROUP = 1000  # rows of a Parquet file that are written at once


class OutputError(RuntimeError):
    """The output cannot be written or resumed; the message is one line."""


class Output:
    """The files of one run; a context manager that holds the lock.

    Args:
        path: the output file.
        output_format: one of `FORMATS`.
        save_diagnostics: write `x.diagnostics.jsonl` too.
        settings: everything that a resumed run must have in common with the first start, JSON-serialisable.

    Attributes:
        done: keys of the samples that are on disk.
        moment: of the first start, as a clock on the wall showed it; None where an earlier version has not noted it.

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
        self.moment: datetime | None = None
        self.errors: list[dict[str, Any]] = []  # of this start; what earlier ones recorded is tried again
        self._files: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> "Output":
        with explained(self.path):
            self._lock = locked(self.lock_file, self.path)
            try:
                self._check_settings()
                self._repair()
                drop_torn_line(self.errors_file)
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()
        self._lock.release()

    def before(self) -> dict[str, Any] | None:
        """The settings of the first start; None where there is nothing to resume.

        Raises:
            OutputError: they are lost.
        """
        existing = [p for p in (self.path, self.journal) if p.exists() and p.stat().st_size]
        if not existing:
            return None
        try:
            return dict(json.loads(self.run_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise OutputError(
                f"{existing[0]} exists and {self.run_file} does not, so it cannot be resumed; choose another --output"
            ) from None
        except (ValueError, TypeError):
            raise OutputError(f"{self.run_file} is not JSON; restore it or choose another --output") from None

    def _check_settings(self) -> None:
        before = self.before()
        if before is not None:
            self.moment = check_settings(self.path, before, self.settings)
            return
        self.moment = datetime.now()
        settings = self.settings | {FIRST_START: self.moment.isoformat()}
        write_atomically(self.run_file, json.dumps(settings, indent=1, ensure_ascii=False).encode())

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

    def write(self, done: Finished, line: dict[str, Any]) -> None:
        """Put a finished sample on disk; `line` is its line in the journal.

        Raises:
            OutputError: the disk is full or fails; what was written before is safe, and a new start goes on from there.
        """
        if self.diagnostics_file is not None:
            self._append(self.diagnostics_file, diagnostics_line(done))
        self._append(self.journal, line)
        self.done.add(done.key)

    def write_error(self, prompt: Prompt, sample_index: int | None, error: str) -> None:
        """Record why a prompt (or one sample of it) failed."""
        line = {"prompt_index": prompt.index, "sample_index": sample_index, "error": error, "metadata": prompt.metadata}
        self.errors.append({"id": prompt.id} | line)
        self._append(self.errors_file, self.errors[-1])

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        data = json_line(line)
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
        """Everything was tried: leave only this start's errors; make the Parquet file, in the order of the prompts."""
        with explained(self.errors_file):
            write_atomically(self.errors_file, b"".join(json_line(line) for line in self.errors))
            if not self.errors:
                self.errors_file.unlink()
        if self.journal == self.path or not self.done:
            return
        row = parquet_row if self.format == "parquet" else lambda line: verl_row(line, data_source)
        keys, ends = zip(*complete_lines(self.journal), strict=True)
        offsets = sorted(zip(keys, (0, *ends[:-1]), strict=True))  # where each line starts, in the order of the prompts
        with (
            explained(Path(f"{self.path}.tmp"), "all samples are safe in the journal"),
            self.journal.open("rb") as file,
            replacing(self.path) as target,
        ):

            def read(start: int) -> dict[str, Any]:
                file.seek(start)
                return row(json.loads(file.readline()))

            write_parquet(target, self.format, lambda: (read(start) for _, start in offsets))


def write_parquet(target: IO[bytes], output_format: str, read: Callable[[], Iterator[dict[str, Any]]]) -> None:
    """Write the rows of a Parquet format, which are read twice: the types of verl's are those of all rows together."""
    schema, rows = schema_of(output_format, read()), read()
    with pq.ParquetWriter(target, schema) as writer:
        while group := list(islice(rows, GROUP)):
            writer.write_table(table_of(group, schema))


def locked(lock_file: Path, output: Path | str) -> FileLock:
    """The lock of an output, held.

    Raises:
        OutputError: another process holds it.
        OSError: its folder cannot be written to.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock_file.open("a").close()  # a folder that cannot be written to would look like a held lock
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"another process is writing {output}; wait for it or choose another --output") from None
    return lock


def check_settings(path: Path | str, before: dict[str, Any], now: dict[str, Any]) -> datetime | None:
    """Refuse to go on with other settings than an output was started with; the moment of that start, if it is known.

    Raises:
        OutputError: one differs; the message names it and both values.
    """
    for name in [*now, *(before.keys() - now.keys() - {FIRST_START})]:
        unknown = name.startswith("weights of ") and ":" not in str(before.get(name))
        # what one of the two did not know yet says nothing, as an empty object does
        was, is_now = (None if settings.get(name) == {} else settings.get(name) for settings in (before, now))
        if unknown or was != is_now:
            if unknown:
                raise OutputError(
                    f"{path} was started when not every tensor of the {name} was looked at, or its commit not known, "
                    "so whether they are the same cannot be told; choose another --output"
                )
            raise OutputError(
                f"{path} was started with {name} = {before.get(name)!r} and this run has {now.get(name)!r}; "
                "use the same setting to resume it, or another --output"
            )
    return datetime.fromisoformat(before[FIRST_START]) if FIRST_START in before else None


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


def json_line(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file, so that a kill leaves the old one or the new one."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when it is complete and on disk; until then it is `temporary`,
    `x.tmp` by default."""
    temporary = temporary or Path(f"{path}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would take up what is left
        raise


def drop_torn_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        truncate(path, data.rfind(b"\n") + 1)


def truncate(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


@contextmanager
def explained(path: Path | str, then: str = "") -> Iterator[None]:
    """Turn an operating system's error into one line that says what to do."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {what}{'; ' if then else ''}{then}") from error
