"""What runs the two models: each backend by its name, and all that the tool knows of it.

A backend loads a pair, which is a `qstar.pair.Pair` to whoever has it: `request` encodes a conversation, `decoder`
draws sequences from q*, and samples are the same from all of them for the same seed. Nothing else asks which it is.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from qstar import vllm

if TYPE_CHECKING:
    from qstar.pair import Pair


@dataclass(frozen=True)
class Backend:
    """One way to run a pair. Options are by their names in a parsed command line.

    Args:
        load: the pair that a command line names; raises ValueError or OSError where there is none.
        batch_size: sequences that are decoded together by default.
        about: what it is for, in a few words of help.
        own: options that it alone has, beside those of its engine.
        engine: help of its option `--NAME-options`, a JSON object of its engine's own arguments; None if it has none.
        placement: those of them that say where it runs and how much at once, on which no sample depends.
        refuse: raises ValueError for what it does not do; called when the models' names are known to be good.
        pins: whether it loads the commits that are in `revision_theta`, `revision_adapter_theta` and so on.
        package: what must be installed, by the extra of its name.
    """

    load: Callable[[Namespace], "Pair"]
    batch_size: int
    about: str
    own: tuple[str, ...] = ()
    engine: str | None = None
    placement: frozenset[str] = frozenset()
    refuse: Callable[[Namespace], None] = lambda args: None
    pins: bool = False
    package: str = "transformers"


def load_by_transformers(args: Namespace) -> "Pair":
    """Both models, and a third one that drafts, in this process."""
    from qstar.pair import Pair  # torch and transformers take seconds to import, which help and errors do without

    names = "adapter_theta adapter_t draft revision_theta revision_t revision_adapter_theta revision_adapter_t dtype "
    names += "device device_map attn_implementation load_in_4bit trust_remote_code"
    return Pair.from_pretrained(args.model_theta, args.model_t, **{name: getattr(args, name) for name in names.split()})


def load_by_vllm(args: Namespace) -> "Pair":
    """Both models in one engine, which starts with the first decoder."""
    from qstar.vllm.engine import load  # vLLM takes its time to import, and need not be there

    return load(args)


BACKENDS = {
    "transformers": Backend(
        load_by_transformers,
        batch_size=16,
        about="on any device, with drafts",
        own=("speculate", "cuda_graphs", "device", "device_map", "attn_implementation", "load_in_4bit"),
        pins=True,
    ),
    "vllm": Backend(
        load_by_vllm,
        batch_size=256,
        about="for thousands of prompts: pip install 'qstar[vllm]'",
        engine='arguments of vLLM\'s engine, e.g. {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.8}',
        placement=vllm.PLACEMENT,
        refuse=vllm.refuse,
        package="vllm",
    ),
}


def check_installed(name: str) -> None:
    """Refuse a backend that is not there. Raises ValueError."""
    if find_spec(BACKENDS[name].package) is None:
        raise ValueError(f"{BACKENDS[name].package} is not installed; pip install 'qstar[{name}]'")


def check_backend(args: Namespace) -> None:
    """Refuse a command line that its backend cannot do.

    Raises:
        ValueError: it is not installed, or an option is of another backend.
    """
    check_installed(args.backend)
    for name, other in BACKENDS.items():
        of_engine = () if other.engine is None else (f"{name}_options",)
        for option in (*other.own, *of_engine) if name != args.backend else ():
            if getattr(args, option):
                mine = BACKENDS[args.backend].engine and f"; {args.backend}'s own are in --{args.backend}-options"
                raise ValueError(f"--{option.replace('_', '-')} is of --backend {name}{mine or ''}")


def load_pair(args: Namespace) -> "Pair":
    """The pair that a command line names, on the backend that it names."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return BACKENDS[args.backend].load(args)
