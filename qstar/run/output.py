"""What a run writes, and how it never loses a sample.

Every format is written through a journal of one JSON line a sample, appended and synced before the sample counts:
the output itself for `jsonl` and `openai-batch`, `x.journal.jsonl` for `parquet` and `verl`, which are made from it at
the end. Samples that finish within `LATE` seconds are synced together. Beside the output `x.jsonl` stand `x.run.json`
(the settings it was started with), `x.errors.jsonl`, `x.lock` and, on request, `x.diagnostics.jsonl`, or at the end
`x.diagnostics.parquet` in its place. Fields are described in `docs/guide.md`.
"""

import errno
import json
import mmap
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from threading import RLock, Timer
from typing import IO, Any

import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from qstar.data.prompts import Prompt
from qstar.run.formats import (
    FOREIGN,
    Finished,
    Key,
    diagnostics_line,
    diagnostics_table,
    diagnostics_writer,
    key_of,
    parquet_row,
    schema_of,
    table_of,
    verl_row,
)
from qstar.run.options import FORMATS

FIRST_START = "first start"  # the name of its moment beside the settings
ANSWERS = "answers"  # and of whose answers are scored; see `qstar.run.records.RunFiles.drawn`
GROUP = 1000  # rows of a Parquet file that are written at once
GROUP_TOKENS = 1 << 18  # and tokens of diagnostics
LATE = 0.1  # seconds that a finished sample waits for others, to be synced with them
MOST = 256  # samples that are synced together
# The beginning of a sample's line: its numbers are read off there, and the line is not parsed
HEADS = (
    re.compile(rb'\{"id": "(?:[^"\\]|\\.)*", "prompt_index": (\d+), "sample_index": (\d+)[,}]'),
    re.compile(rb'\{"id": "batch_req_(\d+)_(\d+)", '),
)


class OutputError(RuntimeError):
    """The output cannot be written or resumed; the message is one line."""


