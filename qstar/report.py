"""`python -m qstar.report`: one HTML file to look at samples with (`qstar.diagnostics.page`)."""

import importlib.util
import sys
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from qstar.diagnostics.page import MAX_SAMPLES, ReportError, make_report
from qstar.run.options import COUNT, Parser, failed
from qstar.run.records import RecordError


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
        "--max-samples", type=COUNT, default=MAX_SAMPLES, help="samples to show; of more a random part, in all files"
    )
    parser.add_argument("--tokenizer", help="name or folder (default: that of π_θ in x.run.json)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if the report is written, 1 if not, 2 for a wrong command line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib: pip install 'qstar[report]'")
    if args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; give a file")
    logging.disable_progress_bar()
    try:
        print(
            make_report(args.files, args.output, args.tokenizer, Console(stderr=True, soft_wrap=True), args.max_samples)
        )
    except (RecordError, ReportError) as error:
        return failed(parser.prog, error)
    except OSError as error:
        return failed(parser.prog, f"{error.filename or args.output}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
