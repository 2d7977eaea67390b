"""`python -m qstar.merge`: one file of the parts that `--engine ray` wrote, the one a single process writes."""

import argparse
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qstar.arguments import Parser, failed
from qstar.formats import NOTHING, SCHEMAS, table_of, wider
from qstar.output import FORMATS, OutputError, explained, replacing, write_atomically
from qstar.parts import Parts


def merge(url: str, output: Path) -> tuple[int, list[Path]]:
    """Join the parts of a folder in order, with their diagnostics and errors.

    Returns:
        how many parts there were, and the files that were written.

    Raises:
        OutputError: the folder is none, is not complete, or the files cannot be written.
    """
    parts = Parts(url, "jsonl", False, {})
    manifest = parts.manifest()
    if manifest is None:
        raise OutputError(f"{url} has no manifest.json; give the folder that qstar.generate --engine ray wrote")
    parts.format = manifest["format"]
    numbers = parts.numbers("samples")
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
    if not manifest["complete"] or missing:
        raise OutputError(f"{url} is not complete: {len(numbers)} parts are there; start its run again to finish it")
    suffix = FORMATS[parts.format]
    stem = output.with_suffix("") if output.suffix == suffix else output
    paths = {kind: Path(f"{stem}.{kind}.jsonl") for kind in ("diagnostics", "errors")} | {"samples": output}
    written = []
    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        for kind, path in paths.items():
            found = sorted(parts.numbers(kind))
            if not found:
                path.unlink(missing_ok=True)  # of an earlier merge
                continue
            fs = parts.place[0]
            parquet = kind == "samples" and suffix == ".parquet"
            schema = common_schema(parts, found) if parquet else None
            with (
                replacing(path) as target,
                pq.ParquetWriter(target, schema) if parquet else nullcontext() as writer,
            ):
                for number in found:
                    with fs.open(parts.path(kind, number), "rb") as file:
                        if parquet:
                            table = pq.read_table(file)
                            writer.write_table(table if table.schema == schema else table_of(table.to_pylist(), schema))
                        else:
                            shutil.copyfileobj(file, target)
            written.append(path)
        settings = {k: v for k, v in manifest["settings"].items() if k != "--batch-size"} | {"output file": output.name}
        write_atomically(Path(f"{stem}.run.json"), json.dumps(settings, indent=1, ensure_ascii=False).encode())
    return len(numbers), written


def common_schema(parts: Parts, numbers: list[int]) -> pa.Schema:
    """The schema that holds the samples of all these parts: each part has the one of its own rows."""
    types: dict[str, pa.DataType] = {}
    for number in numbers:
        with parts.place[0].open(parts.path("samples", number), "rb") as file:
            found = pq.ParquetFile(file)
            if found.metadata.num_rows:
                of_part = {field.name: field.type for field in found.schema_arrow}
                types = {name: wider(types.get(name, NOTHING), kind) for name, kind in of_part.items()}
    return pa.schema(types) if types else SCHEMAS[parts.format]


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m qstar.merge",
        description="One file of the parts that qstar.generate --engine ray wrote.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="the run's --output, a path or an URL")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; give a file")
    try:
        count, written = merge(args.folder, args.output)
    except (OutputError, OSError, ValueError, ImportError) as error:
        return failed(parser.prog, error)
    print(f"{count} parts: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
