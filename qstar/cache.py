"""The KV cache of one model over the live rows of a batch.

Rows are left-padded: every cached row ends at the last column, whatever its length. Rows join and leave, and forget
tokens that turn out not to belong to them.
"""

import inspect
from collections.abc import Iterable
from copy import copy

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from qstar.rope import Ropes

PREFILL_COLUMNS = 1024  # of a prompt in one forward pass: a longer one takes several, so that memory does not grow


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


class Side:
    """One model with its KV cache.

    Args:
        model: a decoder-only causal language model.
        pad_id: what padding is filled with; it is masked.
        sees: whose prompts the model goes over, of `theta` and `t`; both where one model stands for both sides, which
            then has two cache rows of each sequence, beside each other.

    Attributes:
        copies: cache rows of each sequence.
        cache: keys and values of all layers, [B · copies, heads, L, head_dim] each.
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
        self.ropes = Ropes(model)
        self._clear()

    def _clear(self) -> None:
        """Hold nothing."""
        # Without the model's config every layer keeps all its tokens. Sliding-window layers would drop old columns,
        # counted from the padded start, and rows of different age could not be joined; the window is then applied by
        # the attention mask, which gives the same numbers.
        self.cache = Cache(layer_class_to_replicate=RoomyLayer)
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
        with self.ropes.of_rows(self.long):
            out = self.model(
                input_ids=ids[:, columns].masked_fill(ids[:, columns] < 0, self.pad_id),
                attention_mask=(ids >= 0).long(),
                past_key_values=self.cache,
                use_cache=True,
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
        for start in range(0, width, PREFILL_COLUMNS):
            columns = slice(start, min(start + PREFILL_COLUMNS, width))
            logits = new._forward(columns, positions[:, columns], 1)
        return new, logits

    def advance(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Append tokens, int64 [B, K], to every row: the logits [B, K, V] that follow each of them, for each copy."""
        tokens = tokens.to(self.device)
        if self.copies > 1:
            tokens = tokens.repeat_interleave(self.copies, 0)  # [B · copies, K]
        return self._append(tokens)

    def _append(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """`advance` by a column of each cache row, int64 [B · copies, K]."""
        count, switch = tokens.shape[1], self.ropes.switch
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
        for mine, theirs in zip(self.cache.layers, new.cache.layers, strict=True):
            if mine.get_seq_length():
                mine.keys[row, :, -n:], mine.values[row, :, -n:] = theirs.keys[0], theirs.values[0]
        self.long[row] = new.long[0]

    def _replace(self, change) -> None:
        """Every layer's keys and values by `change` of them."""
        for layer in self.cache.layers:
            if layer.get_seq_length():  # a layer that shares another one's keys has none of its own
                layer.keys, layer.values = change(layer.keys), change(layer.values)

    def forget(self, counts: list[int]) -> None:
        """Drop the newest `counts[i]` columns of row i; all rows end at the last column again."""
        counts = [n for n in counts for _ in range(self.copies)]
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
        rows = [row * self.copies + copy for row in rows for copy in range(self.copies)]
        self.lengths, self.long = [self.lengths[i] for i in rows], [self.long[i] for i in rows]
        start = self.ids.shape[1] - max(self.lengths, default=0)
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.ids = self.ids[index, start:]
        self._replace(lambda x: x[index.to(x.device), :, start:])

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
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            if mine.get_seq_length():
                mine.keys = torch.cat([widened(mine.keys, 2), widened(theirs.keys, 2)])
                mine.values = torch.cat([widened(mine.values, 2), widened(theirs.values, 2)])
        self.lengths += other.lengths
        self.long += other.long
