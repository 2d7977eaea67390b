"""Memory for the rows of a batch: each has a slot in it, which it takes and gives up while the others stay.

Live rows have the first slots and end at one column, whatever their length: they are left-padded. A step writes that
column of all of them. A row that leaves is overwritten by the last one, where no prompt takes its slot at once; the
columns before the longest row are out of sight. So memory holds one cache, and next to nothing of it is ever moved.
"""

from collections.abc import Collection, Hashable
from copy import copy
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionAndFullAttentionLayer

IDS = "ids"  # the name of the tokens in memory


def closed_up(count: int, leaving: Collection[int]) -> list[int]:
    """For each of the rows that are left when some leave, which of the `count` rows it was: the last ones have moved to
    where others left."""
    stay = count - len(leaving)
    behind = (row for row in range(stay, count) if row not in leaving)
    return [next(behind) if row in leaving else row for row in range(stay)]


def on(device: torch.device, values: list) -> Tensor:
    """Whole numbers on a device, int64, without waiting for it."""
    numbers = torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda" and numbers.numel():
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


class Window(NamedTuple):
    """What a step sees that is recorded once and played many times: it must not depend on what the host knows.

    Attributes:
        rows, columns: of memory, more than there are tokens in; what no row has written is padding.
        at: on the device, the column that the next token takes, counted from the first one: int64 [1].
        next: on the device, the position of each row's next token, int64 [rows, 1].
    """

    rows: slice
    columns: slice
    at: Tensor
    next: Tensor


class Slots:
    """Everything that a model keeps by column, of all rows, and what of it is in sight.

    Attributes:
        memory: by name, tensors [slots, heads, columns, size]; `IDS` among them, int64 with one head and size, −1 where
            a row is padded.
        size: slots and columns of each.
        rows: the slots in sight.
        left, stop: the columns in sight; the next token's is `stop`.
        padded: whether some row in sight begins behind `left`.
        window: in sight instead, while a step that is recorded reads its token; None otherwise.
    """

    def __init__(self):
        self.memory: dict[Hashable, Tensor] = {}
        self.size = 0, 0
        self.rows, self.left, self.stop, self.padded = slice(0, 0), 0, 0, False
        self.window: Window | None = None

    @property
    def width(self) -> int:
        """Columns in sight."""
        return self.stop - self.left

    @property
    def ids(self) -> Tensor:
        """Tokens in sight, int64 [rows, width]; −1 on padding."""
        return self.memory[IDS][self.rows, 0, self.left : self.stop, 0]

    def view(self, name: Hashable, stop: int) -> Tensor:
        """The rows in sight from `left` to `stop`."""
        return self.memory[name][self.rows, :, self.left : stop]

    def write(self, name: Hashable, new: Tensor, start: int) -> Tensor:
        """Put new columns [rows, heads, K, size] at `start`: the view up to their end. In a window, one where it says:
        the view of the window."""
        if self.window is not None:
            seen = self.memory[name][self.window.rows, :, self.window.columns]
            return seen.index_copy_(2, self.window.at, new)
        if name not in self.memory:
            shape = self.size[0], new.shape[1], self.size[1], new.shape[3]
            self.memory[name] = new.new_full(shape, _padding(name))
        stop = start + new.shape[2]
        self.memory[name][self.rows, :, start:stop] = new
        return self.view(name, stop)

    def fit(self, slots: int, before: int, after: int) -> bool:
        """Whether there are so many slots, and so many columns up to `stop` and from it."""
        return slots <= self.size[0] and before <= self.stop and self.stop + after <= self.size[1]

    def move(self, slots: int, before: int, after: int) -> None:
        """Make them fit: what is in sight goes to other columns, or to more memory, one tensor after the other.

        There is room for 16 tokens more then, and for a sixteenth of the columns, or the next steps would have to move
        everything again.
        """
        width, before = self.width, max(self.width, before)
        old, size = self.size, (max(self.size[0], slots), self.size[1])
        if (need := before + after) + need // 16 + 16 > size[1]:
            size = size[0], need + need // 8 + 64
        for name, x in self.memory.items():
            kept = self.view(name, self.stop)
            # new memory is padding: what a row has not written is masked, and must be finite none the less
            to = x if size == old else x.new_full((size[0], x.shape[1], size[1], x.shape[3]), _padding(name))
            to[self.rows, :, before - width : before] = kept.clone() if to is x else kept
            self.memory[name] = to
        self.size, self.left, self.stop = size, before - width, before

    def begin(self, rows: int) -> None:
        """Sight of so many new rows in place of all others, and of no column yet."""
        self.rows, self.left, self.stop = slice(0, rows), 0, 0

    def part(self, rows: int, width: int) -> "Slots":
        """Sight of the slots behind the rows, and of the place where their last `width` columns will be."""
        new = copy(self)
        new.rows = slice(self.rows.stop, self.rows.stop + rows)
        new.left = new.stop = self.stop - width
        self._pad(self.rows, new.left, self.left)
        self._pad(new.rows, self.left, new.left)
        return new

    def _pad(self, rows: slice, start: int, stop: int) -> None:
        """Forget what was in these columns before, which may be NaN."""
        if start < stop and rows.start < rows.stop:
            for name, x in self.memory.items():
                x[rows, :, start:stop].fill_(_padding(name))

    def clear(self, rows: slice, columns: slice) -> None:
        """Have nothing but padding in these rows and columns but for what is in sight."""
        self._pad(rows, columns.start, self.left)
        self._pad(rows, self.stop, columns.stop)
        self._pad(slice(self.rows.stop, rows.stop), self.left, self.stop)

    def see(self, rows: int, width: int) -> None:
        """Sight of so many rows and the last columns."""
        self.rows, self.left = slice(0, rows), self.stop - width

    def put(self, row: int, columns: int, other: "Slots", source: int) -> None:
        """The last columns of a row by those of another one."""
        for name, x in self.memory.items():
            x[row, :, self.stop - columns : self.stop] = other.memory[name][
                source, :, other.stop - columns : other.stop
            ]

    def shift(self, columns: Tensor) -> None:
        """Move each row in sight by so many columns to the right, int64 [rows], and drop as many of its last ones."""
        source = torch.arange(self.width, device=columns.device) - columns[:, None]
        padding, source = source < 0, source.clamp(min=0)
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        for name in self.memory:
            x = self.view(name, self.stop).transpose(1, 2)
            x.copy_(x[rows.to(x.device), source.to(x.device)])
        self.ids.masked_fill_(padding, -1)

    def taken(self, rows: Tensor, width: int) -> "Slots":
        """A copy of these rows, int64 [N], as they were when so many columns were in sight."""
        new = Slots()
        new.memory = {name: x[rows.to(x.device), :, self.left : self.stop] for name, x in self.memory.items()}
        new.size, new.stop, new.rows = (len(rows), self.width), width, slice(0, len(rows))
        return new


