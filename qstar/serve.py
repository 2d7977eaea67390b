"""`python -m qstar.serve`: vLLM's OpenAI-compatible server whose model is q* of a pair."""

import os
import sys
from argparse import Namespace

from qstar.arguments import Parser, failed, prepare_serve, settings_of
from qstar.vllm import SERVER

NAME = "qstar"  # of the model in requests, unless --served-model-name says another
OWN = ("model", "hf_overrides", "worker_cls", "logits_processors")  # engine options that make the model a pair


def server_arguments(parser: Parser, args: Namespace, of_vllm: list[str]) -> Namespace:
    """All arguments of vLLM's server; exits with one line if something is wrong."""
    # sets in the environment what vLLM reads when it is imported
    from qstar.vllm.engine import EnginePair, check_engine, engine_options  # isort: skip
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from qstar.vllm.params import rule_fields

    theirs = make_arg_parser(FlexibleArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False))
    theirs.error = parser.error
    said = theirs.parse_args(of_vllm)
    try:
        pair = EnginePair(args.model_theta, args.model_t, dtype=said.dtype, trust_remote_code=said.trust_remote_code)
        rule = rule_fields(settings_of(args), args)
        options = engine_options(pair, said.dtype, rule)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    # what is vLLM's own in a request has its default there
    options["override_generation_config"] = {name: rule[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    theirs.set_defaults(**options, served_model_name=[NAME])
    complete = theirs.parse_args(of_vllm)
    for name in OWN:
        if getattr(complete, name) != options[name] or complete.model_tag:
            parser.error(f"--{name.replace('_', '-')} is not to be chosen: --model-theta and --model-t are the model")
    complete.middleware = [*complete.middleware, "qstar.vllm.server.Numbers"]
    try:
        check_engine(complete)
        validate_parsed_serve_args(complete)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return complete


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; 1 with one line on stderr if the server cannot start, 2 for a wrong command line."""
    parser, args, of_vllm = prepare_serve(argv)
    arguments = server_arguments(parser, args, of_vllm)
    os.environ[SERVER] = "1"
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    names = ", ".join(arguments.served_model_name)
    print(
        f"q* of {args.model_theta} and {args.model_t} as {names} on {arguments.host or '0.0.0.0'}:{arguments.port}",
        flush=True,
    )
    try:
        uvloop.run(run_server(arguments))
    except (RuntimeError, ValueError, OSError) as error:
        return failed(parser.prog, error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
