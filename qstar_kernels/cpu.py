"""q* on a CPU in two sweeps over the logits (theory/computation.md, «Two sweeps»).

The first sweep takes the log-partition curve F at α = 0, ½ and 1 (value, slope, curvature), from which a quartic gives
α. The second is exact at that α: its slope is the residual of the rule, its sums are the diagnostics and the masses of
the token groups for the draw. Rows whose residual is too large get a Newton step and another sweep of their own.

Tiles of the logits are copied into buffers that stay in cache, each row padded to whole groups of 1024 ids. The bits of
a row depend on nothing but the row, for any number of threads: sums run over one group each, which torch never splits,
then over the groups of one row; and no operation joins a product and a sum (addcmul, lerp), whose rounding differs
between vector lanes and the remainder that a split over threads leaves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qstar_kernels.noise import GROUP_SIZE, GROUP_STREAM, TOKEN_STREAM, gumbel
from qstar_kernels.reference import LOWEST, draw, make_pair, qstar_reference, truncate
from qstar_kernels.types import QStarStep, Settings, Status

TILE_GROUPS = 128  # groups of ids in a tile at most: fewer cost more calls of torch, more fall out of the cache
FORBIDDEN = -1e30  # stands for −inf where ∞ − ∞ and 0 · ∞ must not arise
ALPHA_TOL = 5e-6  # largest Newton step still to be made at an accepted α
ROUNDING = 1e-12  # residual of a float64 sweep that is nothing but rounding
CHUNK = 1 << 18  # elements of log q that are handled together in float64
MAX_SWEEPS = {torch.float32: 4, torch.float64: 80}
# Var_q[d] between these bounds leaves float32 sums accurate enough for α; outside, the row is swept in float64
FLOAT32_CURVATURE = (0.02, 100.0)
LOWEST_FLOAT32_F = -20.0  # a pair this far apart leaves the range of exp in float32


class Rows:
    """Some rows of a batch, and buffers to read them tile by tile in the working precision."""

    def __init__(self, theta: Tensor, t: Tensor, chosen: Tensor | None, dtype: torch.dtype, scale: float, masked: bool):
        self.theta, self.t, self.chosen, self.dtype, self.scale, self.masked = theta, t, chosen, dtype, scale, masked
        self.count = theta.shape[0] if chosen is None else len(chosen)
        groups = -(-theta.shape[1] // GROUP_SIZE)
        self.tiles = -(-groups // TILE_GROUPS)
        self.groups_a_tile = -(-groups // self.tiles)
        self.groups = self.tiles * self.groups_a_tile
        self.width = self.groups_a_tile * GROUP_SIZE
        self.height = min(TILE_GROUPS // self.groups_a_tile, max(self.count, 1))
        self.buffers = torch.empty(5, self.height, self.groups_a_tile, GROUP_SIZE, dtype=dtype)

    def part(self, index: Tensor, dtype: torch.dtype | None = None) -> "Rows":
        """Rows `index` of these."""
        chosen = index if self.chosen is None else self.chosen[index]
        return Rows(self.theta, self.t, chosen, dtype or self.dtype, self.scale, self.masked)

    def blocks(self) -> Iterator[slice]:
        """The rows, as many at a time as share a tile."""
        for start in range(0, self.count, self.height):
            yield slice(start, min(start + self.height, self.count))

    def read(self, rows: slice, shift_theta: Tensor, shift_t: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tiles of a block in order, less the shifts [n] in the logits' units, over the temperature.

        Yields:
            a, b of π_θ and π_t and three scratch buffers, [R, groups, GROUP_SIZE] each, all overwritten by the next
            tile, with `FORBIDDEN` for −inf; and `missing`, bool [2, R, groups, GROUP_SIZE], where a and b are that, or
            None if no row of the batch has any.
        """
        a, b, *scratch = self.buffers[:, : rows.stop - rows.start].unbind()
        sides = []
        for logits, shift, buffer in ((self.theta, shift_theta, a), (self.t, shift_t, b)):
            block = logits[rows] if self.chosen is None else logits
            sides.append((block, shift[rows, None].to(self.dtype), buffer.flatten(1)))
        for start in range(0, self.tiles * self.width, self.width):
            for logits, shift, buffer in sides:
                tile = logits[:, start : start + self.width]
                if self.chosen is not None:
                    tile = tile.index_select(0, self.chosen[rows])
                filled = tile.shape[1]
                if filled < self.width:
                    buffer[:, filled:] = 2 * FORBIDDEN  # below LOWEST: a mask
                    buffer = buffer[:, :filled]
                torch.sub(tile, shift, out=buffer)
            missing = None
            if self.masked:
                missing = torch.stack((a < LOWEST, b < LOWEST))
            if self.scale != 1:
                a.mul_(self.scale)
                b.mul_(self.scale)
            if self.masked:
                a.masked_fill_(missing[0], FORBIDDEN)
                b.masked_fill_(missing[1], FORBIDDEN)
            yield a, b, *scratch, missing


