"""`python -m qstar.score`: answers in, the numbers that q* gives them on disk.

It writes what `qstar.generate --save-diagnostics` writes, `x.jsonl` and `x.diagnostics.jsonl`, and at the end
`x.weights.jsonl` with the importance weights of every sample.
"""

import sys
from contextlib import suppress
from pathlib import Path

from qstar.data.answers import DatasetAnswers
from qstar.rule import FORCED
from qstar.run import options
from qstar.run.job import Job, make_job, open_prompts
from qstar.run.records import RecordError, RunAnswers, RunFiles
from qstar.run.run import run_command
from qstar.run.scoring import Score

# What scoring takes over from the run that made the samples: who, and which q*
RUN_DEFAULTS = {"model_theta", "model_t", "adapter_theta", "adapter_t", "dtype", "load_in_4bit", "trust_remote_code"}
RUN_DEFAULTS |= {"use_request_parameters", *options.DEST.values(), *FORCED}


def make_parser() -> options.Parser:
    """The command line, in groups."""
    parser = options.Parser(
        "score",
        usage="%(prog)s --dataset FILE [options]",
        description="The numbers that q* gives to answers that are there already: α, KL, ESS and the three "
        "log-probabilities of every token, and importance weights. On the output of qstar.generate the options of that "
        "run are the defaults. Every option is explained in docs/guide.md.",
    )
    options.add_models(parser)
    group = options.add_data(parser)
    group.add_argument(
        "--response-field", metavar="COLUMN", help="column that holds the answer, where it is not recognised"
    )
    group.add_argument("--no-eos", action="store_true", help="do not end answers of a dataset with the EOS token")
    options.add_prompts(parser)
    options.add_rule(parser)
    group = parser.add_argument_group("scoring")
    group.add_argument("--batch-size", type=options.COUNT, default=16, help="sequences that are scored together")
    group.add_argument(
        "--clip",
        type=options.number(float, 0, "a number of at least 0"),
        default=10.0,
        help="bound of the clipped importance weights",
    )
    options.add_output(parser)
    parser.set_defaults(backend="transformers", draft="theta")
    return parser


def prepare(argv: list[str] | None) -> Job:
    """Check the command line and open its dataset; exits with one line if something is wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        if args.dataset is None:
            raise ValueError("--dataset is missing: the file with the prompts and answers to score")
        files = None
        with suppress(RecordError):  # it is one of the files that a run wrote, together with its diagnostics
            files = RunFiles(args.dataset[0]) if len(args.dataset) == 1 and Path(args.dataset[0]).is_file() else None
        if files is None:
            return make_job(args, lambda: DatasetAnswers(open_prompts(args), args.response_field))
        try:
            next(iter(files))
        except RecordError as error:
            raise ValueError(f"--dataset: {error}") from None
        of_run = {name.removeprefix("--").replace("-", "_"): value for name, value in files.settings.items()}
        parser.set_defaults(**{name: value for name, value in of_run.items() if name in RUN_DEFAULTS})
        args = parser.parse_args(argv)
        for name in ("prompt_field", "response_field", "t_hint_field"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: the prompts and answers of a run are its own tokens")
        return make_job(args, lambda: RunAnswers(files, args.num_samples, bool(args.use_request_parameters)))


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if every answer is scored, 1 if something failed, 2 for a wrong command line."""
    return run_command("qstar.score", prepare(argv), Score)


if __name__ == "__main__":
    sys.exit(main())
