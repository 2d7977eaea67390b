"""Pairs of logit rows that are hard on a solver or a sampler, by name."""

import os

import torch
from torch import Tensor

from qstar_kernels import QStarStep, qstar_sample
from qstar_kernels.noise import GROUP_SIZE, GROUP_STREAM, TOKEN_STREAM, gumbel
from qstar_kernels.reference import make_pair, qstar_reference
from qstar_kernels.types import NAMES, OF_TOKEN, Settings, mask_of

VOCAB_SIZES = (1, 2, 999, 1024, 4097, 50257, 151936)
INF = torch.inf


def zipf_pair(rows: int, vocab_size: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float32 [rows, vocab_size] each: −1.1 log(rank) in shuffled order, and the same plus normal noise."""
    g = torch.Generator().manual_seed(seed)
    rank = torch.stack([torch.randperm(vocab_size, generator=g) for _ in range(rows)])
    t = -1.1 * torch.log1p(rank.float()) + torch.randn(rows, vocab_size, generator=g)
    return t + noise * torch.randn(rows, vocab_size, generator=g), t


def near_ties(vocab_size: int, seed: int, noise: float = 1.0, **settings) -> tuple[Tensor, Tensor, Tensor]:
    """Two pairs of rows, float32 [2, V] each, whose two greatest keys of the draw (of groups, where there are several)
    lie as near together as float32 logits allow, the one ahead here and the other there; and by how much [2].

    One token's logits are moved by some units of their last places: among the many pairs of moves some bring the keys
    within 1e-8.
    """
    theta, t = (x.double() for x in zipf_pair(1, vocab_size, noise, seed))
    chosen, index = Settings(**settings), torch.zeros(1, dtype=torch.int64)
    groups = -(-vocab_size // GROUP_SIZE)
    stream, count = (GROUP_STREAM, groups) if groups > 1 else (TOKEN_STREAM, vocab_size)
    drawn = gumbel(index, index, index, count, stream) if chosen.temperature else torch.zeros(1, count)

    def keys(theta: Tensor, t: Tensor) -> Tensor:
        log_q = qstar_reference(theta, t, chosen, want_log_q=True)[1]
        if groups > 1:
            log_q = torch.nn.functional.pad(log_q, (0, groups * GROUP_SIZE - vocab_size), value=-INF)
            log_q = log_q.view(len(t), groups, GROUP_SIZE)
            log_q = log_q.logsumexp(-1) if chosen.temperature else log_q.amax(-1)
        return log_q + drawn

    first, second = keys(theta, t)[0].topk(2).indices.tolist()
    moved = second
    if groups > 1:
        ids = slice(second * GROUP_SIZE, (second + 1) * GROUP_SIZE)
        moved = second * GROUP_SIZE + int((theta + t)[0, ids].argmax())

    def ahead(theta: Tensor, t: Tensor) -> Tensor:
        key = keys(theta, t)
        return key[:, first] - key[:, second]

    for _ in range(20):  # secant steps
        there = t.clone()
        there[:, moved] += 1e-4
        gap = ahead(theta, t)
        t[:, moved] += (1e-4 * gap / (gap - ahead(theta, there))).clamp(-1, 1)
    steps = 10 if groups > 1 else 64
    theta, t = theta.float(), t.float()
    many = torch.arange(-steps, steps).float()
    units = [2.0**-23 * 2.0 ** x[0, moved].abs().log2().floor() for x in (theta, t)]
    moves = torch.cartesian_prod(units[0] * many, units[1] * many)
    thetas, ts = theta.repeat(len(moves), 1), t.repeat(len(moves), 1)
    thetas[:, moved] += moves[:, 0]
    ts[:, moved] += moves[:, 1]
    gaps = torch.cat([ahead(x.double(), y.double()) for x, y in zip(thetas.split(2048), ts.split(2048), strict=True)])
    nearest = torch.stack([torch.where(side, gaps.abs(), INF).argmin() for side in (gaps > 0, gaps < 0)])
    return thetas[nearest], ts[nearest], gaps[nearest]


# vocabulary, seed and noise of `near_ties`, and the settings: within a group and between groups; on the first, float64
# itself takes the other token where α's last step is made by Taylor's formula
NEAR_TIES = (
    (300, 2, 0.1, {}),
    (50, 1, 1.0, {}),
    (50, 3, 1.0, {"method": "ess_balance"}),
    (50, 1, 1.0, {"method": "entropy", "temperature": 0.7}),
    (50, 3, 1.0, {"method": "reverse_kl_symmetry"}),
    (50, 2, 1.0, {"method": "fixed"}),
    (50, 2, 1.0, {"method": "fixed", "alpha": 1.5}),
    (50, 1, 1.0, {"method": "kl_budget"}),
    (50, 1, 1.0, {"method": "kl_budget_t", "kl_budget": 0.1}),
    (50, 3, 1.0, {"temperature": 0.0}),
    (1100, 3, 1.0, {}),
    (2100, 1, 1.0, {"temperature": 0.0}),
)


def check_near_ties(impl: str, case: tuple, device: str | torch.device = "cpu") -> None:
    """The token that the reference draws, also where two keys are as good as equal."""
    vocab_size, seed, noise, settings = case
    theta, t, gaps = near_ties(vocab_size, seed, noise, **settings)
    assert gaps[0] > 0 > gaps[1]
    assert gaps.abs().max() < 3e-8
    theta, t = theta.to(device), t.to(device)
    index = dict.fromkeys(("seeds", "positions"), torch.zeros(2, dtype=torch.int64, device=device))
    tokens = [qstar_sample(theta, t, **index, **settings, impl=x).token.tolist() for x in (impl, "reference")]
    assert tokens[0] == tokens[1]
    assert tokens[0][0] != tokens[0][1]


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


def check_step(got: QStarStep, want: QStarStep, theta: Tensor, t: Tensor, names, **kwargs) -> dict[str, float]:
    """`got` is within the accuracy promised of the reference's `want`; `names` of the rows, `kwargs` of the call.

    Returns:
        the largest deviation of each number, as a share of what is promised.
    """
    got = got.to(torch.float64)
    assert torch.equal(got.status, want.status)
    usable = (x.double().masked_fill(x <= mask_of(x.dtype), -INF) for x in (theta, t))
    curvature = make_pair(*usable, kwargs.get("temperature") or 1.0).curve(want.alpha)[3]
    size = torch.maximum(want.kl_theta, want.kl_t).clamp(min=1)

    def share(x, y, bound) -> Tensor:
        same = (x == y) | (x.isnan() & y.isnan())
        return ((x - y).abs() / bound).masked_fill(same, 0).nan_to_num(nan=INF, posinf=INF)

    shares = {
        "alpha": share(got.alpha, want.alpha, 1e-5).masked_fill(~(curvature > 1e-6), 0),
        "kl_theta": share(got.kl_theta, want.kl_theta, 1e-5 * size),
        "kl_t": share(got.kl_t, want.kl_t, 1e-5 * size),
        "token": 2.0 * (got.token != want.token),
    }
    if kwargs.get("method", "kl_symmetry") == "kl_symmetry":
        shares["gap"] = share(got.kl_theta - got.kl_t, want.kl_theta - want.kl_t, 1e-5 * size)
    for name in ("ess_theta", "ess_t"):  # below 1e-30 float32 has nothing to say
        x, y = (getattr(step, name).clamp(min=1e-30).log() for step in (got, want))
        shares[name] = share(x, y, 1e-4)
    for name in OF_TOKEN:
        x, y = getattr(got, name), getattr(want, name)
        shares[name] = share(x, y, 1e-5 * y.abs().clamp(min=1))
    hits = {n: [names[i] for i in (x > 1).nonzero()[:, 0].tolist()] for n, x in shares.items() if (x > 1).any()}
    assert not hits, hits
    return {name: x.max().item() for name, x in shares.items() if name != "token"}
