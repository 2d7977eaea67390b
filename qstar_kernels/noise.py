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


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., 2011) of int64 tensors [B, P] (or [B, 1]) of 32-bit words.

    Returns:
        words 0 and 2, and words 1 and 3: int64 [2, B, P] each.
    """
    # Both halves of a round in one operation: rows of «even» are c0 and c2, rows of «odd» c1 and c3. A round crosses
    # the halves over, so in every second round all of them are held in the opposite order.
    even, odd = torch.stack(torch.broadcast_tensors(counter[0], counter[2])), torch.stack((counter[1], counter[3]))
    mask = even.new_tensor(_MASK)
    factors = even.new_tensor([0xD2511F53, 0xCD9E8D57])[:, None, None]
    factors = (factors, factors.flip(0))
    rounds = torch.arange(10, device=even.device)[:, None, None]
    keys = torch.stack([key[0] + rounds * 0x9E3779B9, key[1] + rounds * 0xBB67AE85], dim=1) & mask  # [10, 2, B, 1]
    keys = torch.stack((keys[::2].flip(1), keys[1::2]), dim=1).flatten(0, 1)
    for i, round_key in enumerate(keys.unbind()):
        # int64 products wrap, which leaves all 64 bits right; the odd words keep their upper half until it is masked
        # with the next sum
        product = even * factors[i % 2]
        even = (product >> 32).bitwise_xor_(odd.flip(0).bitwise_xor_(round_key)).bitwise_and_(mask)
        odd = product
    return even, odd.bitwise_and_(mask)


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
    high, low = philox(
        (
            first_id[:, None] // 2 + pairs,
            positions & _MASK,
            (positions >> 32) & _MASK,
            torch.full_like(positions, stream),
        ),
        (seeds & _MASK, (seeds >> 32) & _MASK),
    )  # [2, B, P], even ids before odd ones
    # The upper half of the uniforms goes through its complement, whose bits are the inverted ones: u and 1 - u are then
    # both exact where they are small, so neither tail of the noise is cut off.
    upper = high >= 1 << 31
    inversion = (high >> 31).mul_(_MASK)
    high, low = high.bitwise_xor_(inversion), low.bitwise_xor_(inversion)
    u = (high.double() * 2.0**-32).add_((low.double() + 0.5).mul_(2.0**-64))  # (0, 0.5]
    exponential = torch.where(upper, u.log(), torch.log1p(-u)).neg_()
    return exponential.log_().neg_().permute(1, 2, 0).flatten(1)[:, :count]