class Output:
    """The files of one run; a context manager that holds the lock.

    Args:
        path: the output file.
        output_format: one of `qstar.run.options.FORMATS`.
        save_diagnostics: write `x.diagnostics.jsonl` too.
        settings: everything that a resumed run must have in common with the first start, JSON-serialisable.
        diagnostics_format: one of `qstar.run.options.DIAGNOSTICS_FORMATS`; `parquet` is made at the end.

    Attributes:
        done: keys of the samples that are on disk.
        moment: of the first start, as a clock on the wall showed it; None where an earlier version has not noted it.
        answers: whose answers are scored, noted at the first start; None where q* draws them.

    Raises:
        OutputError: another process writes this output, it was started with other settings, or its files were changed.
    """

    def __init__(
        self,
        path: Path,
        output_format: str,
        save_diagnostics: bool,
        settings: dict[str, Any],
        diagnostics_format: str = "jsonl",
    ):
        self.path, self.format, self.settings = path, output_format, settings
        stem = path.with_suffix("") if path.suffix == FORMATS[output_format] else path
        self.journal = path if FORMATS[output_format] == ".jsonl" else Path(f"{stem}.journal.jsonl")
        self.run_file, self.lock_file = Path(f"{stem}.run.json"), Path(f"{stem}.lock")
        self.errors_file = Path(f"{stem}.errors.jsonl")
        # lines, of all samples or of those since `diagnostics_table` was made
        self.diagnostics_lines = Path(f"{stem}.diagnostics.jsonl") if save_diagnostics else None
        as_table = save_diagnostics and diagnostics_format == "parquet"
        self.diagnostics_table = Path(f"{stem}.diagnostics.parquet") if as_table else None
        self.done: set[Key] = set()
        self.moment: datetime | None = None
        self.answers: str | None = None
        self.errors: list[dict[str, Any]] = []  # of this start; what earlier ones recorded is tried again
        self._files: dict[Path, IO[bytes]] = {}
        # what has finished and is not on disk yet: lines by file, and keys; a timer brings them there
        self._lines: dict[Path, list[bytes]] = defaultdict(list)
        self._keys: list[Key] = []
        self._timer: Timer | None = None
        self._lock, self._failure = RLock(), None

    @property
    def diagnostics_file(self) -> Path | None:
        """What holds the diagnostics when the run is complete."""
        return self.diagnostics_table or self.diagnostics_lines

    def __enter__(self) -> "Output":
        with explained(self.path):
            self._held = locked(self.lock_file, self.path)
            try:
                self._check_settings()
                self._repair()
                drop_torn_line(self.errors_file)
            except BaseException:
                self._held.release()
                raise
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            with suppress(OutputError) if kind is not None else explained(self.path):
                self.sync()  # also what finished before an interruption
        finally:
            for file in self._files.values():
                file.close()
            self._held.release()

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
        settings |= {ANSWERS: self.answers} if self.answers else {}
        write_atomically(self.run_file, json.dumps(settings, indent=1, ensure_ascii=False).encode())

    def _repair(self) -> None:
        """Cut the journal and the diagnostics back to the samples that both hold completely.

        The diagnostics of a sample are synced before its line is written, so whatever a kill leaves behind is at the
        end of the files: what is before that is not read, but for the beginnings of the journal's lines.
        """
        journal = list(complete_lines(self.journal))
        keys, ends = [key for key, _ in journal], [0, *(end for _, end in journal)]
        if self.diagnostics_lines is not None:
            whole = self._in_table(keys)
            kept, size = whole_diagnostics(self.diagnostics_lines, self.journal, keys[whole:])
            truncate(self.diagnostics_lines, size)
            keys = keys[: whole + kept]
        truncate(self.journal, ends[len(keys)])
        self.done = set(keys)
        if len(self.done) != len(keys):
            raise OutputError(f"{self.journal} holds a sample twice; it was changed, so choose another --output")

    def _in_table(self, keys: list[Key]) -> int:
        """How many of the journal's samples have their diagnostics in the Parquet file, the first ones."""
        if self.diagnostics_table is None or not self.diagnostics_table.exists():
            return 0
        table = keys_of_table(self.diagnostics_table)
        if table != keys[: len(table)]:
            raise OutputError(
                f"{self.diagnostics_table} has other samples than {self.journal}; the files were changed, so choose "
                "another --output"
            )
        first = next(complete_lines(self.diagnostics_lines), None)
        if first is not None and first[0] in set(table):
            self.diagnostics_lines.unlink()  # a kill came between the table and this
        return len(table)

    def write(self, done: Finished, line: dict[str, Any]) -> None:
        """Take a finished sample, of which `line` is the line in the journal. It is on disk, and in `done`, at most
        `LATE` seconds later, or after `sync`.

        Raises:
            OutputError: the disk is full or fails; what was written before is safe, and a new start goes on from there.
        """
        diagnostics = self.diagnostics_lines and json_line(diagnostics_line(done))
        line = json_line(line)
        with self._lock:
            if diagnostics:
                self._lines[self.diagnostics_lines].append(diagnostics)
            self._lines[self.journal].append(line)
            self._keys.append(done.key)
            self._soon()

    def write_error(self, prompt: Prompt, sample_index: int | None, error: str) -> None:
        """Record why a prompt (or one sample of it) failed."""
        line = {"prompt_index": prompt.index, "sample_index": sample_index, "error": error, "metadata": prompt.metadata}
        with self._lock:
            self.errors.append({"id": prompt.id} | line)
            self._lines[self.errors_file].append(json_line(self.errors[-1]))
            self._soon()

    def _soon(self) -> None:
        """See that what was taken is synced in time."""
        if self._failure is not None or len(self._keys) >= MOST:
            self.sync()
        elif self._timer is None:
            self._timer = Timer(LATE, self._on_time)
            self._timer.daemon = True
            self._timer.start()

    def _on_time(self) -> None:
        with suppress(OutputError):  # which the next `write` or `sync` raises
            self.sync()

    def sync(self) -> None:
        """Put everything on disk that has finished, each file synced once.

        Raises:
            OutputError: as `write`.
        """
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._failure is not None:
                raise self._failure
            lines, keys = dict(self._lines), list(self._keys)
            self._lines.clear()
            self._keys.clear()
            try:
                for path in (self.diagnostics_lines, self.errors_file, self.journal):  # the journal last: it counts
                    if path in lines:
                        self._append(path, b"".join(lines[path]))
            except OutputError as error:
                self._failure = error
                raise
            self.done.update(keys)

    def _append(self, path: Path, data: bytes) -> None:
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
        """Everything was tried: leave only this start's errors; make the Parquet files, of which that of the samples is
        in the order of the prompts."""
        self.sync()
        self._finish_diagnostics()
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

    def _finish_diagnostics(self) -> None:
        """Put the lines of the diagnostics into their Parquet file, and do without them."""
        table, lines = self.diagnostics_table, self.diagnostics_lines
        if table is None or not lines.exists():
            return
        with (
            explained(Path(f"{table}.tmp"), "all samples are safe in the journal"),
            replacing(table) as target,
            diagnostics_writer(target) as writer,
        ):
            if table.exists():
                copy_groups(table, writer)
            with lines.open("rb") as file:
                for group in groups(map(json.loads, file)):
                    writer.write_table(diagnostics_table(group))
        with explained(lines):
            if (file := self._files.pop(lines, None)) is not None:
                file.close()
            lines.unlink()


