"""The parts of a run as the files that a single process writes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow.parquet as pq

from qstar.run.formats import SCHEMAS, diagnostics_writer
from qstar.run.options import FORMATS, check_suffix
from qstar.run.output import OutputError, copy_groups, explained, replacing, write_atomically, write_parquet
from qstar.run.parts import KINDS, Parts, mended


def merge(url: str, output: Path) -> tuple[int, list[Path]]:
    """Join the parts of a folder in order, with their diagnostics and errors.

    Returns:
        how many parts there were, and the files that were written.

    Raises:
        OutputError: the folder is none, is not complete, would get the output among its parts, or has a part that is
            not whole or not of this run; or the files cannot be written.
        ValueError: the output is called as if it were of another format than the parts.
    """
    parts = Parts(url, "jsonl", False, {})
    manifest = parts.manifest()
    if manifest is None:
        raise OutputError(f"{url} has no manifest.json; give the folder that qstar.generate --engine ray wrote")
    parts.adopt(manifest)
    numbers = parts.numbers("samples")
    if not parts.is_complete(manifest):
        raise OutputError(f"{url} is not complete: {len(numbers)} parts are there; start its run again to finish it")
    kinds, last = ["diagnostics", "samples"] if parts.numbers("diagnostics") else ["samples"], (-1, 0)
    for number in sorted(numbers):
        keys, *others = (parts.keys(kind, number) for kind in kinds)
        if [last, *keys] != sorted({last, *keys}) or others not in ([], [keys]):
            raise OutputError(
                f"{parts.path('samples', number)} does not belong to its diagnostics, or to the other parts; "
                f"{mended(parts.path('samples', number))}"
            )
        last = (last, *keys)[-1]
    check_suffix(output, parts.format)
    if parts.is_local and output.resolve().parent in {Path(parts.path(kind, 0)).resolve().parent for kind in KINDS}:
        raise OutputError(f"{output} is among the parts, which it could take the place of; give another --output")
    suffix = FORMATS[parts.format]
    stem = output.with_suffix("") if output.suffix == suffix else output
    paths = {kind: Path(f"{stem}.{kind}{parts.suffix(kind)}") for kind in ("diagnostics", "errors")}
    paths["samples"] = output
    written = []
    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        for kind, path in paths.items():
            found = [parts.path(kind, number) for number in sorted(parts.numbers(kind))]
            if not found:
                path.unlink(missing_ok=True)  # of an earlier merge
                continue
            with replacing(path) as target:
                join(parts, kind, found, target)
            written.append(path)
        settings = {k: v for k, v in manifest["settings"].items() if k != "--batch-size"} | {"output file": output.name}
        write_atomically(Path(f"{stem}.run.json"), json.dumps(settings, indent=1, ensure_ascii=False).encode())
    return len(numbers), written


def join(parts: Parts, kind: str, paths: list[str], target: IO[bytes]) -> None:
    """Write the parts' files of a kind as one."""

    def opened() -> Iterator[IO[bytes]]:
        for path in paths:
            with parts.place[0].open(path, "rb") as file:
                yield file

    if kind == "samples" and parts.suffix(kind) != FORMATS[parts.format]:
        write_parquet(target, parts.format, lambda: (json.loads(line) for file in opened() for line in file))
    elif parts.suffix(kind) == ".jsonl":
        for file in opened():
            shutil.copyfileobj(file, target)
    elif kind == "diagnostics":
        with diagnostics_writer(target) as writer:
            for file in opened():
                copy_groups(file, writer)
    else:
        with pq.ParquetWriter(target, SCHEMAS[parts.format]) as writer:
            for file in opened():
                writer.write_table(pq.read_table(file))
