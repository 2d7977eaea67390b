"""The cache of one model over the live rows of a batch: keys and values by column, recurrent states by row.

Rows are left-padded: every cached row ends at the last column, whatever its length. Rows join and leave, and forget
tokens that turn out not to belong to them. A recurrent or convolutional state has no columns and forgets nothing: it is
joined and kept along the batch, and where drafts may turn out wrong it is put back to what it was before them.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterable
from copy import copy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

from qstar.rope import Ropes
from qstar.slots import IDS, SlotLayer, Slots, Window, on, slot_cache, slot_layers
from qstar.time_steps import TimeSteps

PREFILL_COLUMNS = 1024  # of a prompt in one forward pass: a longer one takes several, so that memory does not grow


# by model, as each takes a look at its configuration or a few passes
_kept: WeakKeyDictionary[torch.nn.Module, set[str]] = WeakKeyDictionary()
_own_caches: WeakKeyDictionary[torch.nn.Module, type[Cache] | None] = WeakKeyDictionary()
_continues: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def check_mode(model: torch.nn.Module, name: str) -> None:
    """Refuse a model in training mode, or with a part of it that is.

    Raises:
        ValueError: it is; `name` is what the message calls it.
    """
    if any(module.training for module in model.modules()):
        raise ValueError(
            f"{name} is in training mode, where dropout and gradient checkpointing make other numbers of it; call its "
            "eval() first"
        )


def takes(model: torch.nn.Module, argument: str) -> bool:
    """Whether the model's forward pass takes an argument, which a subclass may hand on among its `**kwargs`."""
    # the class's own: a wrapper of the instance's forward, or of the whole model for adapters, hides the arguments
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    for kind in type(wrapped).__mro__:
        if "forward" in vars(kind):
            parameters = inspect.signature(kind.forward).parameters
            if argument in parameters:
                return True
            if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
                return False
    return False


def cache_argument(model: torch.nn.Module) -> str:
    """What the model's forward pass, and its output, call the cache."""
    return "cache_params" if takes(model, "cache_params") else "past_key_values"


def kept(model: torch.nn.Module) -> set[str]:
    """What the model's layers keep of the tokens they have read, by its configuration: `columns` of keys and values,
    `states` by row (recurrent or convolutional), or both."""
    if model not in _kept:
        layers = DynamicCache(config=model.config).layers
        kinds = {"columns": DynamicLayer, "states": LinearAttentionCacheLayerMixin}
        _kept[model] = {name for name, kind in kinds.items() if any(isinstance(layer, kind) for layer in layers)}
    return _kept[model]


@torch.inference_mode()
def own_cache(model: torch.nn.Module) -> type[Cache] | None:
    """The class of the cache that a model with states makes for itself; None if it makes none."""
    if model not in _own_caches:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
        cache = model(input_ids=ids, use_cache=True).get(cache_argument(model))
        _own_caches[model] = None if cache is None else type(cache)
    return _own_caches[model]


def new_cache(model: torch.nn.Module, slots: Slots) -> Cache:
    """An empty cache that keeps all tokens of all layers, keys and values in `slots`.

    Without the model's config every layer of transformers' cache does. Sliding-window layers would drop old columns,
    counted from the padded start, and rows of different age could not be joined; the window is then applied by the
    attention mask, which gives the same numbers. With states it is of the class that the model makes for itself.
    """
    if "states" not in kept(model):
        return slot_cache(slots)
    cache = own_cache(model)()
    for states in lists_of(cache):
        states[:] = [None] * model.config.get_text_config().num_hidden_layers
    cache.layers = slot_layers(slots, model.config)
    cache.layer_class_to_replicate = None
    return cache


def lists_of(cache: Cache) -> list[list]:
    """The lists of states by layer that a cache of a model's own has beside its layers (MiniMax)."""
    return [x for name, x in vars(cache).items() if isinstance(x, list) and name != "layers"]


