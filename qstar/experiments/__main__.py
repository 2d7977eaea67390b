"""`python -m qstar.experiments`: run the experiments, and write their results as JSON, tables and plots."""

import dataclasses
import importlib.util
import os
import sys
import warnings
from pathlib import Path

from qstar.demo import THETA, T
from qstar.run.command import Parser, guarded
from qstar.run.options import COUNT, check_folder

EXPERIMENTS = ("main", "ablation", "scaling", "speculation", "long_run", "distillation", "grpo")


def make_parser() -> Parser:
    parser = Parser(
        "experiments",
        description="Train a policy on data from q* and from its rivals, on a CPU, and measure what comes of it. "
        "Without arguments: all experiments on the demo pair. What was found is in "
        f"{Path(__file__).with_name('README.md')}",
    )
    parser.add_argument(
        "experiments",
        nargs="*",
        default=[],
        metavar="EXPERIMENT",
        help=f"which of {', '.join(EXPERIMENTS)} (default: all)",
    )
    parser.add_argument("--model-theta", help="π_θ: hub name or folder (default: the demo pair's)")
    parser.add_argument("--model-t", help="π_t, the target")
    parser.add_argument("--quick", action="store_true", help="very small: shows that it runs, measures little")
    parser.add_argument("--seeds", type=COUNT, help="repetitions of every cell (default: 3, with --quick 1)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("qstar-out/experiments"),
        help="folder of the results; a run that was killed goes on there",
    )
    return parser


def run(argv: list[str] | None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in args.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    if (args.model_theta is None) != (args.model_t is None):
        parser.error("--model-theta and --model-t go together")
    for package in ("trl", "matplotlib", "scipy"):
        if importlib.util.find_spec(package) is None:
            parser.error(f"the experiments need {package}: pip install 'qstar[experiments]'")
    theta, t = args.model_theta or str(THETA), args.model_t or str(T)
    with parser.refusing():
        check_folder("model-theta", theta)
        check_folder("model-t", t)
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file; give a folder")

    # the libraries' own talk would bury the lines of progress
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="torch|transformers|trl|accelerate")
    import torch
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    from qstar import Pair
    from qstar.experiments import report, results, training
    from qstar.experiments.studies import QUICK, Sizes, Studies
    from qstar.run.checkpoints import fingerprint

    disable_progress_bar()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sizes = QUICK if args.quick else Sizes()
    # the demo pair comes with the package: where that lies is no setting
    pair = {"theta": (args.model_theta, theta), "t": (args.model_t, t)}
    settings = {
        "pair": {k: {"name": given or "demo", "weights": fingerprint(m)} for k, (given, m) in pair.items()},
        "sizes": dataclasses.asdict(sizes),
        "training": training.settings(),
    }
    seeds = args.seeds or (1 if args.quick else 3)
    args.output.mkdir(parents=True, exist_ok=True)
    studies = Studies(Pair.from_pretrained(theta, t, device="cpu"), sizes)
    say = (lambda line: None) if args.quiet else (lambda line: print(line, flush=True))
    for name in args.experiments or EXPERIMENTS:
        path = args.output / f"{name}.json"
        found = results.run(path, studies.cells(name), seeds, settings, say)
        report.write(name, found, args.output)
    say(f"results: {args.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if all is done, 1 if something failed, 2 for a wrong command line, 130 if it was
    interrupted."""
    return guarded("qstar experiments", lambda: run(argv), interrupted="; start the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