def moments(w: Tensor, d: Tensor) -> list[Tensor]:
    """Σ w, Σ w d, Σ w d² of each group of a tile, [R, groups] each; `w` is overwritten."""
    # (w d) d, not w d²: where d stands for ∞ the weight of zero must win
    return [w.sum(-1), w.mul_(d).sum(-1), w.mul_(d).sum(-1)]


def gathered(blocks: list[list[Tensor]], tiles: int) -> Tensor:
    """Float64 [K, n, tiles, groups] of the K sums [R, groups] that each tile of each block of rows left, in order."""
    parts = [torch.stack(sums, 1).double().unflatten(1, (tiles, -1)) for sums in blocks]  # [R, tiles, K, groups]
    return torch.cat(parts).permute(2, 0, 1, 3).contiguous()


def in_order(parts: Tensor) -> Tensor:
    """Σ over the last dimension, the tiles, one after the other."""
    total = torch.zeros_like(parts[..., 0])
    for part in parts.unbind(-1):
        total += part
    return total


@dataclass
class Outline:
    """The first sweep's view of F, all float64 [n] or [3, n] for α = 0, ½, 1, with the rows' maxima subtracted."""

    norm_theta: Tensor
    norm_t: Tensor
    f: Tensor  # [3, n], over the common support
    slope: Tensor  # [3, n]
    curvature: Tensor  # [3, n]
    entropy_theta: Tensor
    entropy_t: Tensor
    theta_inside: Tensor  # bool [n], π_θ has no mass outside the common support
    t_inside: Tensor  # bool [n], likewise π_t
    disjoint: Tensor  # bool [n], no common support


def outline(rows: Rows, max_theta: Tensor, max_t: Tensor, method: str) -> Outline:
    """First sweep: normalisers, and what `method` needs to find α or a good guess at it."""
    n, curve = rows.count, method not in ("fixed", "entropy")
    theta_inside, t_inside, disjoint = torch.tensor([[True], [True], [rows.masked]]).expand(3, n).clone()
    blocks = []
    for block in rows.blocks():
        sums = []
        for a, b, x, d, _, missing in rows.read(block, max_theta, max_t):
            if curve:
                torch.sub(a, b, out=d)
            if missing is not None:
                forbidden = missing.any(0)
                disjoint[block] &= forbidden.flatten(1).all(-1)
                theta_inside[block] &= (missing[0] | ~missing[1]).flatten(1).all(-1)
                t_inside[block] &= (missing[1] | ~missing[0]).flatten(1).all(-1)
            if method == "entropy":
                for logits in (a, b):
                    torch.exp(logits, out=x)
                    sums += [x.sum(-1), x.mul_(logits).sum(-1)]
                continue
            norms = [logits.exp_().sum(-1) for logits in (a, b)]
            sums += norms
            if curve:
                if missing is not None:
                    a.masked_fill_(forbidden, 0)
                    b.masked_fill_(forbidden, 0)
                # the geometric mean spares an exponential; where the product underflows the guess at α is a bad one
                torch.mul(a, b, out=x).sqrt_()
                sums += moments(b, d) + moments(x, d) + moments(a, d)
        blocks.append(sums)
    sums = in_order(gathered(blocks, rows.tiles).sum(-1))  # [K, n]
    nodes = torch.full((3, 3, n), torch.nan, dtype=torch.float64)  # [α = 0, ½, 1; moment; n]
    entropies = torch.full((2, n), torch.nan, dtype=torch.float64)
    if curve:
        norms, nodes = sums[:2].log(), sums[2:].unflatten(0, (3, 3))
    elif method == "entropy":
        norms = sums[[0, 2]].log()
        entropies = norms - sums[[1, 3]] / sums[[0, 2]]
    else:
        norms = sums.log()
    mass, slope, square = nodes.unbind(1)
    slope, square = slope / mass, square / mass
    return Outline(*norms, mass.log(), slope, square - slope**2, *entropies, theta_inside, t_inside, disjoint)