def places_of(cache: Cache) -> list[tuple[dict | list, int]]:
    """Where the states of all layers are: what holds each of them, and its key in there; convolutional ones first."""
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
    holders = [layer.conv_states for layer in layers] + [layer.recurrent_states for layer in layers]
    places = [(holder, key) for holder in holders for key in holder]
    places += [(holder, key) for holder in lists_of(cache) for key in range(len(holder))]
    return [(holder, key) for holder, key in places if isinstance(holder[key], Tensor)]


def holds_tokens(cache) -> bool:
    """Whether anything has been read into a cache, whatever its class."""
    layers = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")]
    states = isinstance(cache, Cache) and places_of(cache)
    return bool(states) or any(layer.get_seq_length() for layer in layers)


@torch.inference_mode()
def continues(model: torch.nn.Module) -> bool:
    """Whether several tokens that a model reads at once go on from those before them.

    Keys and values do. Mamba and Jamba go on where they read one token, and begin anew where they read several.
    """
    if "states" not in kept(model):
        return True
    if model not in _continues:
        ids = torch.tensor([[1, 2, 3, 4, 3]], device=model.get_input_embeddings().weight.device)

        def logits(change: float) -> Tensor:
            slots = Slots()
            slots.move(1, 0, ids.shape[1])
            slots.begin(1)
            cache = {cache_argument(model): new_cache(model, slots)}
            model(input_ids=ids[:, :3], use_cache=True, **cache)
            holder, key = places_of(*cache.values())[-1]  # recurrent, if there is such a one, and of the last layer
            holder[key] += change
            return model(input_ids=ids[:, 3:], use_cache=True, **cache).logits

        _continues[model] = not torch.equal(logits(0.0), logits(1.0))
    return _continues[model]


