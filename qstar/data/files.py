"""Which files a `--dataset` means: one, those of an archive, of a folder or of a pattern; packed or not."""

import bz2
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import huggingface_hub
import pyarrow

# What a file of rows may be called, and what may follow it where it is packed; an archive holds one or more of them.
TEXT_EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
TABLE_EXTENSIONS = (".parquet", ".arrow", ".feather")
STANDARD = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # they read what stands before a cut
CODECS = {".zst": "zstd", ".lz4": "lz4"}  # pyarrow's
PACKED = (*STANDARD, *CODECS)
ARCHIVE = ".zip"
ACCEPTED = (
    f"{', '.join(TEXT_EXTENSIONS)} (also with {', '.join(PACKED)} after it, or in a {ARCHIVE}), "
    f"{', '.join(TABLE_EXTENSIONS)}"
)
SPLIT, CONFIG = "--dataset-split", "--dataset-config"


class DataError(ValueError):
    """A dataset that cannot be read as prompts; the message is one line for the user."""


@dataclass(frozen=True)
class File:
    """A file of rows on this machine, or one in an archive; `size` is in bytes, as it lies there."""

    path: Path
    size: int
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}::{self.member}"

    @property
    def name(self) -> str:
        return self.member or self.path.name

    @contextmanager
    def text(self) -> Iterator[TextIO]:
        """The unpacked text, line ends as they are and without a byte order mark.

        Bytes that are not UTF-8 become lone surrogates, which no UTF-8 has: `rows` refuses the rows they are in.
        """
        with (
            self._bytes() as file,
            io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
        ):
            yield text

    @contextmanager
    def _bytes(self) -> Iterator[BinaryIO]:
        if self.member is None:
            with _unpacked(self.path, self.name) as file:
                yield file
        else:
            with (
                zipfile.ZipFile(self.path) as archive,
                archive.open(self.member) as packed,
                _unpacked(packed, self.name) as file,
            ):
                yield file


@dataclass(frozen=True)
class Found:
    """The files of rows that a name means, in their order.

    `notes` are for the user; `chose` has those of the flags `SPLIT` and `CONFIG` that there was something to choose by.
    """

    files: list[File]
    notes: list[str]
    chose: frozenset[str] = frozenset()


def extension(name: str) -> str:
    """That of the rows, without what says how they are packed; empty where it is unknown."""
    name = name.lower()
    suffix = Path(name).suffix
    if suffix in PACKED:
        inner = Path(name.removesuffix(suffix)).suffix
        return inner if inner in TEXT_EXTENSIONS else ""
    return suffix if suffix in TEXT_EXTENSIONS + TABLE_EXTENSIONS else ""


def title_of(dataset: str) -> str:
    """The last part of its name that is no pattern, without extensions."""
    name = Path([part for part in Path(os.path.abspath(path_of(dataset))).parts if not glob.has_magic(part)][-1])
    suffixes = (*PACKED, ARCHIVE, *TEXT_EXTENSIONS, *TABLE_EXTENSIONS)
    while name.suffix.lower() in suffixes:
        name = name.with_suffix("")
    return name.name or dataset


def _unpacked(source: Path | BinaryIO, name: str) -> BinaryIO:
    """The bytes of a file, by what its name says of how it is packed; what is cut short raises an error at its end."""
    suffix = Path(name.lower()).suffix
    if suffix in STANDARD:
        return STANDARD[suffix](source)
    return pyarrow.input_stream(str(source) if isinstance(source, Path) else source, compression=CODECS.get(suffix))


def path_of(dataset: str) -> Path:
    return Path(os.path.expanduser(dataset))  # that of Path raises errors for users who do not exist


def is_saved(path: Path) -> bool:
    """Whether it is a folder that `save_to_disk` wrote."""
    marks = [os.path.isfile(path / name) for name in ("dataset_dict.json", "dataset_info.json", "state.json")]
    return marks[0] or all(marks[1:])


