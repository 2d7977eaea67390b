"""What tells one checkpoint from another: the fingerprint that a resumed run compares with its first start's.

A checkpoint in a folder is fingerprinted by its content alone, so that a copy is the same checkpoint. Everything small
(configuration, tokenizer, chat template, code) counts to the last byte, and so do weights of up to `WHOLE` bytes. Of
larger ones, which take minutes to read, the names, shapes, types and places of all tensors count and, of every tensor,
`BLOCK` bytes at its start, at its end and at even distances between them. An archive of torch also has, by default, a
CRC-32 of every tensor, over all of its bytes; a file that is neither that nor safetensors is read to the end.

So every change of weights of up to `WHOLE` bytes is seen, and in larger ones every change that is spread over a tensor
(training, a merged adapter, a quantisation, noise) or that fills as much of it as lies between two blocks: at most a
1/`BLOCKS` part of the whole checkpoint. What is not seen is an edit of less that falls between the blocks of a
safetensors file beyond `WHOLE`, such as of one row of an embedding: `written_since` tells that there may be one.
"""

import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from transformers.utils.hub import cached_file, extract_commit_hash

from qstar.adapter_names import config_of_hub

WEIGHTS = (".safetensors", ".bin")
OTHERS = (".json", ".jinja", ".py", ".txt", ".model", ".tiktoken")
WHOLE = 1 << 31
BLOCK, BLOCKS = 1 << 14, 1 << 15
FEWEST = 4  # blocks of a tensor
READERS, SPAN, BATCH = 16, 1 << 24, 256  # threads, and the bytes or the blocks that one of them reads at a time

Piece = tuple[int, int]  # start and length in bytes


def fingerprint(name: str, is_adapter: bool = False) -> str:
    """`sha256:…` of a folder's content, as the module says; for a name on the hub `commit:…`, its newest commit.

    Where the hub cannot be asked that is the commit in the cache; what was changed in the cache itself is not seen.
    Code that a folder takes from a repository of the hub counts by that one's commit.

    Raises:
        ValueError: the name is that of an adapter, which says nothing of the base that it is loaded with, and it is not
            said that it is one.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _commit(name, is_adapter)
    files = sorted(p for p in folder.iterdir() if p.suffix in (*WEIGHTS, *OTHERS) and p.is_file())
    files = [p for p in files if not p.name.endswith(".run.json")]  # of a run that writes into the folder
    files += sorted(folder.glob("additional_chat_templates/*.jinja"))
    weights = sum(p.stat().st_size for p in files if p.suffix in WEIGHTS)
    digest, reads = hashlib.sha256(), []
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        layout = _layout(path, size) if path.suffix in WEIGHTS and weights > WHOLE else None
        if layout is None:
            reads += [(path, [(start, SPAN)]) for start in range(0, size, SPAN)]
        else:
            pieces = _blocks(*layout, weights)
            reads += [(path, pieces[i : i + BATCH]) for i in range(0, len(pieces), BATCH)]
    with ThreadPoolExecutor(READERS) as pool:
        for part in pool.map(_digest, reads):
            digest.update(part)
    for repository in sorted(_code_from_elsewhere(folder)):
        digest.update(fingerprint(repository).encode())
    return f"sha256:{digest.hexdigest()}"


def written_since(name: str, moment: datetime) -> bool:
    """Whether weights that are too large to be read to the end were written after a moment, be it as a mere copy."""
    stats = [p.stat() for p in Path(name).expanduser().glob("*") if p.suffix in WEIGHTS]
    return sum(s.st_size for s in stats) > WHOLE and max(s.st_mtime for s in stats) > moment.timestamp()


def revision(of_hub: str) -> str | None:
    """The commit that a fingerprint names; None for a folder's, and where it is not known."""
    return of_hub.removeprefix("commit:") if of_hub.startswith("commit:") else None


def _code_from_elsewhere(folder: Path) -> set[str]:
    """The repositories of which a checkpoint's `auto_map` takes code, as in `owner/name--modeling.Model`."""
    found = set()
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        with suppress(OSError, ValueError, AttributeError):  # said where the model is loaded
            for named in json.loads(path.read_bytes()).get("auto_map", {}).values():
                for code in named if isinstance(named, list) else [named]:
                    if code and "--" in code:
                        found.add(code.partition("--")[0])
    return found


def _commit(name: str, is_adapter: bool) -> str:
    adapter = config_of_hub(name)
    if adapter is not None and not is_adapter:
        raise ValueError(f"{name} is an adapter; merge it into its base, and give the merged model")
    try:
        commit = extract_commit_hash(adapter if is_adapter else cached_file(name, "config.json"), None)
    except (OSError, ValueError):  # said again, and better, where the model is loaded
        commit = None
    return f"commit:{commit}" if commit else f"an unknown commit of {name}"


def _blocks(described: Piece, tensors: list[int], total: int) -> list[Piece]:
    """What is read of a file of weights by its `_layout`, of `total` bytes with the others of its checkpoint."""
    pieces = [described]
    for start, end in pairwise(tensors):
        count = max(FEWEST, (end - start) * BLOCKS // total + 2)
        if end - start <= count * BLOCK:
            pieces.append((start, end - start))
        else:
            pieces += [(start + i * (end - start - BLOCK) // (count - 1), BLOCK) for i in range(count)]
    return pieces


def _layout(path: Path, size: int) -> tuple[Piece, list[int]] | None:
    """The part of a file that describes its tensors, and the bounds of all tensors; None where that is not known."""
    try:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                first = 8 + int.from_bytes(file.read(8), "little")
                if first > size:
                    raise ValueError("torn")
                header = json.loads(file.read(first - 8))
            header.pop("__metadata__", None)
            return (0, first), [*sorted({first + tensor["data_offsets"][0] for tensor in header.values()}), size]
        with zipfile.ZipFile(path) as archive:
            directory = archive.start_dir
            return (directory, size - directory), [*sorted(m.header_offset for m in archive.infolist()), directory]
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile):  # of an old torch, or torn
        return None


def _digest(read: tuple[Path, list[Piece]]) -> bytes:
    path, pieces = read
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for start, length in pieces:
            file.seek(start)
            digest.update(file.read(length))
    return digest.digest()
