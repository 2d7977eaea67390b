"""Noise that belongs to the token, not to the batch (theory/computation.md, «The draw»).

Every Gumbel variable is a pure function of (seed of the sequence, position, stream, id): Philox-4x32-10 with the key
`seed` and the counter `(id // 2, position, stream)`. Even ids take the first two of its four words, odd ids the last
two, so each variable is made of 64 random bits and both of its tails are right far beyond any probability that matters.
"""

import torch
from torch import Tensor

GROUP_SIZE = 1024  # consecutive ids a group of the two-level draw: part of the definition, not a tuning knob
GROUP_STREAM = 0  # the noise of the groups
TOKEN_STREAM = 1  # the noise of the tokens

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., 2011): four int64 tensors holding 32-bit words to four of the same shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, which leaves all 64 bits right: the upper word is what the shift and the mask keep
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (p1 >> 32) & _MASK ^ c1 ^ k0, (p0 >> 32) & _MASK ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def gumbel(seeds: Tensor, positions: Tensor, first_id: Tensor, count: int, stream: int) -> Tensor:
    """Standard Gumbel noise of `count` consecutive ids a row.

    Args:
        seeds: int64 [B], the seed of each sequence (all 64 bits count).
        positions: int64 [B], index of the token that is being drawn.
        first_id: int64 [B], even: the id that the first column belongs to.
        count: number of columns.
        stream: `GROUP_STREAM` or `TOKEN_STREAM`.

    Returns:
        float64 [B, count].
    """
    pairs = torch.arange((count + 1) // 2, device=seeds.device)  # [P]
    seeds, positions = seeds[:, None], positions[:, None]  # [B, 1]
    c0 = first_id[:, None] // 2 + pairs  # [B, P]
    words = philox(
        (c0, positions & _MASK, (positions >> 32) & _MASK, torch.full_like(positions, stream)),
        (seeds & _MASK, (seeds >> 32) & _MASK),
    )
    high = torch.stack((words[0], words[2]), dim=-1).flatten(1)[:, :count]  # [B, count]
    low = torch.stack((words[1], words[3]), dim=-1).flatten(1)[:, :count]
    # The upper half of the uniforms goes through its complement, whose bits are the inverted ones: u and 1 - u are then
    # both exact where they are small, so neither tail of the noise is cut off.
    upper = high >= 1 << 31
    high, low = torch.where(upper, _MASK - high, high), torch.where(upper, _MASK - low, low)
    u = high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64  # (0, 0.5]
    exponential = torch.where(upper, -u.log(), -torch.log1p(-u))
    return -exponential.log()