@dataclass
class Point:
    """The exact sweep at α, float64 [n]; F is that of the log-probabilities, so F(0) ≈ F(1) ≈ 0."""

    f: Tensor
    f_high: Tensor  # F(2 − α)
    f_low: Tensor  # F(−α)
    slope: Tensor
    curvature: Tensor
    slope_high: Tensor
    slope_low: Tensor
    groups: Tensor  # [n, groups], log-mass of each group of ids, not normalised


def sweep(rows: Rows, shift_theta: Tensor, shift_t: Tensor, alpha: Tensor, method: str) -> Point:
    """Second sweep: everything about q at α [n]. The shifts are the rows' log-normalisers in the logits' units."""
    # log q is near its log-probabilities, so only pairs that float32 passes on to float64 leave the range of exp
    shifted = rows.dtype == torch.float64
    weight = alpha.to(rows.dtype)[:, None, None]
    blocks, highest = [], []
    for block in rows.blocks():
        sums, tops = [], []
        for a, b, x, d, step, missing in rows.read(block, shift_theta, shift_t):
            torch.sub(a, b, out=d)
            if missing is not None:
                forbidden = missing.any(0)
                d.masked_fill_(forbidden, 0)
            torch.mul(d, weight[block], out=step)
            for k in range(3):
                if k == 0:
                    torch.add(b, step, out=x)
                elif k == 1:  # (2 − α) a + (α − 1) b = a + (d − α d)
                    torch.sub(d, step, out=x).add_(a)
                else:  # −α a + (1 + α) b
                    torch.sub(b, step, out=x)
                if missing is not None:
                    x.masked_fill_(forbidden, FORBIDDEN)
                if shifted:
                    tops.append(x.amax((1, 2), keepdim=True))  # [R, 1, 1]
                    x.sub_(tops[-1])
                x.exp_()
                if k == 0:
                    sums += moments(x, d)
                else:
                    mass = x.sum(-1)
                    # only this rule's Newton step needs the slope there; the mass fills its place otherwise
                    sums += [mass, x.mul_(d).sum(-1) if method == "ess_balance" else mass]
        blocks.append(sums)
        highest.append(tops)
    sums = gathered(blocks, rows.tiles)  # [K, n, tiles, groups]
    top = sums.new_zeros(3, rows.count, rows.tiles)  # [α or 2 − α or −α, n, tiles]
    if shifted:
        top = gathered([[top[..., 0] for top in tops] for tops in highest], rows.tiles)[..., 0]
    overall = top.amax(-1, keepdim=True)  # [3, n, 1]
    scale = (top - overall).exp()
    totals = sums.sum(-1)  # [K, n, tiles]
    mass = in_order(scale * totals[[0, 3, 5]])  # [3, n]
    slope = in_order(scale * totals[[1, 4, 6]]) / mass
    curvature = in_order(scale[0] * totals[2]) / mass[0] - slope[0] ** 2
    f = overall[..., 0] + mass.log()
    groups = sums[0].log() + top[0][..., None]  # [n, tiles, groups a tile]
    return Point(*f, slope[0], curvature.clamp(min=0), slope[1], slope[2], groups.flatten(1))


@dataclass
class Solution:
    """What is known of the chosen rows after the solve: float64 [n] where not said otherwise.

    The sweep at α takes `shift` off the logits and divides by the temperature; `norm` is the log-normaliser of what
    that leaves, nearly 0.
    """

    alpha: Tensor
    shift_theta: Tensor
    shift_t: Tensor
    norm_theta: Tensor
    norm_t: Tensor
    point: Point
    theta_inside: Tensor  # bool, π_θ has no mass outside the common support
    t_inside: Tensor  # bool, likewise π_t
    disjoint: Tensor  # bool, no common support
    settled: Tensor  # bool, accurate enough in the precision of the sweep


