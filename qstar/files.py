"""Which files a `--dataset` means: one, those of an archive, of a folder or of a pattern; packed or not."""

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import pyarrow

# What a file of rows may be called, and what may follow it where it is packed; `.zip` holds one or more of them.
TEXT_EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
TABLE_EXTENSIONS = (".parquet", ".arrow", ".feather")
STANDARD = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = (*STANDARD, ".zst", ".lz4")
ARCHIVE = ".zip"
ACCEPTED = (
    f"{', '.join(TEXT_EXTENSIONS)} (also with {', '.join(PACKED)} after it, or in a {ARCHIVE}), "
    f"{', '.join(TABLE_EXTENSIONS)}"
)


class DataError(ValueError):
    """A dataset that cannot be read as prompts; the message is one line for the user."""


@dataclass(frozen=True)
class File:
    """A file of rows on this machine, or one in an archive."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}::{self.member}"

    @property
    def extension(self) -> str:
        """That of the rows, without what says how they are packed; empty where it is unknown."""
        name = (self.member or self.path.name).lower()
        suffix = Path(name).suffix
        if suffix in PACKED:
            inner = Path(name.removesuffix(suffix)).suffix
            return inner if inner in TEXT_EXTENSIONS else ""
        return suffix if suffix in TEXT_EXTENSIONS + TABLE_EXTENSIONS else ""

    @property
    def size(self) -> int:
        """In bytes, as it lies there."""
        return self.path.stat().st_size

    @contextmanager
    def text(self) -> Iterator[TextIO]:
        """The unpacked text, line ends as they are and without a byte order mark.

        Bytes that are not UTF-8 become lone surrogates, which no UTF-8 has: `qstar.rows` refuses the rows they are in.
        """
        with (
            self._bytes() as file,
            io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
        ):
            yield text

    @contextmanager
    def _bytes(self) -> Iterator[BinaryIO]:
        if self.member is None:
            with _unpacked(self.path, self.path.name) as file:
                yield file
        else:
            with (
                zipfile.ZipFile(self.path) as archive,
                archive.open(self.member) as packed,
                _unpacked(packed, self.member) as file,
            ):
                yield file


def _unpacked(source: Path | BinaryIO, name: str) -> BinaryIO:
    """The bytes of a file, by what its name says of how it is packed; what is cut short raises an error at its end."""
    suffix = Path(name.lower()).suffix
    if suffix in STANDARD:
        return STANDARD[suffix](source)
    codec = {".zst": "zstd", ".lz4": "lz4"}.get(suffix)
    return pyarrow.input_stream(str(source) if isinstance(source, Path) else source, compression=codec)


def is_local(dataset: str) -> bool:
    """Whether that names something on this machine, and not a dataset of the hub."""
    path = Path(dataset).expanduser()
    named = File(path).extension or path.suffix.lower() in (*PACKED, ARCHIVE)
    return path.exists() or bool(named) or glob.has_magic(dataset) or dataset.startswith((".", "/", "~", "\\"))


def files_of(dataset: str) -> tuple[list[File], list[str]]:
    """The files of rows that a path, a folder or a pattern means, in the order of their names; and notes for the user.

    Raises:
        DataError: there are none.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        files = _members(path)
        return files, [f"{len(files)} files of the archive, by name"] if len(files) > 1 else []
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
        where = "the folder, with those below it"
    elif glob.has_magic(dataset):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        where = "the pattern"
        if not found:
            raise DataError(f"--dataset {dataset!r}: no file matches the pattern")
    else:
        raise DataError(f"--dataset {dataset!r}: no such file")
    taken = [p for p in found if File(p).extension or p.suffix.lower() == ARCHIVE]
    if not taken:
        raise DataError(f"--dataset {dataset!r} has no file of rows; accepted: {ACCEPTED}")
    others = len(found) - len(taken)
    note = f"{len(taken)} files of {where}, by name" + (f" ({others} of other kinds left out)" if others else "")
    return [file for p in taken for file in _members(p)], [note]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _members(path: Path) -> list[File]:
    """The file itself, or the files of rows in an archive."""
    if path.suffix.lower() != ARCHIVE:
        if not File(path).extension:
            raise DataError(f"--dataset {str(path)!r}: unknown extension; accepted: {ACCEPTED}")
        return [File(path)]
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"--dataset {str(path)!r} is not readable as an archive: {error}") from error
    files = [File(path, name) for name in names if not _is_hidden(Path(name)) and not name.startswith("__MACOSX")]
    files = [file for file in files if file.extension in TEXT_EXTENSIONS]
    if not files:
        raise DataError(f"--dataset {str(path)!r} has no file of rows; accepted: {', '.join(TEXT_EXTENSIONS)}")
    return files


def sha256(paths: list[Path]) -> str:
    """SHA-256 of the files' content in their order, in hexadecimal; that of one file is the file's own.

    Raises:
        DataError: one cannot be read.
    """
    digests = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise DataError(f"--dataset {str(path)!r} is not readable: {error}") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
