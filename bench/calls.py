"""Every call that launches kernels, and what Triton's JIT makes of it, on a machine that need not have a GPU.

A kernel is compiled once for each specialisation: the types of its arguments, its constants, and what Triton takes
from a value or an address on top (multiples of 16, ones, None). `distinct` reduces the launches of any calls to the
specialisations, as the JIT itself would tell them apart.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from qstar_kernels.gpu import launch as gpu
from qstar_kernels.gpu.launch import Launch, aligned, plan
from qstar_kernels.types import METHODS, PER_ROW, Settings

# what is asked for, and the temperatures it can be asked at
WHATS = {"sample": (1.0, 0.7), "greedy": (0.0,), "look up": (1.0, 0.7), "stats": (1.0, 0.7), "log q": (1.0, 0.7)}
TRUNCATIONS = {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "target_top_k": 50, "target_top_p": 0.9}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Where a side's rows begin and how far apart they are. «padded» is a model's output, «packed» the same without padding,
# «odd» some rows of that, «shifted» all but the first token, «columns» those of a matrix, «far» the last position of
# each of some long prompts.
PLACES = ("padded", "packed", "odd", "shifted", "columns", "far")
# one chunk, some, and as many as there are in the largest; odd, and a multiple of 16
VOCABULARIES = (999, 1008, 50257, 128256)


class Side(NamedTuple):
    """The logits of one model."""

    dtype: torch.dtype
    place: str

    def logits(self, rows: int, vocab_size: int) -> Tensor:
        """[rows, vocab_size] on no device."""
        if self.place == "columns":
            return torch.empty(vocab_size, rows, dtype=self.dtype, device="meta").T
        first = 1 if self.place in ("odd", "shifted") else 0
        pitch = {"packed": vocab_size, "odd": vocab_size | 1, "far": 2**31}.get(self.place, -(-vocab_size // 64) * 64)
        whole = torch.empty(first + rows * max(pitch, first + vocab_size), dtype=self.dtype, device="meta")
        return whole.as_strided((rows, vocab_size), (pitch, 1), first)


@dataclass(frozen=True)
class Call:
    """One call of the sampler. What is not said here has no part in what is compiled."""

    what: str
    settings: Settings
    theta: Side
    t: Side
    rows: int = 3
    vocab_size: int = 50257
    first: int = 0  # seeds, positions and tokens are those of some sequences from this one on
    per_row: bool = False  # one number a row of the settings that may be

    def launches(self) -> list[Launch]:
        """Its launches, in order, with their arguments on no device."""
        index = torch.empty(self.first + self.rows, dtype=torch.int64, device="meta")[self.first :]
        own = torch.empty(self.rows, len(PER_ROW), dtype=torch.float64, device="meta") if self.per_row else None
        return plan(
            aligned(self.theta.logits(self.rows, self.vocab_size)),
            aligned(self.t.logits(self.rows, self.vocab_size)),
            self.settings,
            seeds=index if self.what in ("sample", "greedy") else None,
            positions=index if self.what in ("sample", "greedy") else None,
            tokens=index if self.what == "look up" else None,
            want_log_q=self.what == "log q",
            own=own,
        )[0]


def every_call() -> Iterator[Call]:
    """What × rule × temperature × truncation × types × rows × vocabularies.

    Rows far apart or with settings of their own, a vocabulary of one token and logits of more than 2 GiB meet only
    calls without truncation or with all of it; rows in any other place are launched like padded ones.
    """
    truncations = [
        {name: value for name, value, on in zip(TRUNCATIONS, TRUNCATIONS.values(), chosen, strict=True) if on}
        for chosen in product((False, True), repeat=len(TRUNCATIONS))
    ]
    few = [truncations[0], truncations[-1]]
    truncations.append({"top_k": 2**40})  # truncation in name only

    def calls(truncations, places, sizes) -> Iterator[Call]:
        temperatures = [(what, temperature) for what, all_of_it in WHATS.items() for temperature in all_of_it]
        for (what, temperature), method, truncation in product(temperatures, METHODS, truncations):
            settings = Settings(method=method, temperature=temperature, **truncation)
            for theta, t, (place_theta, place_t), size in product(DTYPES, DTYPES, places, sizes):
                yield Call(what, settings, Side(theta, place_theta), Side(t, place_t), *size)

    yield from calls(truncations, [("padded", "padded")], list(product((1, 3, 16), VOCABULARIES)))
    yield from calls(few, [("padded", "padded")], [(*size, 0, True) for size in product((1, 3, 16), VOCABULARIES)])
    yield from calls(few, [("padded", "far"), ("far", "padded"), ("far", "far")], [(3, 50257)])
    yield from calls(few, [("padded", "padded")], [(3, 50257, 1), (1, 1), (3, 1), (20000, 128256)])


class Specialisation(NamedTuple):
    """What a kernel is compiled once for: type and further knowledge of each argument, by name."""

    kernel: str
    arguments: tuple[tuple[str, tuple], ...]


class Pretended:
    """Triton's driver for a GPU that is not here: kernels are compiled for it, and their launches are written down."""

    def __init__(self, architecture: str):
        self.architecture, self.utils = architecture, self
        self.launched: list[tuple[str, tuple]] = []  # the kernel, and all that its launcher was given

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        return lambda *given: driver.active.launched.append((metadata.name, given))

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: str) -> tuple:
        """Module, function, registers, spills, and the most threads of a program."""
        return None, name, 0, 0, 1024

    def get_current_target(self) -> GPUTarget:
        if self.architecture.startswith("gfx"):
            return GPUTarget("hip", self.architecture, 64)
        return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        """Kernels are kept by device."""
        return self.architecture

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def pretended(architecture: str) -> Iterator[Pretended]:
    """Within it, Triton compiles for this GPU, and launches are planned for its warps."""
    before, now, warp = driver._active, Pretended(architecture), gpu.WARP
    driver.set_active(now)
    gpu.WARP = now.get_current_target().warp_size
    try:
        yield now
    finally:
        gpu.WARP = warp
        driver.set_active(before)


