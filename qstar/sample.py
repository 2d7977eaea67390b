"""What every backend is asked for, and what it gives: requests, options, samples and their end."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from qstar.speculate import Tally
from qstar_kernels import QStarStep, Status
from qstar_kernels.types import FIELDS, Settings


@dataclass(frozen=True)
class Request:
    """One sequence to generate: both prompts in token ids, its 64-bit seed, and the token limit it has room for."""

    key: Any
    ids_theta: list[int]
    ids_t: list[int]
    seed: int
    max_new_tokens: int


@dataclass
class Sample:
    """A finished sequence.

    `finish_reason` is `eos` (of either model), `stop` (a stop string or token), `length`, or `error` with the reason in
    `error`. `token_ids` holds every drawn token, EOS included; `text` leaves out special tokens, unless they are kept,
    and ends before the EOS, the stop token or the stop string.
    `fields` has one number a token for each of `FIELDS` (see `qstar_kernels.QStarStep`), `status` one code a token;
    `tally` says what came of the drafts.
    """

    request: Request
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    error: str | None = None
    fields: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FIELDS})
    status: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def add(self, status: float, values: Iterable[float]) -> bool:
        """Add the numbers of the next token, or the reason why it has none; whether it has."""
        if status:  # not OK
            name = Status(int(status)).name.lower().replace("_", " ")
            self.error = f"token {len(self.status)} has no distribution: {name} (status {int(status)})"
            return False
        self.status.append(int(status))
        for of_field, value in zip(self.fields.values(), values, strict=True):
            of_field.append(value)
        return True

    def draw(self, token: float, status: float, values: Iterable[float]) -> bool:
        """Add the next token with its numbers, or the reason why there is none; whether there is."""
        drawn = self.add(status, values)
        if drawn:
            self.token_ids.append(int(token))
        return drawn


@dataclass(frozen=True)
class DecodeOptions:
    """How sequences are drawn, when they end and what of them is text.

    `batch_size` rows are decoded together, with `speculate` drafts a round, or `auto`. `force_t_first_token` draws the
    first token from π_t, `force_t_special_tokens` gives special tokens π_t's probability. `stop` and `stop_token_ids`
    end a sequence and are no part of its text; a special token in `stop` is matched by its id. `keep_special_tokens`
    leaves the others in the text. `cuda_graphs` is `auto`, or `off`: a GPU then records no steps (`qstar.graphs`).
    """

    settings: Settings = field(default_factory=Settings)
    batch_size: int = 16
    stop: tuple[str, ...] = ()
    speculate: int | str = 0
    force_t_first_token: bool = False
    force_t_special_tokens: bool = False
    stop_token_ids: tuple[int, ...] = ()
    keep_special_tokens: bool = False
    cuda_graphs: str = "auto"

    @classmethod
    def of(cls, **options) -> "DecodeOptions":
        """From its own fields but `settings`, and those of `Settings`, side by side."""
        own = {f.name: options.pop(f.name) for f in fields(cls) if f.name in options}
        own = {name: tuple(value) if name.startswith("stop") else value for name, value in own.items()}
        return cls(Settings(**options), **own)


class Ending:
    """When a sequence ends, and the text that it then has.

    Args:
        eos_ids: ids that end a sequence, of both models.
        tokenizer: turns ids into text; None leaves the text empty.
        options: `stop`, `stop_token_ids` and `keep_special_tokens` of them.

    Attributes:
        stop_ids: ids that end a sequence beside EOS: those given, and the special tokens of `stop`.
        stop: the strings of `stop` that end a sequence.

    Raises:
        ValueError: a stop string has a special token among other text, or a stop id is beyond the vocabulary.
    """

    def __init__(self, eos_ids: set[int], tokenizer, options: DecodeOptions):
        self.eos_ids, self.tokenizer, self.keep_special_tokens = eos_ids, tokenizer, options.keep_special_tokens
        special = special_tokens(tokenizer) if options.stop and tokenizer else {}
        self.stop_ids = set(options.stop_token_ids) | {special[stop] for stop in options.stop if stop in special}
        self.stop = tuple(stop for stop in options.stop if stop not in special)
        for stop in self.stop:
            if among := next((token for token in special if token in stop), None):
                raise ValueError(
                    f"stop {stop!r} has the special token {among!r} among other text; give the token alone"
                )
        if tokenizer and options.stop_token_ids:
            largest = max(tokenizer.get_vocab().values())
            if max(options.stop_token_ids) > largest:
                raise ValueError(f"stop token {max(options.stop_token_ids)} is beyond the vocabulary, up to {largest}")
        # every token is at least one byte of text or none (special), so a window of the stop's bytes and a few more
        # always covers a stop string that the newest token completes
        self.window = max((len(s.encode()) for s in self.stop), default=0) + 16

    def finish(self, sample: Sample) -> None:
        """Set the finish reason and the text if the newest token ends the sequence."""
        ids, by_token, stopped = sample.token_ids, False, False
        if sample.error is not None:
            sample.finish_reason = "error"
        elif by_token := ids[-1] in self.eos_ids:
            sample.finish_reason = "eos"
        elif by_token := ids[-1] in self.stop_ids:
            sample.finish_reason = "stop"
        elif self.stops(ids):
            sample.finish_reason, stopped = "stop", True
        elif len(ids) >= sample.request.max_new_tokens:
            sample.finish_reason = "length"
        else:
            return
        sample.text = self._text(ids[:-1] if by_token else ids)
        if stopped:
            sample.text = sample.text[: min(self._stops_in(sample.text), default=len(sample.text))]

    def stops(self, ids: list[int]) -> bool:
        """Whether the newest token completes a stop string."""
        return bool(self.stop and self._stops_in(self._text(ids[-self.window :])))

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not self.keep_special_tokens) if self.tokenizer else ""

    def _stops_in(self, text: str) -> list[int]:
        return [text.index(stop) for stop in self.stop if stop in text]


def special_tokens(tokenizer) -> dict[str, int]:
    """The ids of the tokens that a text does not show where special tokens are left out."""
    special = set(tokenizer.all_special_ids)
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special or i in special}


def finite(value: float) -> float | None:
    """The value as JSON has it: null for −inf."""
    return float(value) if math.isfinite(value) else None


def numbers_of(step: QStarStep) -> Tensor:
    """Token, status and `FIELDS` of a step over N rows: float64 [N, 2 + F] on its device, where token ids are exact."""
    whole = torch.stack((step.token, step.status)).double()
    return torch.cat((whole, torch.stack(step.numbers()).double())).T.contiguous()
