"""`python -m qstar.merge`: one file of the parts that `--engine ray` wrote, the one a single process writes."""

import sys
from pathlib import Path

from qstar.run.command import Parser, guarded


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("merge", description="One file of the parts that qstar generate --engine ray wrote.")
    parser.add_argument("folder", metavar="FOLDER", help="the run's --output, a path or an URL")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    return parser


def run(argv: list[str] | None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; give a file")
    from qstar.run.merging import merge  # takes seconds, as it imports torch

    count, written = merge(args.folder, args.output)
    if not args.quiet:
        print(f"{count} parts: {', '.join(map(str, written))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, 1 with one line on stderr if it failed, 2 for a wrong command line, 130 if it was
    interrupted."""
    return guarded("qstar merge", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