def kls(alpha: Tensor, point: Point, norm_theta: Tensor, norm_t: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q‖π_θ) and KL(q‖π_t), [n] each."""
    return (alpha - 1) * point.slope - point.f + norm_theta, alpha * point.slope - point.f + norm_t


def overwrite(target, index: Tensor, source) -> None:
    """Rows `index` of a dataclass of tensors become `source`."""
    for name, field in vars(target).items():
        if isinstance(field, Tensor):
            field[index] = getattr(source, name)
        else:
            overwrite(field, index, getattr(source, name))


def guess_alpha(o: Outline) -> Tensor:
    """Root of F'(α) = s by the quartic that matches F', F'' at both ends of the cell [0, ½] or [½, 1] and ΔF across."""
    s = o.norm_theta - o.norm_t
    right = o.slope[1] < s  # the cell that holds the root

    def cell(values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(right, values[1], values[0]), torch.where(right, values[2], values[1])

    (f0, f1), (g0, g1), (k0, k1) = cell(o.f), cell(o.slope - s), cell(o.curvature / 2)  # k: per unit of the cell
    # cubic Hermite c0 + c1 u + c2 u² + c3 u³, plus e u² (1 − u)² that mends its integral
    c2, c3 = 3 * (g1 - g0) - 2 * k0 - k1, 2 * (g0 - g1) + k0 + k1
    e = 30 * (2 * (f1 - f0) - s - (g0 + g1) / 2 - (k0 - k1) / 12)
    c2, c3 = c2 + e, c3 - 2 * e
    u = (g0 / (g0 - g1)).clamp(0, 1)
    for _ in range(3):
        value = g0 + u * (k0 + u * (c2 + u * (c3 + u * e)))
        u = (u - value / (k0 + u * (2 * c2 + u * (3 * c3 + u * (4 * e))))).clamp(0, 1)
    alpha = (u + right) / 2
    return torch.where(alpha.isfinite(), alpha, 0.5)


def residual(point: Point, s: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """What vanishes at the rule's α, and its derivative, increasing in α: [n] each."""
    if method == "ess_balance":
        return point.f_low - point.f_high + 2 * s, point.slope_high - point.slope_low
    return point.slope - s, point.curvature


def solve(rows: Rows, max_theta: Tensor, max_t: Tensor, settings: Settings) -> Solution:
    """α by the rule and the exact sweep there, for rows whose maxima [n] are given."""
    method, n, in_float32 = settings.method, rows.count, rows.dtype == torch.float32
    o = outline(rows, max_theta, max_t, method)
    settled = torch.ones(n, dtype=torch.bool)
    if method == "fixed":
        alpha = torch.full((n,), settings.alpha, dtype=torch.float64)
    elif method == "entropy":
        total = o.entropy_theta + o.entropy_t
        alpha = torch.where(total > 0, o.entropy_theta / total, 0.5)
        settled = (total > 0.05) | (not in_float32)
    elif method == "reverse_kl_symmetry":
        spread = o.slope[2] - o.slope[0]
        alpha = torch.where(spread > 1e-14, (o.slope[2] - (o.norm_theta - o.norm_t)) / spread, 0.5)
        settled = ((spread > 0.05) & (spread < 100)) | (not in_float32)
    else:
        alpha = guess_alpha(o)
        # a pair too near for float32 is known before the second sweep
        settled = ~(o.curvature[1] < FLOAT32_CURVATURE[0]) | (not in_float32)

    # The second sweep works on log-probabilities: d is then centred where the root is, which the variance needs.
    shift_theta = (max_theta + o.norm_theta / rows.scale).to(rows.dtype).double()
    shift_t = (max_t + o.norm_t / rows.scale).to(rows.dtype).double()
    solution = Solution(
        alpha=alpha.clamp(settings.alpha_min, settings.alpha_max),
        shift_theta=shift_theta,
        shift_t=shift_t,
        norm_theta=(max_theta - shift_theta) * rows.scale + o.norm_theta,
        norm_t=(max_t - shift_t) * rows.scale + o.norm_t,
        point=Point(
            *torch.full((7, n), torch.nan, dtype=torch.float64),
            groups=torch.full((n, rows.groups), torch.nan, dtype=torch.float64),
        ),
        theta_inside=o.theta_inside,
        t_inside=o.t_inside,
        disjoint=o.disjoint,
        settled=settled,
    )
    unsolvable = o.disjoint | ~(o.norm_theta + o.norm_t).isfinite()
    index = (settled & ~unsolvable).nonzero()[:, 0]
    solution.settled |= unsolvable
    held = torch.full_like(settled, method not in ("kl_symmetry", "ess_balance"))  # α stays as it is
    if method in ("ess_balance", "reverse_kl_symmetry"):
        uneven = index[~(o.theta_inside & o.t_inside)[index]]
        if len(uneven):
            held[uneven] |= take_better_end(solution, rows, uneven, settings)
    iterate(solution, rows, index, held, settings)
    return solution


