"""`python -m qstar.analyze`: what the numbers of a data set say, before anyone trains on it.

Everything is read from what `qstar.generate` or `qstar.score` wrote, in whichever format.
"""

import json
import sys
from pathlib import Path

from qstar.run.command import Parser, guarded


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "analyze",
        description="What the numbers of generated or scored samples say: statistics, verdicts and warnings.",
    )
    what = "x.jsonl or another output that was written with its diagnostics, or the folder of its parts"
    parser.add_argument("files", nargs="+", metavar="FILE", help=what)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the plots there, as PNG")
    return parser


def run(argv: list[str] | None) -> int:
    args = make_parser().parse_args(argv)
    # these take seconds, as they import torch
    from rich.console import Console

    from qstar.diagnostics.statistics import analysis, plotted, read_all
    from qstar.diagnostics.tables import show
    from qstar.run.records import RunFiles, names_of

    runs = [RunFiles(path) for path in args.files]
    numbers = read_all(runs, names_of(runs), Console(stderr=True, quiet=args.quiet))
    results = [analysis(n) for n in numbers]
    if args.plots is not None:
        from qstar.diagnostics.plots import all_plots, png  # matplotlib is an extra

        args.plots.mkdir(parents=True, exist_ok=True)
        for name, _, draw in all_plots(plotted(numbers)):
            (args.plots / f"{name}.png").write_bytes(png(draw(False), transparent=False))
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        show(results, Console(soft_wrap=True))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Print the analysis; 0, 1 with one line on stderr if a file cannot be read, 2 for a wrong command line, 130 if it
    was interrupted."""
    return guarded("qstar analyze", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
