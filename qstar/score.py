"""`python -m qstar.score`: answers in, the numbers that q* gives them on disk.

It writes what `qstar.generate --save-diagnostics` writes, `x.jsonl` and `x.diagnostics.jsonl`, and at the end
`x.weights.jsonl` with the importance weights of every sample.
"""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qstar.run import options
from qstar.run.command import Parser, guarded

if TYPE_CHECKING:
    from qstar.run.job import Job

# What scoring takes over from the run that made the samples: who, and which q*
RUN_DEFAULTS = {"model_theta", "model_t", "adapter_theta", "adapter_t", "dtype", "load_in_4bit", "trust_remote_code"}
RUN_DEFAULTS |= {"use_request_parameters", *options.DEST.values()}
# And what has no meaning for its samples, whose prompts and answers are tokens already
OF_TEXT = {"prompt_field", "response_field", "no_eos", "dataset_split", "dataset_config", "continue_final_message"}
OF_TEXT |= {"t_hint_field", "t_hint_template"}
OF_TEXT |= {
    f"{side}_{what}" for side in ("theta", "t") for what in ("chat_template", "system_prompt", "template_kwargs")
}


def make_parser() -> Parser:
    """The command line, in groups."""
    parser = Parser(
        "score",
        usage="%(prog)s --dataset FILE [options]",
        description="The numbers that q* gives to answers that are there already: α, KL, ESS and the three "
        "log-probabilities of every token, and importance weights. On the output of qstar.generate the options of that "
        f"run are the defaults. Every option is explained in {options.GUIDE}",
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
        type=options.SHARE,
        default=10.0,
        help="bound of the clipped importance weights",
    )
    options.add_output(parser)
    parser.set_defaults(backend="transformers", draft="theta")
    return parser


def prepare(argv: list[str] | None) -> "Job":
    """Check the command line and open its dataset; exits with one line if something is wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        if args.dataset is None:
            raise ValueError("--dataset is missing: the file with the prompts and answers to score")
        name = args.dataset[0]
        # a table is there when its run is complete, and what makes it before
        there = (Path(name), Path(name, "manifest.json"), Path(f"{name.removesuffix('.parquet')}.run.json"))
        may_be_run = len(args.dataset) == 1 and ("://" in name or any(path.is_file() for path in there))
        if may_be_run:  # whose other options are defaults here
            options.settings_of(args)
            options.check_output(args)
        else:
            options.check_run(args, parser.given)
        # these take seconds, as they import torch
        from qstar.data.answers import DatasetAnswers
        from qstar.rule import FORCED
        from qstar.run.job import make_job, open_prompts
        from qstar.run.records import NoRun, RecordError, RunAnswers, RunFiles

        files = None
        with suppress(NoRun):  # it is one of the files that a run wrote, together with its diagnostics
            files = RunFiles(name) if may_be_run else None
        if files is None:
            if may_be_run:
                options.check_run(args, parser.given)
            return make_job(args, lambda: DatasetAnswers(open_prompts(args), args.response_field))
        try:
            next(iter(files))
        except RecordError as error:
            raise ValueError(f"--dataset: {error}") from None
        if unused := sorted(OF_TEXT & parser.given):
            raise ValueError(f"{options.option(unused[0])}: the prompts and answers of a run are its own tokens")
        of_run = {name.removeprefix("--").replace("-", "_"): value for name, value in files.settings.items()}
        parser.set_defaults(**{name: value for name, value in of_run.items() if name in {*RUN_DEFAULTS, *FORCED}})
        args = parser.parse_args(argv)
        options.check_run(args, parser.given)
        return make_job(args, lambda: RunAnswers(files, args.num_samples, bool(args.use_request_parameters)))


def run(argv: list[str] | None) -> int:
    job = prepare(argv)
    from qstar.run.run import run_job
    from qstar.run.scoring import Score

    return run_job(job, Score)


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if every answer is scored, 1 if something failed, 2 for a wrong command line, 130 if it was
    interrupted."""
    return guarded("qstar score", lambda: run(argv), **options.RESUMED)


if __name__ == "__main__":
    sys.exit(main())