def sweep_at(solution: Solution, rows: Rows, index: Tensor, alpha: Tensor, method: str) -> Point:
    """The exact sweep of rows `index` [m] at α [m]."""
    part = rows if len(index) == rows.count else rows.part(index)
    return sweep(part, solution.shift_theta[index], solution.shift_t[index], alpha, method)


def take_better_end(solution: Solution, rows: Rows, index: Tensor, settings: Settings) -> Tensor:
    """Where the rule has no root, which takes different supports, α becomes the end with the smaller max{KL, KL}.

    Returns which of the rows `index` those are, bool [m].
    """
    norm_theta, norm_t = solution.norm_theta[index], solution.norm_t[index]
    ends = torch.zeros_like(norm_t), torch.ones_like(norm_t)
    points = [sweep_at(solution, rows, index, end, settings.method) for end in ends]
    values = [residual(point, norm_theta - norm_t, settings.method)[0] for point in points]
    worst = [torch.maximum(*kls(end, point, norm_theta, norm_t)) for end, point in zip(ends, points, strict=True)]
    rootless = (values[0] > 0) | (values[1] < 0)
    end = torch.where(worst[0] <= worst[1], *ends).clamp(settings.alpha_min, settings.alpha_max)
    solution.alpha[index] = torch.where(rootless, end, solution.alpha[index])
    return rootless


def iterate(solution: Solution, rows: Rows, index: Tensor, held: Tensor, settings: Settings) -> None:
    """Sweep rows `index` at their α; those not `held` again after guarded Newton steps until the residual is small.

    Rows that float32 cannot finish stay unsettled.
    """
    low = torch.full_like(solution.alpha, settings.alpha_min - 1)  # so that the ends themselves may still be tried
    high = torch.full_like(solution.alpha, settings.alpha_max + 1)
    for _ in range(MAX_SWEEPS[rows.dtype]):
        if not len(index):
            return
        overwrite(solution.point, index, sweep_at(solution, rows, index, solution.alpha[index], settings.method))
        alpha, point = solution.alpha, solution.point
        if rows.dtype == torch.float32:
            in_range = (point.f > LOWEST_FLOAT32_F) & (point.f_low + point.f_high).isfinite()
            solution.settled[index] = in_range[index]
            index = index[in_range[index]]
        index = index[~held[index]]
        value, derivative = residual(point, solution.norm_theta - solution.norm_t, settings.method)
        # convergence first: at the root rounding can put the Newton step outside the bracket, and a bisection there
        # would throw α half a bracket away
        done = (value.abs() <= settings.tol) & (value.abs() <= ALPHA_TOL * derivative)
        done |= (high - low <= 1e-15) | ((alpha <= settings.alpha_min) & (value >= 0))
        done |= (alpha >= settings.alpha_max) & (value <= 0)
        if rows.dtype == torch.float32:
            done &= (point.curvature >= FLOAT32_CURVATURE[0]) & (point.curvature <= FLOAT32_CURVATURE[1])
        else:
            done |= value.abs() <= ROUNDING
        index = index[~done[index]]
        low = torch.where(value < 0, alpha, low)
        high = torch.where(value > 0, alpha, high)
        newton = (alpha - value / derivative).clamp(settings.alpha_min, settings.alpha_max)
        inside = (newton > low) & (newton < high)
        middle = (low + high).clamp(2 * settings.alpha_min, 2 * settings.alpha_max) / 2
        solution.alpha[index] = torch.where(inside, newton, middle)[index]
    solution.settled[index] = rows.dtype != torch.float32


