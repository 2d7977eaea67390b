"""`python -m qstar.serve`: vLLM's OpenAI-compatible server whose model is q* of a pair."""

import os
import sys
from argparse import Namespace
from typing import Any

from qstar.backends import check_installed
from qstar.run.command import Parser, guarded
from qstar.run.options import add_model_names, add_rule, check_models, settings_of
from qstar.vllm import SERVER, refuse_adapters

NAME = "qstar"  # of the model in requests, unless --served-model-name says another
OWN = ("model", "hf_overrides", "worker_cls", "logits_processors")  # engine options that make the model a pair


def make_parser() -> Parser:
    """The command line before vLLM's own options, in groups."""
    parser = Parser(
        "serve",
        usage="%(prog)s [options] [options of vLLM's server]",
        description="An OpenAI-compatible server whose model is q* of a pair, by vLLM (pip install 'qstar[vllm]'). "
        "What a request does not say about q* is as the options here have it. All others are those of `vllm serve`: "
        "--host, --port, --api-key, --tensor-parallel-size, …",
    )
    add_model_names(parser)
    add_rule(parser)
    parser.add_argument(
        "--allow-weight-updates",
        action="store_true",
        help="let POST /v1/qstar/weights replace the weights by those of a folder on this machine, for a trainer",
    )
    return parser


def prepare(argv: list[str] | None) -> tuple[Parser, Namespace, list[str]]:
    """Check the command line but for what is vLLM's of it, which comes last; exits with one line if it is wrong."""
    parser = make_parser()
    args, of_vllm = parser.parse_known_args(argv)
    with parser.refusing():
        check_installed("vllm")
        check_models(args)
        refuse_adapters(args)
        settings_of(args)
    return parser, args, of_vllm


def server_arguments(parser: Parser, args: Namespace, of_vllm: list[str]) -> tuple[Namespace, Any]:
    """All arguments of vLLM's server, and the pair without its weights; exits with one line if something is wrong."""
    # sets in the environment what vLLM reads when it is imported
    from qstar.vllm.engine import EnginePair, check_engine, engine_options  # isort: skip
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from qstar.vllm.params import ELSEWHERE, rule_fields

    theirs = make_arg_parser(FlexibleArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False))
    theirs.error = parser.error
    said = theirs.parse_args(of_vllm)
    try:
        pair = EnginePair(args.model_theta, args.model_t, dtype=said.dtype, trust_remote_code=said.trust_remote_code)
        rule = rule_fields(settings_of(args), args)
        options = engine_options(pair, said.dtype, rule)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    for note in pair.notes:
        print(f"Warning: {note}")
    theirs.set_defaults(**options, served_model_name=[NAME])
    complete = theirs.parse_args(of_vllm)
    for name in OWN:
        if getattr(complete, name) != options[name] or complete.model_tag:
            parser.error(f"--{name.replace('_', '-')} is not to be chosen: --model-theta and --model-t are the model")
    for name in ELSEWHERE.keys() & complete.override_generation_config.keys():
        parser.error(f"--override-generation-config has {name}; its default is --{name.replace('_', '-')}")
    try:
        check_engine(complete)
        validate_parsed_serve_args(complete)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return complete, pair


async def serve(arguments: Namespace, updated: Any = None) -> None:
    """vLLM's server with q* and its numbers, until it is interrupted.

    `updated` is the pair whose weights may be replaced, without them.

    Its own `run_server` raises KeyboardInterrupt wherever SIGTERM comes during the start, which much of what runs there
    takes for an error of its own and some forgets. Here SIGTERM ends the process until vLLM answers it.
    """
    from vllm.entrypoints.launchers.api_server import entry

    from qstar.vllm.server import with_numbers

    serve_http = entry.serve_http  # what gets the application when it is complete
    entry.serve_http = lambda app, **options: serve_http(with_numbers(app, updated), **options)
    await entry.run_server_worker(*entry.setup_server(arguments, reuse_port=False), arguments)


def run(argv: list[str] | None) -> int:
    parser, args, of_vllm = prepare(argv)
    arguments, pair = server_arguments(parser, args, of_vllm)
    os.environ[SERVER] = "1"
    import uvloop

    names = ", ".join(arguments.served_model_name)
    print(
        f"q* of {args.model_theta} and {args.model_t} as {names} on {arguments.host or '0.0.0.0'}:{arguments.port}",
        flush=True,
    )
    try:
        uvloop.run(serve(arguments, pair if args.allow_weight_updates else None))
    except RuntimeError as error:  # vLLM's own
        raise ValueError(str(error)) from error
    return 0


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted, which is 130; 1 with one line on stderr if the server cannot start, 2 for a wrong
    command line."""
    return guarded("qstar serve", lambda: run(argv), handles_signals=False)


if __name__ == "__main__":
    sys.exit(main())
