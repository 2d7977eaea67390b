"""Steps that a GPU knows by heart: recorded once as a CUDA graph, then played without the host's part in them.

A forward pass of one token a row is hundreds of launches, and the host needs longer for them than the device does. A
step of live rows is therefore recorded whole, with both passes, the draw and what the next step starts from, and in it
nothing depends on how long the rows are: it looks at a window of memory around them (`qstar.slots.Window`), and the
mask says what of that there is. Rows and columns come in a few sizes, so that a run records some dozens of steps.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qstar.adapters import Adapted
from qstar.batch import TOKEN, Rows
from qstar.cache import Side
from qstar.slots import IDS, Window

ATTENTION = ("sdpa", "eager")  # which take a mask of a window as it is
COLUMNS = 256  # a window's columns are multiples of it
WORTH_IT = 4  # steps of a kind that are made before it is recorded, which takes as long as three of them
TOLERANCE = 1e-3  # between the numbers of a step as it was made and as it is played, by the same kernels

LOG = logging.getLogger(__name__)


def recorded(step: Callable[[], Tensor], device: torch.device, kept: dict) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of a step that has been made before: what plays it, and the tensor that it fills.

    `kept` is one for all graphs that are played one at a time: they share their memory.
    """
    stream = kept.setdefault("stream", torch.cuda.Stream(device))
    graph = torch.cuda.CUDAGraph()
    # the current stream is put back where a capture fails; other threads, a server's or a trainer's, may go on
    with (
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph, pool=kept.get("pool"), stream=stream, capture_error_mode="thread_local"),
    ):
        numbers = step()
    kept["pool"] = graph.pool()
    return graph.replay, numbers


def why_not(sides: list[Side]) -> str | None:
    """What of the models keeps a step from being recorded; None if nothing does."""
    for side in sides:
        name, parameters = " and ".join(side.sees), side.model.parameters()
        if any(p.device != sides[0].device for p in parameters):
            return "the models are not on one device"
        if side.has_states or not getattr(side.model, "_can_compile_fullgraph", False):
            return f"the model of {name} is not one of those that transformers can compile whole"
        if (attention := side.model.config.get_text_config()._attn_implementation) not in ATTENTION:
            return f"the attention of {name} is {attention}; it can be with {' or '.join(ATTENTION)}"
        if isinstance(side.model, Adapted) and side.model.mixes:
            return "peft picks the rows of each adapter on the host"
        if side.ropes.switch is not None or side.ropes.limit is not None:
            return f"the model of {name} has frequencies that depend on the length of a row"
    return None


def in_sizes(count: int, most: int) -> int:
    """So many rows or a few more, such that few numbers come up: 1, 2, 4, multiples of 8."""
    size = 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
    return max(count, min(size, most))


@cache
def say(reason: str) -> None:
    """Once in a process."""
    LOG.warning("steps are not recorded as CUDA graphs: %s", reason)


@dataclass
class Kind:
    """Steps of so many rows in one place of memory.

    Attributes:
        rows: without samples; their state is the first of it all.
        windows: of each side.
        met: how many of them have been made.
        play, numbers: makes one more, and what that fills, where it has been recorded.
    """

    rows: Rows
    windows: list[Window]
    met: int = 0
    play: Callable[[], None] | None = None
    numbers: Tensor | None = None


class Graphs:
    """The recorded steps of one run.

    Args:
        sides: both models, or one for both.
        draw: draws a token of each row from logits [B, 1, V]: its numbers, float64 [B, 1, 2 + F].
        record: makes of a step what plays it; `recorded`, but for tests.

    Attributes:
        off: why no step is recorded, or None.
    """

    def __init__(self, sides: list[Side], draw: Callable[..., Tensor], record: Callable = recorded):
        self.sides, self.draw, self.record = sides, draw, record
        self.memory: list[Tensor | None] = [None] * len(sides)
        self.off = None
        self._turn_off(why_not(sides))

    def _turn_off(self, reason: str | None) -> None:
        self.off = reason
        if reason is not None:
            say(reason)

    def step(self, rows: Rows) -> Tensor | None:
        """Draw a token of each row: its numbers, float64 [B, 1, 2 + F]. None where that is to be done unrecorded."""
        if self.off is not None:
            return None
        count, sides = len(rows.samples), self.sides
        size = in_sizes(count, min(side.slots.size[0] // side.copies for side in sides))
        seen = [side.wide(size, COLUMNS) for side in sides]
        # what stands for the memory of a side: as long as it is the same, all of it is
        memory = [side.slots.memory[IDS] for side in sides]
        if any(x is not y for x, y in zip(memory, self.memory, strict=True)):
            self._begin(memory)
        key = size, *((columns.start, columns.stop) for _, columns in seen)
        kind = self.kinds.get(key) or self._kind(key, seen)
        if rows.state is not self.shown or self.known != (key, [side.slots.stop for side in sides]):
            kind.rows.state[:, count:] = 0
            kind.rows.state[:, :count] = rows.state
            rows.state = self.shown = kind.rows.state[:, :count]
            for side, window in zip(sides, kind.windows, strict=True):
                side.see_in(window)
        if kind.play is None:
            numbers = self._made(kind)
        else:
            kind.play()
            numbers = kind.numbers
        for side in sides:
            side.advanced()
            if self.off is not None:
                side.look()
        self.known = key, [side.slots.stop for side in sides]
        return numbers[:count].clone()  # the next step fills it anew

    def _begin(self, memory: list[Tensor]) -> None:
        """Drop all steps, as they look at memory that is no more, and have what the next ones start from."""
        self.memory, self.kinds, self.kept = memory, {}, {}
        self.shown = self.known = None
        self.state = memory[0].new_zeros(3, max(len(x) for x in memory))
        self.places = [(x.new_zeros(1), x.new_zeros(len(x), 1)) for x in memory]

    def _kind(self, key: Hashable, seen: list[tuple[slice, slice]]) -> Kind:
        rows = Rows([], self.state.device)
        rows.state = self.state[:, : key[0]]
        windows = [Window(*of, at, of_all[of[0]]) for of, (at, of_all) in zip(seen, self.places, strict=True)]
        self.kinds[key] = Kind(rows, windows)
        return self.kinds[key]

    def _made(self, kind: Kind) -> Tensor:
        """Make a step; where enough of its kind have been made, record it too, and play that, which must give the
        same."""

        def step() -> Tensor:
            logits = []
            for side, window in zip(self.sides, kind.windows, strict=True):
                logits += side.advance_in(window, kind.rows.tokens)
            return self.draw(kind.rows, *logits)

        kind.met += 1
        if kind.met < WORTH_IT:
            return step()
        kept = [self.state, *(x for place in self.places for x in place)]
        before = [x.clone() for x in kept]

        def put_back() -> None:
            for x, value in zip(kept, before, strict=True):
                x.copy_(value)

        made = step()
        put_back()
        try:
            play, numbers = self.record(step, self.state.device, self.kept)
            put_back()
            play()
            same = torch.equal(numbers[..., TOKEN], made[..., TOKEN])
            if not same or not torch.allclose(numbers, made, TOLERANCE, TOLERANCE, equal_nan=True):
                raise RuntimeError("as it is played, a step gives other numbers")
        except RuntimeError as error:
            self._turn_off(str(error).splitlines()[0])
            put_back()
            return step()
        kind.play, kind.numbers = play, numbers
        return numbers