def log_q_of(theta: Tensor, t: Tensor, scale: float, solution: Solution, rows: slice) -> Tensor:
    """log q in float64 of the logits [R, C] of `rows`, any choice of columns."""
    alpha = solution.alpha[rows, None]  # [R, 1]
    theta, t = theta.double(), t.double()
    a = (theta - solution.shift_theta[rows, None]) * scale
    b = (t - solution.shift_t[rows, None]) * scale
    mixed = alpha * a + (1 - alpha) * b - solution.point.f[rows, None]
    return mixed.masked_fill_((theta < LOWEST) | (t < LOWEST), -torch.inf)


def draw_from_groups(theta: Tensor, t: Tensor, scale: float, solution: Solution, seeds: Tensor, positions: Tensor):
    """`qstar_kernels.reference.draw` from the masses of the last sweep: only the winning group is read again."""
    groups = solution.point.groups  # [B, groups]
    group = (groups + gumbel(seeds, positions, torch.zeros_like(seeds), groups.shape[1], GROUP_STREAM)).argmax(-1)
    columns = group[:, None] * GROUP_SIZE + torch.arange(GROUP_SIZE)  # [B, GROUP_SIZE]
    beyond = columns >= theta.shape[1]
    columns.clamp_(max=theta.shape[1] - 1)
    log_q = log_q_of(theta.gather(1, columns), t.gather(1, columns), scale, solution, slice(None))
    log_q.masked_fill_(beyond, -torch.inf)
    log_q += gumbel(seeds, positions, group * GROUP_SIZE, GROUP_SIZE, TOKEN_STREAM)
    return group * GROUP_SIZE + log_q.argmax(-1)


def most_probable(rows: Rows, solution: Solution) -> Tensor:
    """The lowest id of greatest q, int64 [B]; in float64, so that no tie arises by rounding."""
    tokens = []
    for block in rows.blocks():
        alpha, highest, best = solution.alpha[block, None, None], [], []
        for index, (a, b, x, d, _, missing) in enumerate(rows.read(block, solution.shift_theta, solution.shift_t)):
            torch.mul(torch.sub(a, b, out=d), alpha, out=x).add_(b)
            if missing is not None:
                x.masked_fill_(missing.any(0), FORBIDDEN)
            x = x.flatten(1)
            token = x.argmax(-1, keepdim=True)  # [R, 1]
            highest.append(x.gather(-1, token))
            best.append(token + index * rows.width)
        winner = torch.cat(highest, -1).argmax(-1, keepdim=True)
        tokens.append(torch.cat(best, -1).gather(-1, winner)[:, 0])
    return torch.cat(tokens)


