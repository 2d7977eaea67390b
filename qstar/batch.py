"""The live rows of a batch on their device, and the numbers of a step on their way from there to the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qstar.sample import Sample
from qstar.slots import on

TOKEN, SEED, COUNT = range(3)  # of `Rows.state`


class Rows:
    """What the next step of live rows starts from: it is made by the step before, and the host need not know it.

    Attributes:
        samples: of each row; its tokens and numbers may be a step behind.
        state: int64 [3, B], each row's newest token, its seed, and how many tokens have been drawn.
    """

    def __init__(self, samples: list[Sample], device: torch.device):
        self.samples = samples
        seeds = [s.request.seed for s in samples]
        self.state = on(device, [[0] * len(seeds), seeds, [0] * len(seeds)])

    @property
    def tokens(self) -> Tensor:
        """The newest token of each row, int64 [B, 1]."""
        return self.state[TOKEN][:, None]

    def noise(self, device: torch.device, ahead: int = 0, count: int = 1) -> dict[str, Tensor]:
        """Seeds and positions of `count` tokens of each row from `ahead` of its next one, int64 [B · count] each."""
        seeds, positions = self.state[SEED], self.state[COUNT]
        if ahead:
            positions = positions + ahead
        if count > 1:
            seeds = seeds.repeat_interleave(count)
            positions = (positions[:, None] + torch.arange(count, device=positions.device)).flatten()
        return {"seeds": seeds.to(device, non_blocking=True), "positions": positions.to(device, non_blocking=True)}

    def draw(self, tokens: Tensor, drafted: Tensor | None) -> None:
        """Take over the tokens of a step, int64 [B, K], beside drafts of those before the last: up to the first that
        differs from its draft. A row that has no token is found out on the host."""
        tokens, count = tokens.clamp(min=0), 1
        if drafted is not None:
            right = (tokens[:, :-1] == drafted[:, : tokens.shape[1] - 1]).long().cumprod(1).sum(1)
            tokens, count = tokens.gather(1, right[:, None]), right + 1
        self.state[TOKEN] = tokens[:, 0]
        self.state[COUNT] += count

    def join(self, other: "Rows") -> None:
        """Take over other rows, behind these."""
        self.samples += other.samples
        self.state = torch.cat([self.state, other.state], 1)

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.samples[:] = [self.samples[row] for row in rows]
        self.state = self.state[:, on(self.state.device, rows)]


@dataclass
class Underway:
    """A step's numbers, which the device computes and sends while the host goes on.

    Args:
        samples: of its rows.
        tensors: on one device.
        then: what is left to do when they are there, given how many tokens each row has got and the other tensors.
    """

    samples: list[Sample]
    tensors: Sequence[Tensor]
    then: Callable[..., None] | None = None
    sent: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        device = self.tensors[0].device
        self.tensors = [x.to("cpu", non_blocking=True) for x in self.tensors]  # in pinned memory
        if device.type == "cuda":
            self.sent = torch.cuda.Event()
            self.sent.record(torch.cuda.current_stream(device))

    def read(self) -> list[list]:
        """The tensors as lists: the one place where the host waits."""
        if self.sent is not None:
            self.sent.synchronize()
        return [x.tolist() for x in self.tensors]