def samples_of(path: Path) -> Path:
    """Of a folder that `qstar.generate --engine ray` wrote, that of the samples, and any other folder itself."""
    try:
        of_run = {"complete", "format", "parts", "settings"} == json.loads((path / "manifest.json").read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        of_run = False
    return path / "samples" if of_run else path


def is_local(dataset: str) -> bool:
    """Whether that names something on this machine, and not a dataset of the hub.

    Raises:
        DataError: it names neither.
    """
    if not dataset or "://" in dataset:
        raise DataError(f"--dataset {dataset!r}; accepted: files and folders of this machine, names of hub datasets")
    path = path_of(dataset)
    is_named = bool(extension(path.name)) or path.suffix.lower() in (*PACKED, ARCHIVE)
    is_path = glob.has_magic(dataset) or dataset.startswith((".", "/", "~", "\\"))
    return is_named or is_path or os.path.exists(path)  # that of Path raises errors for names that no file could have


def files_of(dataset: str, split: str | None, config: str | None) -> Found:
    """The files of rows that a path, a folder or a pattern means, in the order of their names.

    Args:
        dataset: the path or pattern.
        split, config: which files of a folder, where its README.md or the files' names say that it has several.

    Raises:
        DataError: there are none, or one cannot be what it is said to be.
    """
    path = path_of(dataset)
    try:
        if path.is_file():
            return _of_file(path)
        if path.is_dir():
            return _of_folder(dataset, samples_of(_snapshot(path)), split, config)
        if path.exists() or not glob.has_magic(dataset):
            raise DataError(f"--dataset {dataset!r}: {'no file or folder' if path.exists() else 'no such file'}")
        found = list(_matches(path))
        if not found:
            raise DataError(f"--dataset {dataset!r}: no file matches the pattern")
        return Found(*_of_many(dataset, found, "the pattern"))
    except OSError as error:
        raise DataError(f"--dataset {dataset!r} is not readable: {error}") from error


def _of_file(path: Path) -> Found:
    if not _is_data(path):
        raise DataError(f"--dataset {str(path)!r}: unknown extension; accepted: {ACCEPTED}")
    files, others = _members(path)
    is_several = len(files) + others > 1
    return Found(files, [_said(len(files), "the archive", others)] if is_several else [])


def _of_folder(dataset: str, path: Path, split: str | None, config: str | None) -> Found:
    import datasets  # takes most of a second, which files do without
    from datasets.data_files import FILES_TO_IGNORE

    datasets.disable_progress_bars()
    chose, ignored = set(), []
    if _has_configurations(path):
        try:
            builder = datasets.load_dataset_builder(str(path), config)
            splits = {str(name): [Path(file) for file in files] for name, files in builder.config.data_files.items()}
        except Exception as error:  # whatever may be wrong with what the README.md says
            raise DataError(f"{CONFIG} {config!r}: the README.md of {dataset!r}: {one_line(error)}") from error
        where = f"of configuration {builder.config.name!r} in the README.md of the folder"
        chose.add(CONFIG)
    else:
        found = [folder / name for folder, names in _walk(path) for name in names]
        ignored = FILES_TO_IGNORE
        splits = _splits(path, [file for file in found if _is_data(file) and file.name not in ignored])
        where = f"of the folder, whose files are called {' and '.join(splits)}"
    if splits:
        chosen = choose_split(dataset, list(splits), split)
        found, where = splits[chosen], f"split {chosen!r} {where}"
        chose.add(SPLIT)
    else:
        where = "the folder, with those below it"
    return Found(*_of_many(dataset, found, where, ignored), frozenset(chose))


def _walk(folder: Path, hidden: tuple[str, ...] = (".", "_")) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it, through links, too, each once, and the names of their files.

    What begins with one of `hidden` is not looked at.
    """

    def fail(error: OSError) -> None:
        raise error

    seen = set()  # a link may lead back
    for where, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith(hidden))
        if real not in seen:
            yield Path(where), [name for name in names if not name.startswith(hidden)]
        seen.add(real)


def _matches(pattern: Path) -> Iterator[Path]:
    """What matches, from each folder once, however many links lead to it.

    `**` is not left to `glob`, which goes round and round where links lead back.
    """
    if "**" in pattern.parts:
        at = pattern.parts.index("**")
        tail = pattern.parts[at + 1 :] or ("*",)
        above = _matches(Path(*pattern.parts[:at])) if at else [Path()]
        folders = (folder for path in above if path.is_dir() for folder, _ in _walk(path, hidden=(".",)))
        found = (path for folder in folders for path in _matches(Path(glob.escape(str(folder)), *tail)))
    else:
        found = map(Path, sorted(glob.glob(str(pattern))))
    seen = set()
    for path in found:
        place = os.path.realpath(path.parent), path.name
        if place not in seen:
            yield path
        seen.add(place)


def _snapshot(path: Path) -> Path:
    """Of a dataset's folder in the hub's cache the files that it has of `main`, and any other folder itself."""
    main = path / "refs" / "main"
    return path / "snapshots" / main.read_text().strip() if main.is_file() and (path / "snapshots").is_dir() else path


def _has_configurations(path: Path) -> bool:
    """Whether a README.md says, as those of the hub may, which files are which configuration and split."""
    readme = path / "README.md"
    try:
        configs = readme.is_file() and huggingface_hub.DatasetCard.load(readme).data.to_dict().get("configs")
        return bool(configs) and any({"data_files", "data_dir"} & set(config) for config in configs)
    except Exception:  # a README.md may be anything
        return False


def _splits(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split, where the names of all tell one as `datasets` reads names, and not all the same."""
    from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, get_data_patterns

    # The patterns go through the folder fifty times, which many files take seconds for.
    marks = re.compile("|".join(["-of-", *itertools.chain(*SPLIT_KEYWORDS.values())]))
    if not any(marks.search(str(file.relative_to(path))) for file in files):
        return {}
    base = glob.escape(os.path.abspath(path))
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except FileNotFoundError:  # it leaves files out that count here
        return {}
    absolute = {os.path.abspath(file): file for file in files}
    splits = {str(split): [absolute[name] for name in names if name in absolute] for split, names in found.items()}
    splits = {split: names for split, names in splits.items() if names}
    return splits if len(splits) > 1 and len({f for names in splits.values() for f in names}) == len(files) else {}


def choose_split(name: str, splits: Sequence[str], split: str | None) -> str:
    """The split asked for; left out, it is `train` or the only one there is.

    Raises:
        DataError: there is none of that name, or no telling which one.
    """
    if not splits:
        raise DataError(f"--dataset {name!r} has no splits")
    chosen = split or ("train" if "train" in splits else splits[0])
    if chosen not in splits or (split is None and chosen != "train" and len(splits) > 1):
        raise DataError(f"{SPLIT} {split!r}: {name!r} has the splits {', '.join(map(repr, splits))}; choose one")
    return chosen


def _is_data(path: Path) -> bool:
    """Whether its name is that of a file with rows, or of an archive."""
    return bool(extension(path.name)) or path.suffix.lower() == ARCHIVE


def _of_many(
    dataset: str, paths: Iterable[Path], where: str, ignored: Sequence[str] = ()
) -> tuple[list[File], list[str]]:
    """The files of rows among those, in the order of their names, and what to say of them."""
    files, others = [], 0
    for path in sorted(set(paths)):
        if path.name in ("state.json", "dataset_dict.json") and is_saved(path.parent):
            raise DataError(f"--dataset {dataset!r}: `save_to_disk` wrote {str(path.parent)!r}; name that by itself")
        if not _is_data(path) or path.name in ignored or path.is_dir():
            others += 1
        elif not path.exists():
            raise DataError(f"--dataset {dataset!r}: {str(path)!r} does not exist, or is a link to nothing")
        else:
            members, left_out = _members(path)
            files += members
            others += left_out
    if not files:
        raise DataError(f"--dataset {dataset!r} has no file of rows; accepted: {ACCEPTED}")
    return files, [_said(len(files), where, others)]


def _said(count: int, where: str, others: int) -> str:
    left_out = f" ({others} of other kinds left out)" if others else ""
    return f"{count} file{'s' if count > 1 else ''} of {where}, by name{left_out}"


def _members(path: Path) -> tuple[list[File], int]:
    """The file itself, or the files of rows in an archive and how many others there are in it."""
    if path.suffix.lower() != ARCHIVE:
        return [File(path, path.stat().st_size)], 0
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted((info.filename, info.file_size) for info in archive.infolist() if not info.is_dir())
    except Exception as error:  # what zipfile raises has no class of its own
        raise DataError(f"--dataset {str(path)!r} is not readable as an archive: {one_line(error)}") from error
    shown = [member for member in members if not any(part.startswith((".", "_")) for part in Path(member[0]).parts)]
    files = [File(path, size, name) for name, size in shown if extension(name) in TEXT_EXTENSIONS]
    if not files:
        raise DataError(f"--dataset {str(path)!r} has no file of rows; accepted: {', '.join(TEXT_EXTENSIONS)}")
    twice = next((str(one) for one, other in itertools.pairwise(files) if one.member == other.member), None)
    if twice is not None:  # one may have been meant to take the other's place
        raise DataError(f"--dataset {twice!r}: the archive has two files of that name")
    return files, len(shown) - len(files)


def sha256(paths: list[Path]) -> str:
    """SHA-256 of the files' content in their order, in hexadecimal; that of one file is the file's own.

    Of several, their extensions count, too, by which they are read.

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
    if len(paths) > 1:
        digests = [f"{digest} {path.suffix.lower()}" for digest, path in zip(digests, paths, strict=True)]
    return joined(digests)


def joined(digests: list[str]) -> str:
    """One digest in place of several, in their order; one alone stays as it is."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def one_line(error: Exception) -> str:
    """The error's class and message, short enough for one line."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return message if len(message) <= 300 else message[:299] + "…"
