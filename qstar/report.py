"""`python -m qstar.report`: one HTML file to look at samples with (`qstar.diagnostics.page`)."""

import importlib.util
import sys
from pathlib import Path

from qstar.run.command import Parser, guarded
from qstar.run.options import COUNT


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "report",
        description="One HTML file to look at samples with: summary, plots, and every token shaded by its numbers.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="what qstar.generate wrote, with diagnostics, or the folder of its parts",
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the file to write")
    parser.add_argument(
        "--max-samples",
        type=COUNT,
        default=10_000,  # more take long to open
        help="samples to show; of more a random part, in all files",
    )
    parser.add_argument("--tokenizer", help="name or folder (default: that of π_θ in x.run.json)")
    return parser


def run(argv: list[str] | None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib: pip install 'qstar[report]'")
    if args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; give a file")
    if args.output.suffix not in ("", ".html", ".htm"):
        parser.error(f"--output {args.output}: what is written is HTML, in a .html file")
    from rich.console import Console
    from transformers.utils import logging

    from qstar.diagnostics.page import ReportError, make_report  # takes seconds, as it imports torch

    logging.disable_progress_bar()
    console = Console(stderr=True, soft_wrap=True, quiet=args.quiet)
    try:
        print(make_report(args.files, args.output, args.tokenizer, console, args.max_samples))
    except OSError as error:
        raise ReportError(f"{error.filename or args.output}: {error.strerror or error}") from error
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if the report is written, 1 if not, 2 for a wrong command line, 130 if it was interrupted."""
    return guarded("qstar report", lambda: run(argv), interrupted="; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