def qstar_torch(
    logits_theta: Tensor,
    logits_t: Tensor,
    settings: Settings,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    want_log_q: bool = False,
) -> tuple[QStarStep, Tensor | None]:
    """`qstar_kernels.reference.qstar_reference` on a CPU, fast; the same arguments and results.

    float32 sums, float64 where they do not suffice and for float64 logits. Fields are float64, log q likewise.
    """
    theta, t = logits_theta, logits_t
    if not len(theta):
        return qstar_reference(theta, t, settings, seeds, positions, tokens, want_log_q)
    batch, vocab_size = theta.shape
    dtype = torch.float64 if torch.float64 in (theta.dtype, t.dtype) else torch.float32
    scale = 1 / settings.temperature if settings.temperature > 0 else 1.0

    max_theta, max_t = theta.amax(-1).double(), t.amax(-1).double()  # [B]; NaN and +inf show here
    status = torch.full((batch,), int(Status.OK))
    for code, hit in (
        (Status.NO_SUPPORT, (max_theta < LOWEST) | (max_t < LOWEST)),
        (Status.POSITIVE_INFINITY, max_theta.isposinf() | max_t.isposinf()),
        (Status.NAN, max_theta.isnan() | max_t.isnan()),
    ):
        status = torch.where(hit, int(code), status)
    masked = bool((torch.minimum(theta.amin(-1).double(), t.amin(-1).double()) < LOWEST).any())
    rows = Rows(theta, t, None, dtype, scale, masked)
    solution = solve(rows, max_theta, max_t, settings)
    again = (~solution.settled).nonzero()[:, 0]
    if len(again):
        overwrite(solution, again, solve(rows.part(again, torch.float64), max_theta[again], max_t[again], settings))
    status = torch.where(solution.disjoint & (status == Status.OK), int(Status.DISJOINT), status)
    bad = status != Status.OK

    token = tokens
    logq = log_q = None
    if want_log_q or settings.truncates:
        log_q = torch.empty(batch, vocab_size, dtype=dtype) if want_log_q else None
        drawn, logq, empty = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.float64), bad.clone()
        height = max(1, CHUNK // vocab_size)
        for start in range(0, batch, height):
            chunk = slice(start, start + height)
            part = log_q_of(theta[chunk], t[chunk], scale, solution, chunk)
            part.masked_fill_(bad[chunk, None], 0.0)
            if settings.truncates:
                # row by row: torch splits large sums by the size of the whole tensor
                for i, row in enumerate(part.split(1)):
                    logits = (x[start + i, None].double() for x in (theta, t))
                    pair = make_pair(*(x.masked_fill(x < LOWEST, -torch.inf) * scale for x in logits))
                    row.copy_(truncate(row, pair, settings))
            empty[chunk] = part.isneginf().all(-1)
            if want_log_q:
                log_q[chunk] = part
            if seeds is not None:
                greedy = settings.temperature == 0
                drawn[chunk] = part.argmax(-1) if greedy else draw(part, seeds[chunk], positions[chunk])
            at = drawn if seeds is not None else tokens
            if at is not None:
                logq[chunk] = part.gather(1, at[chunk, None].clamp(0, vocab_size - 1))[:, 0]
        status = torch.where(empty & ~bad, int(Status.EMPTY), status)
        token = drawn if seeds is not None else tokens
    elif seeds is not None:
        if settings.temperature == 0:
            token = most_probable(Rows(theta, t, None, torch.float64, scale, masked), solution)
        else:
            token = draw_from_groups(theta, t, scale, solution, seeds, positions)
    unusable = status != Status.OK

    kl_theta, kl_t = kls(solution.alpha, solution.point, solution.norm_theta, solution.norm_t)
    ess_theta = torch.exp(2 * solution.norm_theta - solution.point.f - solution.point.f_high)
    ess_t = torch.exp(2 * solution.norm_t - solution.point.f - solution.point.f_low)
    step = QStarStep(
        alpha=solution.alpha.masked_fill(bad, torch.nan),
        kl_theta=kl_theta.clamp(min=0).masked_fill(bad, torch.nan),
        kl_t=kl_t.clamp(min=0).masked_fill(bad, torch.nan),
        ess_theta=ess_theta.clamp(max=1).masked_fill(~solution.theta_inside, 0.0).masked_fill(bad, torch.nan),
        ess_t=ess_t.clamp(max=1).masked_fill(~solution.t_inside, 0.0).masked_fill(bad, torch.nan),
        status=status,
    )
    if token is not None:
        step.token = token if seeds is None else token.masked_fill(unusable, -1)
        known = (token >= 0) & (token < vocab_size) & ~unusable
        at = token.clamp(0, vocab_size - 1)[:, None]  # [B, 1]
        at_theta, at_t = (
            x.masked_fill(x < LOWEST, -torch.inf) for x in (theta.gather(1, at).double(), t.gather(1, at).double())
        )
        if logq is None:
            logq = log_q_of(at_theta, at_t, scale, solution, slice(None))[:, 0]
        norms = raw_norms(theta, t, rows, max_theta, max_t, solution)
        step.logq = logq.masked_fill(~known, torch.nan)
        step.logp_theta = (at_theta[:, 0] - norms[0]).masked_fill(~known, torch.nan)
        step.logp_t = (at_t[:, 0] - norms[1]).masked_fill(~known, torch.nan)
    return step, log_q.masked_fill_(unusable[:, None], torch.nan) if want_log_q else None


def raw_norms(
    theta: Tensor, t: Tensor, rows: Rows, max_theta: Tensor, max_t: Tensor, solution: Solution
) -> tuple[Tensor, Tensor]:
    """Log-normalisers [B] of both rows at temperature 1, float64."""
    if rows.scale == 1:
        return solution.shift_theta + solution.norm_theta, solution.shift_t + solution.norm_t
    raw = outline(Rows(theta, t, None, rows.dtype, 1.0, rows.masked), max_theta, max_t, "fixed")
    return max_theta + raw.norm_theta, max_t + raw.norm_t