def groups(diagnostics: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The lines in lists that are as long as is written at once."""
    group, tokens = [], 0
    for line in diagnostics:
        group.append(line)
        tokens += len(line["tokens"]["id"])
        if len(group) == GROUP or tokens >= GROUP_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def copy_groups(source: Path | IO[bytes], writer: pq.ParquetWriter) -> None:
    """Append what a Parquet file of diagnostics has to another."""
    with pq.ParquetFile(source) as table:
        for number in range(table.num_row_groups):
            writer.write_table(table.read_row_group(number))


def keys_of_table(path: Path | IO[bytes]) -> list[Key]:
    """The samples of a Parquet file of diagnostics, in its order.

    Raises:
        OutputError: it is none.
    """
    try:
        table = pq.read_table(path, columns=["prompt_index", "sample_index"])
    except (ValueError, KeyError) as error:
        raise OutputError(f"{path} is not a Parquet file of diagnostics: {error}") from None
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


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
    for name in [*now, *(before.keys() - now.keys() - {FIRST_START, ANSWERS})]:
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


def key_of_line(line: bytes) -> Key:
    """The sample of a journal's line, as a rule from its beginning.

    Raises:
        FOREIGN: it is no sample's.
    """
    for head in HEADS:
        if found := head.match(line):
            return int(found[1]), int(found[2])
    return key_of(json.loads(line))


def complete_lines(path: Path) -> Iterator[tuple[Key, int]]:
    """The sample of each complete line and the offset of its end. A torn last line is left out, and so are the lines of
    a last group from one on that a loss of power has left with zeros in it.

    Raises:
        OutputError: a line before them is not what this program writes.
    """
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            rest = None  # lines after this one
            end += len(line)
            try:
                if not line.endswith(b"\n") or b"\0" in line:
                    rest = sum(1 for _ in islice(file, MOST))
                    raise ValueError("torn")
                yield key_of_line(line), end
            except FOREIGN:
                if rest is None:
                    rest = MOST if next(file, None) else 0
                if rest == MOST:
                    raise OutputError(
                        f"line {number} of {path} is not a sample's line; the file was changed, so choose another "
                        "--output"
                    ) from None
                return


def lines_backwards(path: Path) -> Iterator[tuple[bytes, int]]:
    """The complete lines of a file from the last to the first, each with the offset of its end."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1
        while end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            yield data[start:end], end
            end = start


def whole_diagnostics(path: Path, journal: Path, keys: list[Key]) -> tuple[int, int]:
    """How many of the journal's samples, which are `keys`, the diagnostics have, and where the last of them ends.

    As a rule that is all: then only the file's end is read.

    Raises:
        OutputError: they are of other samples.
    """
    seen = size = start = 0
    for line, end in islice(lines_backwards(path), 2 * MOST):
        if seen == len(keys):
            break
        try:
            key = None if b"\0" in line else key_of_line(line)
        except FOREIGN:
            key = None
        if key == keys[-1 - seen]:
            seen, size, start = seen + 1, size or end, end - len(line)
        elif seen:  # before it are those that the journal has not come to
            size = 0
            break
    if size and (start == 0) == (seen == len(keys)):
        return len(keys), size
    diagnostics = list(complete_lines(path))
    for number, (key, (other, _)) in enumerate(zip(keys, diagnostics, strict=False), 1):
        if key != other:
            raise OutputError(
                f"line {number} of {path} belongs to sample {other} and that of {journal} to {key}; the files were "
                "changed, so choose another --output"
            )
    whole = min(len(keys), len(diagnostics))
    return whole, diagnostics[whole - 1][1] if whole else 0


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
