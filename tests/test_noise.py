"""The counter-based noise: known answers, distribution and independence of the batch."""

import math

import pytest
import torch
from rows import chosen_seed
from scipy.stats import chisquare

from qstar_kernels.noise import GROUP_STREAM, TOKEN_STREAM, gumbel, philox
from qstar_kernels.reference import draw

ONES = 0xFFFFFFFF


def words_of(counter, key) -> tuple[int, ...]:
    """The four words of one counter."""
    even, odd = philox(tuple(torch.tensor([[c]]) for c in counter), tuple(torch.tensor([[k]]) for k in key))
    return int(even[0]), int(odd[0]), int(even[1]), int(odd[1])


# Known answers of Random123's kat_vectors for philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert words_of(counter, key) == words


def test_gumbel_of_the_documented_counter():
    """A variable made by hand from Philox's words: even ids take words 0 and 1, odd ids 2 and 3."""
    seed, position, first = 0x123456789ABCDEF0 - 2**63, 2**33 + 5, 4098
    got = gumbel(torch.tensor([seed]), torch.tensor([position]), torch.tensor([first]), 3, TOKEN_STREAM)[0]
    for column in range(3):
        half, odd = divmod(first + column, 2)
        counter = (half, position & ONES, position >> 32, TOKEN_STREAM)
        key = (seed & ONES, (seed >> 32) & ONES)
        high, low = words_of(counter, key)[2 * odd : 2 * odd + 2]
        u = ((high << 32 | low) + 0.5) / 2**64
        assert got[column].item() == pytest.approx(-math.log(-math.log1p(-u)), abs=1e-12)


def test_gumbel_distribution():
    """Moments and both tails of 4M draws against the exact values, each within 5 standard errors: a false alarm for
    about one seed in 300,000."""
    seed = chosen_seed()
    rows, count = 512, 8192
    parts = []
    for start in range(0, rows, 64):
        seeds = seed + torch.arange(start, start + 64)
        parts.append(gumbel(seeds, torch.zeros_like(seeds), torch.zeros_like(seeds), count, TOKEN_STREAM))
    g = torch.cat(parts).flatten()
    n = g.numel()
    euler, variance = 0.5772156649015329, math.pi**2 / 6
    assert g.isfinite().all()
    assert abs(g.mean().item() - euler) < 5 * math.sqrt(variance / n)
    # the fourth central moment is 5.4 variances squared
    assert abs(g.var().item() - variance) < 5 * variance * math.sqrt(4.4 / n)
    for threshold in (6.0, 12.0):
        expected = n * -math.expm1(-math.exp(-threshold))
        assert abs((g > threshold).sum().item() - expected) < 5 * math.sqrt(expected)
    expected = n * math.exp(-math.exp(2.5))  # P(G < −2.5)
    assert abs((g < -2.5).sum().item() - expected) < 5 * math.sqrt(expected)


def test_nearly_flat_at_4_million_draws():
    """χ² of 4M Gumbel-max draws over 33 nearly equal tokens, p > 0.001: a false alarm for one seed in 1,000."""
    seed, tokens, step = chosen_seed(), 33, 100_000
    q = (0.001 * torch.arange(tokens, dtype=torch.float64)).softmax(-1)
    counts = torch.zeros(tokens)
    for first in range(0, 4_000_000, step):
        seeds = seed + torch.arange(first, first + step)
        zeros = torch.zeros_like(seeds)
        drawn = (q.log() + gumbel(seeds, zeros, zeros, tokens, TOKEN_STREAM)).argmax(-1)
        counts += torch.bincount(drawn, minlength=tokens)
        if first == 0:  # the sampler's own draw, whose one group always wins, is the same
            assert torch.equal(draw(q.log().expand(100, -1), seeds[:100], zeros[:100]), drawn[:100])
    assert chisquare(counts, q * 4_000_000).pvalue > 0.001


def test_gumbel_belongs_to_the_token():
    """The same bits whatever is drawn beside it, and other bits for another seed, position, stream or id."""
    seeds, positions = torch.arange(64) * 7919 - 99, torch.arange(64) * 2**31
    first = torch.arange(64) * 1024
    together = gumbel(seeds, positions, first, 1024, TOKEN_STREAM)
    for i in (0, 31, 63):
        row = slice(i, i + 1)
        assert torch.equal(gumbel(seeds[row], positions[row], first[row], 1024, TOKEN_STREAM), together[row])
        assert torch.equal(gumbel(seeds[row], positions[row], first[row] + 16, 7, TOKEN_STREAM)[0], together[i, 16:23])
    every = torch.cat((together.flatten(), gumbel(seeds, positions, first, 1024, GROUP_STREAM).flatten()))
    assert every.unique().numel() == every.numel()
