"""A run's output in parts: a folder, here or on an object store, in which every part is whole or not there.

A part is a block of consecutive samples (`qstar.run.run`), in `samples/part-000012.jsonl` (or `.parquet`), with its
`diagnostics/` and `errors/` under the same name; the samples are put there last, so a part that has them is complete,
but for the prompts in its `errors/`.
`manifest.json` holds the settings of the run and what is complete; while a part is in the works, `attempts/` knows how
often it was begun. Any file system that fsspec has will do.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from qstar.run.formats import DIAGNOSTICS, FOREIGN, SCHEMAS, Key
from qstar.run.options import FORMATS
from qstar.run.output import (
    FIRST_START,
    OutputError,
    check_settings,
    explained,
    key_of_line,
    keys_of_table,
    locked,
    replacing,
)

# Of a part's samples: the types of verl's columns are those of all rows together, and what a row had before it got
# them cannot be told any more. So its parts are lines, out of which `qstar.merge` makes the Parquet file.
SUFFIXES = FORMATS | {"verl": ".jsonl"}
KINDS = ("diagnostics", "errors", "samples")  # in the order in which a part's files are put there


def mended(samples: object) -> str:
    """What to do about a part that is damaged, by the place of its samples."""
    return f"remove {samples} and start its run again to mend it"


class Parts:
    """The folder of a run; a context manager that checks it, and holds its lock where it is a local one.

    Args:
        url: the folder, a path or an URL that fsspec knows (`s3://…`, `gs://…`).
        output_format: one of `qstar.run.options.FORMATS`.
        save_diagnostics: parts have their diagnostics too.
        settings: everything that a resumed run must have in common with the first start.
        diagnostics_format: one of `qstar.run.options.DIAGNOSTICS_FORMATS`.

    Attributes:
        done: numbers of the parts that are complete.
        moment: of the first start, as `qstar.run.output.Output` has it.

    Raises:
        OutputError: it cannot be written to, another process writes it, or it was started with other settings.
    """

    def __init__(
        self,
        url: str,
        output_format: str,
        save_diagnostics: bool,
        settings: dict[str, Any],
        diagnostics_format: str = "jsonl",
    ):
        self.url, self.format, self.save_diagnostics, self.settings = url, output_format, save_diagnostics, settings
        self.diagnostics_format = diagnostics_format
        self.done: set[int] = set()
        self.moment: datetime | None = None
        self._stack = ExitStack()

    @property
    def place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system and the folder on it; fsspec keeps one of each kind."""
        return fsspec.core.url_to_fs(self.url)

    @property
    def is_local(self) -> bool:
        return isinstance(self.place[0], LocalFileSystem)

    def __enter__(self) -> "Parts":
        with self._explained(self.url), self._stack:
            if self.is_local:
                self._stack.callback(locked(Path(self.place[1]) / "lock", self.url).release)
            before = self.before()
            if before is None and self.numbers("samples"):
                raise OutputError(f"{self.url} has parts and no manifest.json; choose another --output")
            self.moment = datetime.now() if before is None else check_settings(self.url, before, self.settings)
            # what failed is tried again at every start, and counts no earlier deaths
            self.done = self.numbers("samples") - self.numbers("errors")
            fs, root = self.place
            if fs.exists(f"{root}/attempts"):
                fs.rm(f"{root}/attempts", recursive=True)
            self.write_manifest(complete=False)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @contextmanager
    def _explained(self, path: str, then: str = "") -> Iterator[None]:
        """`explained`, also for what the libraries of object stores raise."""
        try:
            with explained(path, then):
                yield
        except OutputError:
            raise
        except Exception as error:
            if self.is_local:
                raise
            raise OutputError(f"cannot write {path}: {error}{'; ' if then else ''}{then}") from error

    def suffix(self, kind: str) -> str:
        """That of the files of a kind."""
        if kind == "diagnostics":
            return f".{self.diagnostics_format}"
        return SUFFIXES[self.format] if kind == "samples" else ".jsonl"

    def path(self, kind: str, part: int) -> str:
        """Where a part's file of that kind is on its file system."""
        return f"{self.place[1]}/{kind}/part-{part:06d}{self.suffix(kind)}"

    def numbers(self, kind: str) -> set[int]:
        """The parts that have a file of that kind."""
        fs, root = self.place
        fs.invalidate_cache()
        names = [Path(p).name for p in fs.ls(f"{root}/{kind}", detail=False)] if fs.exists(f"{root}/{kind}") else []
        # another suffix is that of a part in the making, or as an earlier version wrote it
        part = re.compile(rf"part-(\d{{6,}}){re.escape(self.suffix(kind))}")
        return {int(found[1]) for found in map(part.fullmatch, names) if found}

    def keys(self, kind: str, part: int) -> list[Key]:
        """The samples of a part's file.

        Raises:
            OutputError: it is not there, or not whole.
        """
        path = self.path(kind, part)
        try:
            with self.place[0].open(path, "rb") as file:
                if path.endswith(".parquet"):
                    return keys_of_table(file)
                return [key_of_line(line) for line in file if line.index(b"\n")]
        except (OutputError, OSError, *FOREIGN):
            raise OutputError(f"{path} is not there, or not whole; {mended(self.path('samples', part))}") from None

    def is_complete(self, manifest: dict[str, Any]) -> bool:
        """Whether the run came to its end, and all of its parts are there."""
        there = self.numbers("samples")
        return manifest["complete"] and there >= set(range(max({*there, *manifest["parts"]}, default=-1) + 1))

    def manifest(self) -> dict[str, Any] | None:
        """What `manifest.json` says; None if there is none.

        Raises:
            OutputError: it is not what this program writes.
        """
        fs, root = self.place
        try:
            found = json.loads(fs.cat_file(f"{root}/manifest.json"))
            found["settings"].keys(), found["complete"], FORMATS[found["format"]], max(found["parts"], default=0) + 0
        except (FileNotFoundError, NotADirectoryError):
            return None
        except FOREIGN:
            raise OutputError(
                f"{self.url}/manifest.json is not a manifest; restore it, or name another folder"
            ) from None
        return found

    def adopt(self, manifest: dict[str, Any]) -> None:
        """Take the formats of files over from a manifest."""
        self.format = manifest["format"]
        self.diagnostics_format = manifest["settings"].get("--diagnostics-format") or "jsonl"

    def before(self) -> dict[str, Any] | None:
        """The settings of the first start; None where there is nothing to resume.

        Raises:
            OutputError: they are lost, or cannot be read.
        """
        with self._explained(self.url):
            manifest = self.manifest()
        return manifest and manifest["settings"]

    def write_manifest(self, complete: bool) -> None:
        """Say what is complete, and whether that is all."""
        settings = self.settings | ({FIRST_START: self.moment.isoformat()} if self.moment else {})
        manifest = {"complete": complete, "format": self.format, "parts": sorted(self.done), "settings": settings}
        self.put(f"{self.place[1]}/manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())

    def put(self, path: str, data: bytes) -> None:
        """Write a whole file, or nothing of it."""
        fs = self.place[0]
        with self._explained(path, "the parts that are complete are safe; start the same command again to go on"):
            if self.is_local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                # a worker may still be writing the part that another one makes again
                with replacing(Path(path), Path(f"{path}.{uuid4().hex}.tmp")) as file:
                    file.write(data)
            else:
                fs.pipe_file(path, data)

    def put_part(self, part: int, folder: Path) -> None:
        """Take over a part that was written as `x` in a local folder."""
        fs = self.place[0]
        local = {kind: f"x{'' if kind == 'samples' else f'.{kind}'}{self.suffix(kind)}" for kind in KINDS}
        for kind in KINDS:
            path, source = self.path(kind, part), folder / local[kind]
            if source.exists():
                self.put(path, source.read_bytes())
            elif kind == "samples" or (kind == "diagnostics" and self.save_diagnostics):
                self.put(path, self._nothing(kind))  # all its prompts failed
        # of an earlier start; until now they said that the part is not complete
        if not (folder / local["errors"]).exists() and fs.exists(self.path("errors", part)):
            fs.rm(self.path("errors", part))

    def add(self, part: int) -> None:
        """Count a part that a worker has made.

        Raises:
            OutputError: it is not in this machine's folder.
        """
        path = self.path("samples", part)
        if self.is_local and not Path(path).exists():
            raise OutputError(
                f"a worker has written {path}, and it is not there: the nodes do not share that folder; "
                "give one that they share, or an object store (s3://…)"
            )
        self.done.add(part)

    def _nothing(self, kind: str) -> bytes:
        if self.suffix(kind) == ".jsonl":
            return b""
        sink = pa.BufferOutputStream()
        schema = DIAGNOSTICS if kind == "diagnostics" else SCHEMAS[self.format]
        pq.write_table(schema.empty_table(), sink)
        return sink.getvalue().to_pybytes()

    def attempts(self, part: int) -> dict[str, Any]:
        """How often a part was begun (`starts`), and each of its prompts where they were tried alone (`alone`)."""
        fs, root = self.place
        try:
            return json.loads(fs.cat_file(f"{root}/attempts/{part:06d}.json"))
        except (FileNotFoundError, ValueError):
            return {"starts": 0, "alone": {}}

    def write_attempts(self, part: int, attempts: dict[str, Any] | None) -> None:
        """Remember them; None forgets them."""
        fs, root = self.place
        path = f"{root}/attempts/{part:06d}.json"
        if attempts is not None:
            self.put(path, json.dumps(attempts).encode())
        elif fs.exists(path):
            fs.rm(path)