def compiled(launch: Launch, architecture: str) -> CompiledKernel:
    """The kernel as the JIT compiles it before this launch on a GPU."""
    with pretended(architecture):
        return launch.kernel.run(**launch.arguments, **launch.options(), grid=launch.grid, warmup=True)


class Distinct(NamedTuple):
    """`of` has for each specialisation the first call that launches it, and which of its launches that is."""

    calls: int
    launches: int
    of: dict[Specialisation, tuple[Call, int]]


def distinct(calls: Iterable[Call], architecture: str) -> Distinct:
    """The specialisations among the launches of some calls."""
    found, count, launches = {}, 0, 0
    with pretended(architecture):
        for call in calls:
            count += 1
            for i, launch in enumerate(call.launches()):
                launches += 1
                bind = launch.kernel.device_caches[architecture][-1]
                bound, classes, _ = bind(**launch.arguments, **launch.options())
                # a constant's own value is kept beside its class
                key = Specialisation(launch.kernel.__name__, tuple(zip(bound, classes, strict=True)))
                found.setdefault(key, (call, i))
    return Distinct(count, launches, found)


def covering(specialisations: Iterable[Specialisation], strength: int) -> list[Specialisation]:
    """Some of them, so that any `strength` arguments of a kernel take in one of these whatever they take in any.

    So do any `strength` + 1 constants, which decide what code there is. Greedy: each is the one that has most of what
    is still missing.
    """
    by_kernel = {}
    for specialisation in specialisations:
        by_kernel.setdefault(specialisation.kernel, []).append(specialisation)
    chosen = []
    for group in by_kernel.values():
        columns = [dict.fromkeys(column) for column in zip(*(s.arguments for s in group), strict=True)]
        numbers = [{value: i for i, value in enumerate(column)} for column in columns]
        codes = torch.tensor([[n[v] for n, v in zip(numbers, s.arguments, strict=True)] for s in group])  # [N, P]
        varying = [i for i, column in enumerate(columns) if len(column) > 1]
        met, count = [], 0
        constants = [i for i in varying if any(kind == "constexpr" for _, (kind, _) in columns[i])]
        some = min(strength, len(varying))
        for together in (*combinations(varying, some), *combinations(constants, some + 1)):
            _, inverse = torch.unique(codes[:, list(together) or [0]], dim=0, return_inverse=True)  # [N]
            met.append(inverse + count)
            count += int(inverse.max()) + 1
        met, missing = torch.stack(met, 1), torch.ones(count, dtype=torch.bool)  # [N, C], [all values]
        while missing.any():
            best = int(missing[met].sum(1).argmax())
            chosen.append(group[best])
            missing[met[best]] = False
    return chosen
