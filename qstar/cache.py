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
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from qstar.rope import Ropes
from qstar.time_steps import TimeSteps

PREFILL_COLUMNS = 1024  # of a prompt in one forward pass: a longer one takes several, so that memory does not grow


# by model, as each takes a look at its configuration or a few passes
_kept: WeakKeyDictionary[torch.nn.Module, set[str]] = WeakKeyDictionary()
_own_caches: WeakKeyDictionary[torch.nn.Module, type[Cache] | None] = WeakKeyDictionary()
_continues: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


class RoomyLayer(DynamicLayer):
    """Keys and values in memory with room for more tokens: a step writes its own columns and does not copy the rest."""

    def __init__(self):
        super().__init__()
        self._room: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, cached: Tensor, new: Tensor) -> Tensor:
        start = cached.shape[2] if cached.numel() else 0
        stop = start + new.shape[2]
        room = self._room.get(name)
        # where rows were dropped, joined or moved, what is cached lies elsewhere
        if room is None or room.shape[2] < stop or (start and room.data_ptr() != cached.data_ptr()):
            room = new.new_empty(*new.shape[:2], stop + stop // 8 + 64, new.shape[3])
            if start:
                room[:, :, :start] = cached
            self._room[name] = room
        room[:, :, start:stop] = new
        return room[:, :, :stop]


class RoomyHybridLayer(LinearAttentionAndFullAttentionLayer, RoomyLayer):
    """A layer with states by row beside its keys and values."""

    def __init__(self, number_of_states: int):
        super().__init__(number_of_states)
        self._room = {}


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


def with_room(layer):
    """An empty layer of transformers' own cache, or in its place one that holds all its tokens, with room for more."""
    if not isinstance(layer, DynamicLayer):
        return layer
    return RoomyHybridLayer(layer.number_of_states) if hasattr(layer, "number_of_states") else RoomyLayer()


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


def new_cache(model: torch.nn.Module) -> Cache:
    """An empty cache that keeps all tokens of all layers.

    Without the model's config every layer of transformers' cache does. Sliding-window layers would drop old columns,
    counted from the padded start, and rows of different age could not be joined; the window is then applied by the
    attention mask, which gives the same numbers. With states it is of the class that the model makes for itself.
    """
    if "states" not in kept(model):
        return Cache(layer_class_to_replicate=RoomyLayer)
    cache = own_cache(model)()
    for states in lists_of(cache):
        states[:] = [None] * model.config.get_text_config().num_hidden_layers
    cache.layers = [with_room(layer) for layer in DynamicCache(config=model.config).layers]
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
            cache = {cache_argument(model): new_cache(model)}
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
        cache: of every layer its keys and values, [B · copies, heads, L, head_dim] each, its states, [B · copies, …]
            each, or both.
        forgets: whether tokens will be forgotten; False until it is set. States are then noted before each `advance`.
        noted: of each `advance` since tokens were forgotten, the number of columns before it and the states.
        ids: int64 [B · copies, L], the token of each cached column, −1 on a row's left padding.
        lengths: tokens cached for each row, also the position id of its next token.
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
        self.forgets = False
        self._clear()

    def _clear(self) -> None:
        """Hold nothing."""
        self.cache = new_cache(self.model)
        self.noted: list[tuple[int, list[Tensor]]] = []
        self.ids = torch.empty(0, 0, dtype=torch.int64, device=self.device)
        self.lengths: list[int] = []
        self.long: list[bool] = []

    def _forward(self, columns: slice, positions: Tensor, keep: int) -> tuple[Tensor, ...]:
        """Read these columns of `ids`, those before them being cached, at positions [B · copies, columns]: the logits
        [B, keep, V] of the last ones, for each copy."""
        if self.ropes.limit is not None and max(self.lengths) > self.ropes.limit:
            raise ValueError(
                f"a row has {max(self.lengths)} tokens; with dynamic NTK RoPE a model is defined for up to "
                f"{self.ropes.limit}, its max_position_embeddings"
            )
        ids = self.ids[:, : columns.stop]
        extra = {"position_ids": positions} if self.takes_positions else {}
        extra |= {"logits_to_keep": keep} if self.takes_logits_to_keep else {}
        # what looks back at no column wants the mask of those it reads
        mask = (ids if self.has_columns else ids[:, columns]) >= 0
        with self.ropes.of_rows(self.long), self.time_steps.limited():
            out = self.model(
                input_ids=ids[:, columns].masked_fill(ids[:, columns] < 0, self.pad_id),
                attention_mask=mask.long(),
                use_cache=True,
                **{self.takes_cache: self.cache},
                **extra,
            ).logits[:, -keep:]
        return tuple(out[copy :: self.copies] for copy in range(self.copies))

    def prompts(self, requests: Iterable) -> list[list[int]]:
        """`ids_theta` or `ids_t` of the requests, or both of each, as this side sees them."""
        return [getattr(request, f"ids_{name}") for request in requests for name in self.sees]

    def prefill(self, prompts: list[list[int]], ahead: int = 0) -> tuple["Side", tuple[Tensor, ...]]:
        """Run prompts in a batch of their own: a `Side` that holds them, and the logits [B, 1, V] that follow, for each
        copy. Rows are read as part of sequences that are `ahead` tokens longer."""
        new = copy(self)
        new._clear()
        width = max(map(len, prompts))
        new.ids = torch.tensor([[-1] * (width - len(p)) + p for p in prompts], device=self.device)
        new.lengths = [len(p) for p in prompts]
        new.long = [self.ropes.is_long(n + ahead) for n in new.lengths]
        positions = ((new.ids >= 0).cumsum(-1) - 1).clamp(min=0)
        piece = PREFILL_COLUMNS if self.continues else width
        for start in range(0, width, piece):
            columns = slice(start, min(start + piece, width))
            logits = new._forward(columns, positions[:, columns], 1)
        return new, logits

    def advance(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Append tokens, int64 [B, K], to every row: the logits [B, K, V] that follow each of them, for each copy."""
        tokens = tokens.to(self.device)
        if self.copies > 1:
            tokens = tokens.repeat_interleave(self.copies, 0)  # [B · copies, K]
        if self.forgets and self.has_states:
            self.noted.append((self.ids.shape[1], [state.clone() for state in self._states()]))
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
        positions = torch.tensor(self.lengths, device=self.device)[:, None] + torch.arange(count, device=self.device)
        self.ids = torch.cat([self.ids, tokens], 1)
        self.lengths = [n + count for n in self.lengths]
        return self._forward(slice(self.ids.shape[1] - count, self.ids.shape[1]), positions, count)

    def _read_again(self, row: int, ahead: int) -> None:
        """Compute what is cached of a row anew, with the frequencies of a sequence that is `ahead` tokens longer."""
        n = self.lengths[row]
        new, _ = self.prefill([self.ids[row, -n:].tolist()], ahead)
        for mine, theirs in zip(self._columns(), new._columns(), strict=True):
            mine.keys[row, :, -n:], mine.values[row, :, -n:] = theirs.keys[0], theirs.values[0]
        self._put_states([row], new._states())
        self.long[row] = new.long[0]

    def _columns(self) -> list[DynamicLayer]:
        """The layers that hold keys and values; one that shares another one's has none of its own."""
        return [layer for layer in self.cache.layers if isinstance(layer, DynamicLayer) and layer.get_seq_length()]

    def _states(self) -> list[Tensor]:
        """The states of all layers, [B · copies, …] each."""
        return [holder[key] for holder, key in places_of(self.cache)]

    def _put_states(self, rows: list[int], states: list[Tensor]) -> None:
        """Give these rows other states."""
        for mine, theirs in zip(self._states(), states, strict=True):
            mine[rows] = theirs

    def _replace(self, change) -> None:
        """Every layer's keys and values by `change` of them."""
        for layer in self._columns():
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    def _put_back(self, counts: list[int]) -> None:
        """Put every row's states back to what they were before its newest `counts[i]` columns: to those noted last
        before that point, from where the tokens that stay are read once more."""
        width = self.ids.shape[1]
        groups = defaultdict(list)  # rows, by what was noted and the columns to read from there
        for row, count in enumerate(counts):
            if count:
                at = max(i for i, (columns, _) in enumerate(self.noted) if columns <= width - count)
                groups[at, width - count - self.noted[at][0]].append(row)
        for (at, count), rows in groups.items():
            columns, states = self.noted[at]
            states = [state[rows] for state in states]
            if count:
                part = self._before(rows, columns, states)
                part._append(self.ids[rows, columns : columns + count])
                states = part._states()
            self._put_states(rows, states)
        self.noted = []

    def _before(self, rows: list[int], columns: int, states: list[Tensor]) -> "Side":
        """A `Side` of these rows as they were when there were so many columns, with their states at that point."""
        part, newer = copy(self), self.ids.shape[1] - columns
        part.cache = copy(self.cache)
        part.cache.layers = [copy(layer) for layer in self.cache.layers]
        for holder in (part.cache, *part.cache.layers):
            vars(holder).update({name: copy(x) for name, x in vars(holder).items() if isinstance(x, (dict, list))})
        part.ids = self.ids[:, :columns]
        part.lengths = [n - newer for n in self.lengths]
        part._replace(lambda x: x[:, :, :columns])
        part._take(rows)
        part._put_states(list(range(len(rows))), states)
        return part

    def forget(self, counts: list[int]) -> None:
        """Drop the newest `counts[i]` columns of row i; all rows end at the last column again."""
        counts = [n for n in counts for _ in range(self.copies)]
        if self.has_states:
            self._put_back(counts)
        fewest = min(counts)
        width = self.ids.shape[1] - fewest
        self.lengths = [n - count for n, count in zip(self.lengths, counts, strict=True)]
        if max(counts) == fewest:
            if fewest:
                self.ids = self.ids[:, :width]
                self._replace(lambda x: x[:, :, :width])
            return
        shift = torch.tensor(counts, device=self.device)[:, None] - fewest
        source = torch.arange(width, device=self.device) - shift  # [B, width], negative on new padding
        padding, source = source < 0, source.clamp(min=0)
        self.ids = self.ids.gather(1, source).masked_fill(padding, -1)
        source = source[:, None, :, None]
        self._replace(lambda x: x.take_along_dim(source.to(x.device), 2))

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but these, and the columns that are padding in all that stay."""
        self._take([row * self.copies + copy for row in rows for copy in range(self.copies)])

    def _take(self, rows: list[int]) -> None:
        """`keep` by cache rows."""
        self.lengths, self.long = [self.lengths[i] for i in rows], [self.long[i] for i in rows]
        start = self.ids.shape[1] - max(self.lengths, default=0)
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.ids = self.ids[index, start:]
        self._replace(lambda x: x[index.to(x.device), :, start:])
        for holder, key in places_of(self.cache):
            holder[key] = holder[key][index.to(holder[key].device)]

    def join(self, other: "Side") -> None:
        """Take over the rows of `other`, behind this side's own."""
        if not self.lengths:
            self.cache, self.ids, self.lengths, self.long = other.cache, other.ids, other.lengths, other.long
            return
        width = max(self.ids.shape[1], other.ids.shape[1])

        def widened(x: Tensor, dim: int, value: int = 0) -> Tensor:
            missing = width - x.shape[dim]
            return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (missing, 0), value=value) if missing else x

        self.ids = torch.cat([widened(self.ids, 1, -1), widened(other.ids, 1, -1)])
        for mine, theirs in zip(self._columns(), other._columns(), strict=True):
            mine.keys = torch.cat([widened(mine.keys, 2), widened(theirs.keys, 2)])
            mine.values = torch.cat([widened(mine.values, 2), widened(theirs.values, 2)])
        for (holder, key), state in zip(places_of(self.cache), other._states(), strict=True):
            holder[key] = torch.cat([holder[key], state])
        self.lengths += other.lengths
        self.long += other.long
