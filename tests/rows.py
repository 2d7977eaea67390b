"""Pairs of logit rows that are hard on a solver or a sampler, by name."""

import os

import torch
from torch import Tensor

from qstar_kernels import QStarStep
from qstar_kernels.reference import make_pair
from qstar_kernels.types import NAMES, OF_TOKEN, mask_of

VOCAB_SIZES = (1, 2, 999, 1024, 4097, 50257, 151936)
INF = torch.inf


def zipf_pair(rows: int, vocab_size: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float32 [rows, vocab_size] each: −1.1 log(rank) in shuffled order, and the same plus normal noise."""
    g = torch.Generator().manual_seed(seed)
    rank = torch.stack([torch.randperm(vocab_size, generator=g) for _ in range(rows)])
    t = -1.1 * torch.log1p(rank.float()) + torch.randn(rows, vocab_size, generator=g)
    return t + noise * torch.randn(rows, vocab_size, generator=g), t


def table(vocab_size: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Usable pairs of rows, float32 [vocab_size] each."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(vocab_size, generator=g)

    def one_hot(i: int, height: float) -> Tensor:
        row = normal()
        row[i % vocab_size] += height
        return row

    def masked(row: Tensor, value: float, share: float) -> Tensor:
        hit = torch.rand(vocab_size, generator=g) < share
        hit[0] = False
        return row.masked_fill(hit, value)

    pairs = {f"zipf {noise}": zipf_pair(1, vocab_size, noise, seed) for noise in (1e-2, 0.1, 0.5, 1, 2, 4, 8)}
    pairs = {name: (theta[0], t[0]) for name, (theta, t) in pairs.items()}
    row, low = normal(3), torch.finfo(torch.float32).min
    pairs |= {
        "random": (normal(3), normal(3)),
        "one-hot, same": (one_hot(3, 25), one_hot(3, 20)),
        "one-hot, different": (one_hot(3, 25), one_hot(70, 20)),
        "100 nats apart": (one_hot(3, 100), one_hot(70, 100)),
        "300 nats apart": (one_hot(3, 300), one_hot(1500, 300)),
        "identical": (row, row.clone()),
        "shifted": (row + 1000, row),
        "shifted and noisy": (normal() + 3000, normal() - 2000),
        "-inf in theta": (masked(normal(2), -INF, 0.5), normal(2)),
        "-inf in t": (normal(2), masked(normal(2), -INF, 0.9)),
        "-inf in both": (masked(normal(2), -INF, 0.5), masked(normal(2), -INF, 0.5)),
        "-inf but one": (masked(normal(2), -INF, 2), normal(2)),
        "finfo.min in theta": (masked(normal(2), low, 0.5), normal(2)),
        "finfo.min in both": (masked(row, low, 0.5), masked(row, low, 0.5)),
        "finfo.min but one": (masked(normal(2), low, 2), masked(normal(2), low, 2)),
    }
    return pairs


def unusable(vocab_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs that no token can be drawn from, by the name of their `Status`; [vocab_size] each, at least 2."""
    g = torch.Generator().manual_seed(1)
    theta, t = torch.randn(2, vocab_size, generator=g)
    even = torch.arange(vocab_size) % 2 == 0

    def with_last(row: Tensor, value: float) -> Tensor:
        return torch.cat((row[:-1], torch.tensor([value])))

    return {
        "NAN": (theta, with_last(t, torch.nan)),
        "POSITIVE_INFINITY": (with_last(theta, INF), t),
        "NO_SUPPORT": (theta, torch.full_like(t, -INF)),
        "DISJOINT": (theta.masked_fill(even, -INF), t.masked_fill(~even, -INF)),
    }


def chosen_seed() -> int:
    """The seed of a statistical test, fixed so that false alarms do not come and go; `QSTAR_TEST_SEED` sets another."""
    seed = int(os.environ.get("QSTAR_TEST_SEED", "1"))
    print("seed", seed)
    return seed << 32


def stacked(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    theta, t = zip(*pairs.values(), strict=True)
    return torch.stack(theta), torch.stack(t)


def equal_bits(x: QStarStep, y: QStarStep, rows=slice(None)) -> bool:
    """Equal to the last bit, NaN where NaN."""
    return all(torch.equal(getattr(x, f)[rows].nan_to_num(nan=7e7), getattr(y, f).nan_to_num(nan=7e7)) for f in NAMES)


def check_step(got: QStarStep, want: QStarStep, theta: Tensor, t: Tensor, names, **kwargs) -> None:
    """`got` is within the accuracy promised of the reference's `want`; `names` of the rows, `kwargs` of the call."""
    got = got.to(torch.float64)
    assert torch.equal(got.status, want.status)
    usable = (x.double().masked_fill(x <= mask_of(x.dtype), -INF) for x in (theta, t))
    curvature = make_pair(*usable, kwargs.get("temperature") or 1.0).curve(want.alpha)[3]
    size = torch.maximum(want.kl_theta, want.kl_t).clamp(min=1)
    symmetric = kwargs.get("method", "kl_symmetry") == "kl_symmetry"

    def far(x, y, bound) -> torch.Tensor:
        return ~((x == y) | ((x - y).abs() <= bound) | (x.isnan() & y.isnan()))

    wrong = {
        "alpha": far(got.alpha, want.alpha, 1e-5) & (curvature > 1e-6),
        "kl_theta": far(got.kl_theta, want.kl_theta, 1e-5 * size),
        "kl_t": far(got.kl_t, want.kl_t, 1e-5 * size),
        "gap": far(got.kl_theta - got.kl_t, want.kl_theta - want.kl_t, 1e-5 * size) & symmetric,
        "token": got.token != want.token,
    }
    for name in ("ess_theta", "ess_t"):  # below 1e-30 float32 has nothing to say
        x, y = (getattr(step, name).clamp(min=1e-30).log() for step in (got, want))
        wrong[name] = far(x, y, 1e-4)
    for name in OF_TOKEN:
        x, y = getattr(got, name), getattr(want, name)
        wrong[name] = far(x, y, 1e-5 * y.abs().clamp(min=1))
    hits = {n: [names[i] for i in w.nonzero()[:, 0].tolist()] for n, w in wrong.items() if w.any()}
    assert not hits
