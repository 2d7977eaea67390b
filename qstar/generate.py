"""`python -m qstar.generate`: prompts in, samples from q* on disk."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qstar.backends import BACKENDS, check_backend
from qstar.run import options
from qstar.run.command import Parser, guarded, json_object, number

if TYPE_CHECKING:
    from qstar.run.job import Job


def make_parser() -> Parser:
    """The command line, in groups."""
    parser = Parser(
        "generate",
        usage="%(prog)s [options]",
        description="Sample from q* ∝ π_θ^α · π_t^(1−α) between two language models. Without arguments: the demo pair "
        f"on its bundled prompts. Every option is explained in {options.GUIDE}",
    )
    options.add_models(parser)
    group = options.add_data(parser)
    group.add_argument("--samples-per-prompt", type=options.COUNT, default=1, help="samples of each prompt")
    options.add_prompts(parser)
    options.add_rule(parser)

    group = parser.add_argument_group("decoding")
    group.add_argument("--seed", type=int, default=0, help="seed of the run; each sample's own follows from it")
    group.add_argument("--max-new-tokens", type=options.COUNT, default=256, help="token limit of a sample")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="text, or a special token, that ends a sample; may be repeated",
    )
    group.add_argument(
        "--stop-token-ids",
        type=number(int, 0, "a token's id"),
        nargs="+",
        metavar="ID",
        help="tokens that end a sample",
    )
    group.add_argument(
        "--keep-special-tokens",
        action="store_true",
        default=None,
        help="leave special tokens in the text, but for the one that ends it",
    )
    group.add_argument(
        "--backend",
        default="transformers",
        choices=list(BACKENDS),
        help=f"what runs the models: {', '.join(f'{name} ({backend.about})' for name, backend in BACKENDS.items())}",
    )
    sizes = ", ".join(f"{backend.batch_size} with {name}" for name, backend in BACKENDS.items())
    group.add_argument("--batch-size", type=options.COUNT, help=f"sequences decoded together (default: {sizes})")
    for name, backend in BACKENDS.items():
        if backend.engine is not None:
            group.add_argument(f"--{name}-options", type=json_object, default={}, metavar="JSON", help=backend.engine)
    group.add_argument(
        "--speculate",
        type=lambda value: value if value == "auto" else number(int, 0, "auto or a whole number of at least 0")(value),
        default=0,
        metavar="K",
        help="tokens to draft before both models decide on them in one pass, or auto; the samples stay the same",
    )
    group.add_argument(
        "--draft",
        default="theta",
        help="who drafts: theta, t, or the name or folder of a third model of that vocabulary",
    )
    group.add_argument(
        "--cuda-graphs",
        choices=["auto", "off"],
        help="steps that a GPU records and plays, where the models allow it (default: auto)",
    )

    group = parser.add_argument_group("many workers (pip install 'qstar[ray]')")
    group.add_argument(
        "--engine", default="process", choices=["process", "ray"], help="ray: a Ray cluster writes parts into a folder"
    )
    group.add_argument(
        "--num-workers", type=options.COUNT, help="pairs at work at once (default: as many as there is room for)"
    )
    group.add_argument(
        "--gpus-per-worker",
        type=options.SHARE,
        help="of each worker; 0.5 puts two on a GPU",
    )
    group.add_argument(
        "--ray-address",
        help="of the cluster: HOST:PORT, or auto for the one this machine is a node of (default: RAY_ADDRESS, or "
        "this machine by itself)",
    )

    group = options.add_output(parser)
    group.add_argument(
        "--output-format",
        default="jsonl",
        choices=list(options.FORMATS),
        help="what to write; of a file x.parquet parquet is the default",
    )
    group.add_argument(
        "--save-diagnostics", action="store_true", help="write x.diagnostics.jsonl: every token's numbers"
    )
    group.add_argument(
        "--diagnostics-format",
        choices=options.DIAGNOSTICS_FORMATS,  # no default: as in a run that an earlier version began
        help="of x.diagnostics: jsonl (default), or parquet, a quarter of the size, at the end of the run",
    )
    return parser


def prepare(argv: list[str] | None) -> "Job":
    """Check the command line and open its dataset; exits with one line if something is wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        if any(not stop for stop in args.stop):
            raise ValueError("--stop must not be empty")
        if args.draft not in ("theta", "t"):
            options.check_folder("draft", args.draft)
        if args.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise ValueError("--engine ray needs Ray: pip install 'qstar[ray]'")
        of_name = args.output and args.engine != "ray" and Path(args.output).suffix == options.FORMATS["parquet"]
        if of_name and "output_format" not in parser.given:
            args.output_format = "parquet"
        check_backend(args)
        if args.batch_size is None:
            args.batch_size = BACKENDS[args.backend].batch_size
        options.check_run(args, parser.given)
        from qstar.run.job import make_job, open_prompts  # takes seconds, as it imports torch

        return make_job(args, lambda: open_prompts(args), args.output_format, args.save_diagnostics)


def run(argv: list[str] | None) -> int:
    job = prepare(argv)
    if job.args.engine == "ray":
        from qstar.run.cluster import generate_on_ray  # an extra

        return generate_on_ray(job)
    from qstar.run.generating import Generate
    from qstar.run.run import run_job

    return run_job(job, Generate)


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if every sample is on disk, 1 if something failed, 2 for a wrong command line, 130 if it was
    interrupted."""
    return guarded("qstar generate", lambda: run(argv), **options.RESUMED)


if __name__ == "__main__":
    sys.exit(main())