def _padding(name: Hashable) -> int:
    return -1 if name == IDS else 0


class SlotLayer(DynamicLayer):
    """Keys and values of one layer, number `number`, in slots: a step writes its own columns and copies nothing."""

    def __init__(self, slots: Slots, number: int):
        super().__init__()
        self.slots, self.number = slots, number

    @property
    def is_compileable(self) -> bool:
        """For transformers, which otherwise looks whether a mask pads anything, and so waits for the device."""
        return self.slots.padded

    def get_seq_length(self) -> int | Tensor:
        window = self.slots.window
        return super().get_seq_length() if window is None else window.at[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        window = self.slots.window
        if window is None:
            return super().get_mask_sizes(query_length)
        return window.columns.stop - window.columns.start, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.slots.left + super().get_seq_length()
        self.keys = self.slots.write((self.number, "keys"), key_states, start)
        self.values = self.slots.write((self.number, "values"), value_states, start)
        return self.keys, self.values

    def show(self) -> None:
        """Have the keys and values that are in sight."""
        self.keys, self.values = (self.slots.view((self.number, name), self.slots.stop) for name in ("keys", "values"))

    def hide(self) -> None:
        """Have none."""
        self.keys = self.values = None


class SlotHybridLayer(LinearAttentionAndFullAttentionLayer, SlotLayer):
    """A layer with states by row beside its keys and values."""

    def __init__(self, slots: Slots, number: int, number_of_states: int):
        super().__init__(number_of_states)
        self.slots, self.number = slots, number

    is_compileable = SlotLayer.is_compileable


def slot_cache(slots: Slots) -> Cache:
    """An empty cache of layers with keys and values, as many as a model turns out to have."""
    numbers = count()
    return Cache(layer_class_to_replicate=lambda: SlotLayer(slots, next(numbers)))


def slot_layers(slots: Slots, config) -> list:
    """Empty layers for a model with states: transformers' own, but for keys and values."""

    def of(number: int, layer):
        if not isinstance(layer, DynamicLayer):
            return layer
        if hasattr(layer, "number_of_states"):
            return SlotHybridLayer(slots, number, layer.number_of_states)
        return SlotLayer(slots, number)

    return [of(number, layer) for number, layer in enumerate(DynamicCache(config=config).layers)]