class Side:
    """One model with its cache.

    Args:
        model: a decoder-only causal language model.
        pad_id: what padding is filled with; it is masked.
        sees: whose prompts the model goes over, of `theta` and `t`; both where one model stands for both sides, which
            then has two cache rows of each sequence, beside each other.

    Attributes:
        copies: cache rows of each sequence.
        expects: sequences that it will hold at once, for which memory is made together; 0 if that is not known.
        slots: the memory for keys and values, and the tokens of its columns.
        cache: of every layer its keys and values in `slots`, its states, [B · copies, …] each, or both.
        forgets: whether tokens will be forgotten; False until it is set. States are then noted before each `advance`.
        noted: of each `advance` since tokens were forgotten, the number of columns before it and the states.
        lengths: tokens cached for each cache row, also the position id of its next token.
        next: the same on the device, int64 [B · copies, 1]; while a prompt is read, negative before its first token.
        long: whether a row's keys were computed with the long frequencies of a LongRoPE (`qstar.rope`).

    Raises:
        ValueError: the model is in training mode, or has RoPE that `qstar.rope` refuses; while reading: a row is longer
            than its RoPE allows.
    """

    def __init__(self, model: torch.nn.Module, pad_id: int, sees: tuple[str, ...]):
        check_mode(model, f"the model of {' and '.join(sees)}")
        self.model, self.pad_id, self.sees, self.copies = model, pad_id, sees, len(sees)
        self.takes_positions, self.takes_logits_to_keep = (takes(model, x) for x in ("position_ids", "logits_to_keep"))
        self.device = model.get_input_embeddings().weight.device
        self.ropes, self.time_steps = Ropes(model), TimeSteps(model)
        self.has_states, self.has_columns = ("states" in kept(model), "columns" in kept(model))
        self.takes_cache, self.continues = cache_argument(model), continues(model)
        self.forgets, self.expects = False, 0
        self._clear()

    def _clear(self) -> None:
        """Hold nothing."""
        self.slots = Slots()
        self.cache = new_cache(self.model, self.slots)
        self.rooms: dict[int, Tensor] = {}  # for states, by their place
        self.noted: list[tuple[int, list[Tensor]]] = []
        self.lengths: list[int] = []
        self.next = on(self.device, [])[:, None]
        self.long: list[bool] = []

    def _forward(self, tokens: Tensor, keep: int) -> tuple[Tensor, ...]:
        """Read tokens, int64 [B · copies, K], −1 on padding, which `lengths` count in: the logits [B, keep, V] of the
        last ones, for each copy."""
        slots, longest, count = self.slots, max(self.lengths), tokens.shape[1]
        if self.ropes.limit is not None and longest > self.ropes.limit:
            raise ValueError(
                f"a row has {longest} tokens; with dynamic NTK RoPE a model is defined for up to "
                f"{self.ropes.limit}, its max_position_embeddings"
            )
        slots.padded = min(self.lengths) < max(longest, slots.width + count)
        ids = slots.write(IDS, tokens[:, None, :, None], slots.stop)
        positions = self.next if count == 1 else self.next + torch.arange(count, device=self.device)
        mask = None
        if slots.padded:
            mask = (ids >= 0)[:, 0, :, 0].long()
            if not self.has_columns:  # what looks back at no column wants the mask of those it reads
                mask = mask[:, -count:]
            if keep < count:  # of prompts: what is read later is no padding
                positions, tokens = positions.clamp(min=0), tokens.masked_fill(tokens < 0, self.pad_id)
        with self.ropes.of_rows(self.long), self.time_steps.limited():
            logits = self._logits(tokens, mask, positions, keep)
        slots.stop += count
        self.next = self.next + count
        return logits

    def _logits(self, tokens: Tensor, mask: Tensor | None, positions: Tensor, keep: int) -> tuple[Tensor, ...]:
        """Of a forward pass: `keep` of the last columns' for each copy, [B, keep, V]."""
        extra = {"position_ids": positions} if self.takes_positions else {}
        extra |= {"logits_to_keep": keep} if self.takes_logits_to_keep else {}
        out = self.model(
            input_ids=tokens, attention_mask=mask, use_cache=True, **{self.takes_cache: self.cache}, **extra
        ).logits[:, -keep:]
        return tuple(out[copy :: self.copies] for copy in range(self.copies))

    def prompts(self, requests: Iterable) -> list[list[int]]:
        """`ids_theta` or `ids_t` of the requests, or both of each, as this side sees them."""
        return [getattr(request, f"ids_{name}") for request in requests for name in self.sees]

    def prefill(self, prompts: list[list[int]], ahead: int = 0) -> tuple[Tensor, ...]:
        """Read prompts in a batch of their own, into the slots behind this side's rows: the logits [B, 1, V] that
        follow, for each copy. Rows are read as part of sequences that are `ahead` tokens longer."""
        rows, count, width = len(self.lengths), len(prompts), max(map(len, prompts))
        slots = max(rows + count, self.expects * self.copies)
        new = copy(self) if rows else self
        if rows:
            self._fit(slots, width, 1)
            new.slots = self.slots.part(count, width)
        else:
            self.slots.begin(0)
            self._fit(slots, 0, width + 1)
            self.slots.begin(count)
        new.cache = new_cache(self.model, new.slots)
        new.lengths, new.next = [len(p) for p in prompts], on(self.device, [len(p) - width for p in prompts])[:, None]
        new.long = [self.ropes.is_long(n + ahead) for n in new.lengths]
        ids = on(self.device, [[-1] * (width - len(p)) + p for p in prompts])
        for piece in ids.split(PREFILL_COLUMNS if self.continues else width, 1):
            logits = new._forward(piece, 1)
        if rows:
            for i, ((holder, key), state) in enumerate(zip(places_of(self.cache), new._states(), strict=True)):
                holder[key] = self._joined(i, holder[key], state, slots)
            self.lengths += new.lengths
            self.long += new.long
            self._see(max(self.slots.width, width))
        return logits

    def _joined(self, place: int, states: Tensor, new: Tensor, slots: int) -> Tensor:
        """States [B · copies, …] with those of new rows behind, in memory with room for `slots` rows."""
        count, room = len(states), self.rooms.get(place)
        if room is None or len(room) < count + len(new):
            room = self.rooms[place] = states.new_empty(slots, *states.shape[1:])
        if room.data_ptr() != states.data_ptr():  # they are of a batch's first rows, or a model has made new ones
            room[:count] = states
        room[count : count + len(new)] = new
        return room[: count + len(new)]

    def _fit(self, slots: int, before: int, after: int) -> None:
        """Have memory for so many rows, and for so many columns up to the last one and from there."""
        if not self.slots.fit(slots, before, after):
            layers = self._columns()
            for layer in layers:
                layer.hide()  # the old memory of each is free as soon as it has moved
            self.slots.move(slots, before, after)
            for layer in layers:
                layer.show()

    def _see(self, width: int) -> None:
        """Have the last columns of the rows in sight."""
        self.slots.see(len(self.lengths), width)
        self.next = on(self.device, self.lengths)[:, None]
        for layer in self._columns():
            layer.show()

    def advance(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Append tokens, int64 [B, K], to every row: the logits [B, K, V] that follow each of them, for each copy."""
        tokens = tokens.to(self.device, non_blocking=True)
        if self.copies > 1:
            tokens = tokens.repeat_interleave(self.copies, 0)  # [B · copies, K]
        if self.forgets and self.has_states:
            self.noted.append((self.slots.width, [state.clone() for state in self._states()]))
        return self._append(tokens)

    def _append(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """`advance` by a column of each cache row, int64 [B · copies, K]."""
        count, switch = tokens.shape[1], self.ropes.switch
        if count > 1 and not self.continues:
            parts = [self._append(column) for column in tokens.split(1, 1)]
            return tuple(torch.cat(of_copy, 1) for of_copy in zip(*parts, strict=True))
        if switch is not None:
            short = min((switch - n for n in self.lengths if n < switch), default=count)
            if short < count:  # rows change their frequencies between forward passes only
                parts = self._append(tokens[:, :short]), self._append(tokens[:, short:])
                return tuple(torch.cat(of_copy, 1) for of_copy in zip(*parts, strict=True))
            for row, n in enumerate(self.lengths):
                if self.ropes.is_long(n + count) != self.long[row]:
                    self._read_again(row, count)
        self._fit(len(self.lengths), self.slots.width, count)
        self.lengths = [n + count for n in self.lengths]
        return self._forward(tokens, count)

    def wide(self, rows: int, columns: int) -> tuple[slice, slice]:
        """Memory of so many sequences, from what is in sight to the next token, in whole multiples of columns: which
        slots and columns. There is room for a token then."""
        self._fit(rows * self.copies, self.slots.width, 1)
        stop = min(-(-(self.slots.stop + 1) // columns) * columns, self.slots.size[1])
        return slice(0, rows * self.copies), slice(self.slots.left // columns * columns, stop)

    def see_in(self, window: Window) -> None:
        """Have the window hold what the rows are by now, and padding beside it."""
        self.slots.clear(window.rows, window.columns)
        window.at.fill_(self.slots.stop - window.columns.start)
        window.next.zero_()[: len(self.lengths)] = on(self.device, self.lengths)[:, None]
        self.next = window.next[: len(self.lengths)]

    def advance_in(self, window: Window, tokens: Tensor) -> tuple[Tensor, ...]:
        """`advance` by one token, int64 [rows, 1], in which nothing depends on the host; `advanced` tells it after
        that."""
        if self.copies > 1:
            tokens = tokens.repeat_interleave(self.copies, 0)
        slots = self.slots
        slots.window, slots.padded = window, True
        try:
            ids = slots.write(IDS, tokens[:, None, :, None], slots.stop)
            logits = self._logits(tokens, (ids >= 0)[:, 0, :, 0].long(), window.next, 1)
        finally:
            slots.window = None
        window.at.add_(1)
        window.next.add_(1)
        return logits

    def advanced(self) -> None:
        """A token has been read in a window."""
        self.slots.stop += 1
        self.lengths = [n + 1 for n in self.lengths]

    def look(self) -> None:
        """Have the rows in sight again, after tokens have been read in a window."""
        for layer in self._columns():
            layer.show()

    def _read_again(self, row: int, ahead: int) -> None:
        """Compute what is cached of a row anew, with the frequencies of a sequence that is `ahead` tokens longer."""
        n, alone = self.lengths[row], copy(self)
        alone._clear()
        alone.expects = 0
        alone.prefill([self.slots.ids[row, -n:].tolist()], ahead)
        self.slots.put(row, n, alone.slots, 0)
        self._put_states([row], alone._states())
        self.long[row] = alone.long[0]

    def _columns(self) -> list[SlotLayer]:
        """The layers that hold keys and values; one that shares another one's has none of its own."""
        return [layer for layer in self.cache.layers if isinstance(layer, SlotLayer) and layer.is_initialized]

    def _states(self) -> list[Tensor]:
        """The states of all layers, [B · copies, …] each."""
        return [holder[key] for holder, key in places_of(self.cache)]

    def _put_states(self, rows: list[int], states: list[Tensor]) -> None:
        """Give these rows other states."""
        for mine, theirs in zip(self._states(), states, strict=True):
            mine[rows] = theirs

    def _put_back(self, counts: list[int]) -> None:
        """Put every row's states back to what they were before its newest `counts[i]` columns: to those noted last
        before that point, from where the tokens that stay are read once more."""
        width = self.slots.width
        groups = defaultdict(list)  # rows, by what was noted and the columns to read from there
        for row, count in enumerate(counts):
            if count:
                at = max(i for i, (columns, _) in enumerate(self.noted) if columns <= width - count)
                groups[at, width - count - self.noted[at][0]].append(row)
        for (at, count), rows in groups.items():
            columns, states = self.noted[at]
            states = [state[rows] for state in states]
            if count:
                tokens = self.slots.ids[rows, columns : columns + count]
                part = self._before(rows, columns, states)
                part._append(tokens)
                states = part._states()
            self._put_states(rows, states)
        self.noted = []

    def _before(self, rows: list[int], columns: int, states: list[Tensor]) -> "Side":
        """A `Side` of these rows as they were when there were so many columns, with their states at that point."""
        part, newer = copy(self), self.slots.width - columns
        part.slots = self.slots.taken(on(self.device, rows), columns)
        part.cache = copy(self.cache)
        part.cache.layers = [copy(layer) for layer in self.cache.layers]
        for holder in (part.cache, *part.cache.layers):
            vars(holder).update({name: copy(x) for name, x in vars(holder).items() if isinstance(x, (dict, list))})
        for layer in part._columns():
            layer.slots = part.slots
        for (holder, key), state in zip(places_of(part.cache), states, strict=True):
            holder[key] = state
        part.lengths, part.long = [self.lengths[row] - newer for row in rows], [self.long[row] for row in rows]
        part._see(max(part.lengths))
        return part

    def forget(self, counts: list[int]) -> None:
        """Drop the newest `counts[i]` columns of row i; all rows end at the last column again."""
        counts = [n for n in counts for _ in range(self.copies)]
        if self.has_states:
            self._put_back(counts)
        fewest = min(counts)
        self.lengths = [n - count for n, count in zip(self.lengths, counts, strict=True)]
        self.slots.stop -= fewest
        if max(counts) > fewest:
            self.slots.shift(on(self.device, counts) - fewest)
        self._see(self.slots.width)

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but these: row i is then what was row `rows[i]`, i or one behind it
        (`qstar.slots.closed_up`)."""
        states = self._states()
        for row, source in enumerate(rows):
            for i in range(self.copies if row != source else 0):
                to, of = row * self.copies + i, source * self.copies + i
                self.slots.put(to, self.slots.width, self.slots, of)
                self.lengths[to], self.long[to] = self.lengths[of], self.long[of]
                for state in states:
                    state[to] = state[of]
        count = len(rows) * self.copies
        del self.lengths[count:], self.long[count:]
        for holder, key in places_of(self.cache):
            holder[key] = holder[key][:count]
        self._see(max(self.lengths, default=0))
