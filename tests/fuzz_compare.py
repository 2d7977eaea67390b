"""What `tests/fuzz.py` looks at: an implementation's results on a case against the reference's and one another.

Where α is all but undetermined, or a token and its rival all but equal, rounding decides, and two right answers differ.
So everything is compared at the implementation's own α too: what the reference's formulas give there, over the interval
that rounds to the α reported. A token or a support other than the reference's is right only where its keys, values and
masses are shown to lie within rounding of one another; such cases are counted, not waved through.
"""

import dataclasses
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from qstar_kernels import QStarStep, Status, qstar_logprobs, qstar_sample, qstar_stats
from qstar_kernels.noise import GROUP_SIZE, GROUP_STREAM, TOKEN_STREAM, gumbel
from qstar_kernels.reference import (
    Pair,
    RowSettings,
    entropy,
    lost_outside,
    make_pair,
    qstar_reference,
    row_settings,
    solve_alpha,
    truncate,
)
from qstar_kernels.types import BUDGETS, OF_ROW, OF_TOKEN, Settings, mask_of, output_dtype
from tests.fuzz_cases import INF, index_of, per_row_of, rows_of
from tests.interpreter import poisoned

UNIT = 2.0**-52  # a step of float64 at 1
HALF32 = 2.0**-24  # what rounding to float32 moves a number by, relative


@dataclass(frozen=True)
class Allowance:
    """How far an implementation may be from the reference."""

    relative: float  # of a number above 1, absolute below; of a rule's residual
    log_ess: float
    alpha: float  # where it is determined: F'', or what stands in its place, above 1e-6
    value: float  # relative, of what log-probabilities are the sum of, before values are compared and drawn
    mass: float  # relative, of a sum of probabilities
    truncated_key: float = 0.0  # of a key of the draw, after truncation; without it only what float64 cannot tell apart


ALLOWED = {
    # float64 throughout, but the last step of α may be by Taylor's formula: what `carries` in rows.c proves of it
    "cpu": Allowance(relative=2e-7, log_ess=1e-5, alpha=2e-7, value=4 * UNIT, mass=1e-12),
    # what is promised of the numbers; values and masses are float32, of which this is a few roundings
    "triton": Allowance(relative=1e-5, log_ess=1e-4, alpha=1e-5, value=8 * HALF32, mass=8 * HALF32, truncated_key=3e-5),
    "reference": Allowance(relative=1e-12, log_ess=1e-12, alpha=1e-12, value=4 * UNIT, mass=1e-12),
}


@dataclass(frozen=True)
class Disagreement:
    kind: str
    row: int
    detail: str


@dataclass
class At:
    """What the reference's formulas give at one α a row, before truncation: float64 [B], `log_q` [B, V]."""

    alpha: Tensor
    log_q: Tensor
    f: Tensor
    slope: Tensor
    curvature: Tensor
    kl_theta: Tensor
    kl_t: Tensor
    ess_theta: Tensor  # both in logarithms
    ess_t: Tensor
    gap: Tensor  # what kl_symmetry wants to be 0
    balance: Tensor  # what ess_balance wants to be 0
    balance_slope: Tensor
    f_sides: Tensor  # |F(2 − α)| + |F(−α)|


def at(pair: Pair, *alphas: Tensor) -> list[At]:
    """The curve at each of several α [B], all at once."""
    times, alpha = len(alphas), torch.cat(alphas)
    fields = {f.name: getattr(pair, f.name) for f in dataclasses.fields(pair)}
    pair = Pair(**{name: x.repeat(times, *(1,) * (x.ndim - 1)) for name, x in fields.items()})
    log_q, f, slope, curvature = pair.curve(alpha)
    _, f_high, slope_high, _ = pair.curve(2 - alpha)
    _, f_low, slope_low, _ = pair.curve(-alpha)
    whole = At(
        alpha,
        log_q,
        f,
        slope,
        curvature,
        *pair.kls(alpha, f, slope),
        ess_theta=(2 * pair.norm_theta - f - f_high).clamp(max=0).masked_fill(~pair.theta_inside, -INF),
        ess_t=(2 * pair.norm_t - f - f_low).clamp(max=0).masked_fill(~pair.t_inside, -INF),
        gap=slope - pair.secant,
        balance=f_low - f_high + 2 * pair.secant,
        balance_slope=slope_high - slope_low,
        f_sides=f_high.abs() + f_low.abs(),
    )
    parts = {f.name: getattr(whole, f.name).chunk(times) for f in dataclasses.fields(At)}
    return [At(**{name: chunks[i] for name, chunks in parts.items()}) for i in range(times)]


def neighbourhood(alpha: Tensor, dtype: torch.dtype, given: bool) -> tuple[Tensor, Tensor]:
    """The ends of what rounds to α in the output's type; a bracket of float64 is not closed further than 1e-15.

    α lies in [0, 1] where it is not `given`.
    """
    if given and dtype == torch.float64:
        return alpha, alpha
    if dtype == torch.float64:
        return (alpha - 1e-15).clamp(min=0), (alpha + 1e-15).clamp(max=1)
    narrow = alpha.to(dtype)
    ends = (narrow.nextafter(torch.full_like(narrow, x)).double() for x in (-INF, INF))
    low, high = ((alpha + x) / 2 for x in ends)
    return (low, high) if given else (low.clamp(0, 1), high.clamp(0, 1))


def moved(residual: Tensor, weight: Tensor, curvature: Tensor) -> Tensor:
    """How far α may be off where KL is off its budget by so much: KL's slope is `weight`, F″ times the way to the end,
    where it is a parabola."""
    return torch.minimum(residual / weight.clamp(min=1e-300), (2 * residual / curvature.clamp(min=1e-300)).sqrt())


def call(
    case: dict, impl: str, theta: Tensor, t: Tensor, index: dict[str, Tensor], per_row: dict[str, Tensor | float]
) -> tuple[QStarStep, Tensor | None]:
    options = case["settings"] | per_row | {"impl": impl}
    with torch.device(case["default_device"]) if "default_device" in case else nullcontext():
        if case["what"] == "sample":
            return qstar_sample(theta, t, **index, **options), None
        if case["what"] == "tokens":
            return qstar_stats(theta, t, **index, **options), None
        log_q, step = qstar_logprobs(theta, t, **options)
        return step, log_q


def disagreements(
    case: dict, impl: str, device: str = "cpu", counts: Counter | None = None, watch=nullcontext
) -> list[Disagreement]:
    """What is wrong with what `impl` makes of a case, within `watch()`; `counts` takes the ties that were proved."""
    theta, t = rows_of(case, device)
    chosen, index, per_row = Settings(**case["settings"]), index_of(case, device), per_row_of(case, device)
    rows, alone = len(theta), []
    with poisoned(), watch():
        step, log_q = call(case, impl, theta, t, index, per_row)
        if log_q is None and chosen.truncates:  # what the drawn token, or the one looked up, was chosen from
            log_q = call(case | {"what": "log_q"}, impl, theta, t, {}, per_row)[1]
        if case.get("alone") or per_row:
            i = case["vocab_size"] % rows
            row = slice(i, i + 1)
            of_row = {k: v[row] for k, v in per_row.items()}
            if step.status[i] != Status.BAD_SETTING:  # one number for all rows of a call is one number a row
                of_row = {k: v.item() for k, v in of_row.items()}
            alone = call(case, impl, theta[row], t[row], {k: v[row] for k, v in index.items()}, of_row)
    comparison = Comparison(impl, theta, t, chosen, index, step, log_q, per_row)
    if alone:
        comparison.bits(i, *alone)
    comparison.run()
    if counts is not None:
        counts.update(comparison.counts)
    return comparison.found


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.nan_to_num(nan=7e7), y.nan_to_num(nan=7e7))


class Comparison:
    """One call's results against the reference's; what is wrong is in `found`, at most one row for each kind."""

    def __init__(
        self,
        impl: str,
        theta: Tensor,
        t: Tensor,
        settings: Settings,
        index: dict[str, Tensor],
        step: QStarStep,
        log_q: Tensor | None,
        per_row: dict[str, Tensor],
    ):
        self.impl, self.allowed, self.settings, self.index = impl, ALLOWED[impl], settings, index
        self.raw, self.got = step, step.to(torch.float64)
        self.want, _ = qstar_reference(theta, t, settings, per_row=per_row, **index)
        self.own = row_settings(settings, per_row, theta[:, 0].double())
        self.dtype, self.vocab_size = output_dtype(theta, t), theta.shape[1]
        self.log_q = None if log_q is None else log_q.double()
        self.theta, self.t = (x.double().masked_fill(x <= mask_of(x.dtype), -INF) for x in (theta, t))
        self.half = 0.0 if self.dtype == torch.float64 else HALF32
        self.found: list[Disagreement] = []
        self.counts: Counter = Counter()

    def report(self, kind: str, wrong: Tensor, *numbers: Tensor | str) -> None:
        """Note the first of the rows that are `wrong` [B], with its `numbers` [B]: what was got, then what is right."""
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            shown = " ".join(x if isinstance(x, str) else f"{x[row].item():.9g}" for x in numbers)
            self.found.append(Disagreement(kind, row, shown))

    def bits(self, row: int, step: QStarStep, log_q: Tensor | None) -> None:
        """The same bits, whatever stands beside a row."""
        for field in dataclasses.fields(step):
            single, among = getattr(step, field.name), getattr(self.raw, field.name)
            if single is not None and not same_bits(among[row], single[0]):
                self.found.append(
                    Disagreement(f"bits of {field.name} alone", row, f"{single[0]} {among[row]} in a batch")
                )
        if log_q is not None and not same_bits(self.log_q[row], log_q[0].double()):
            self.found.append(Disagreement("bits of log q alone", row, ""))

    def run(self) -> None:
        got, want = self.got, self.want
        drawn, looked_up = "seeds" in self.index, "tokens" in self.index
        self.patterns(drawn, looked_up)
        solved = [(step.status == Status.OK) | (step.status == Status.EMPTY) for step in (got, want)]
        refused = want.status == Status.INEXACT
        self.usable = solved[0] & (solved[1] | refused) & got.alpha.isfinite()
        theta, t = (x.masked_fill(~self.usable[:, None], 0.0) for x in (self.theta, self.t))
        self.pair = make_pair(theta, t, self.settings.temperature or 1.0)
        given = self.settings.method == "fixed"
        alpha = torch.where(self.usable, got.alpha, 0.5)
        alpha = alpha if given else alpha.clamp(0, 1)
        # 1 is what 1 − 2e-8 is rounded to, and not what it means where d is 1e9
        rounded = self.usable & ~refused & (got.alpha == want.alpha.to(self.dtype))
        alpha = torch.where(rounded, want.alpha, alpha)
        alphas = (
            alpha,
            *neighbourhood(alpha, self.dtype, given),
            torch.where(self.usable & ~refused, want.alpha, alpha),
        )
        self.here, self.low, self.high, self.there = at(self.pair, *alphas)
        self.ok = self.usable & (got.status == Status.OK)
        # what float64 leaves of sums of numbers of this size, in whatever order, on either side
        # beyond [0, 1] the parts of a sum are of both signs
        beyond = 1 + 2 * torch.maximum(alpha - 1, -alpha).clamp(min=0)
        size = (self.pair.a.abs() + self.pair.b.abs()).nan_to_num(posinf=0.0) * beyond[:, None]  # [B, V]
        self.token_size = size + self.here.f.abs()[:, None]
        d = torch.where(self.pair.common, self.pair.a - self.pair.b, 0.0)
        spread = (self.here.log_q.exp() * (d - self.here.slope[:, None]).abs() * self.token_size).sum(-1)
        norms = self.pair.norm_theta.abs() + self.pair.norm_t.abs()
        self.rounding = 16 * UNIT * (self.here.f.abs() + beyond * (self.here.slope.abs() + norms + spread))
        self.counts["rows refused as inexact"] += int(refused.sum())
        self.statuses()
        self.numbers()
        self.rule()
        support = self.support()
        if drawn or looked_up:
            self.at_token(support, drawn)
        if self.log_q is not None:
            self.whole(support)
        if drawn:
            self.token(support)

    def patterns(self, drawn: bool, looked_up: bool) -> None:
        """What the docstrings say of fields whatever the numbers are."""
        got, ok = self.got, self.got.status == Status.OK
        solved = ok | (got.status == Status.EMPTY)
        for name in OF_ROW:
            x = getattr(got, name)
            self.report(f"{name} not finite", solved & ~x.isfinite(), x)
            self.report(f"{name} of an unusable row is not NaN", ~solved & ~x.isnan(), x)
        for name in ("kl_theta", "kl_t"):
            self.report(f"{name} < 0", getattr(got, name) < 0, getattr(got, name))
        for name in ("ess_theta", "ess_t"):
            x = getattr(got, name)
            self.report(f"{name} outside [0, 1]", (x < 0) | (x > 1), x)
        low, high = self.rounded(self.own.low), self.rounded(self.own.high)
        self.report("alpha outside its range", (got.alpha < low) | (got.alpha > high), got.alpha)
        if drawn or looked_up:
            known = ok & (got.token >= 0) & (got.token < self.vocab_size)
            if drawn:
                self.report("no token", ok & ~known, got.token)
                self.report("a token of an unusable row", ~ok & (got.token != -1), got.token)
            else:
                self.report("token is not the given one", got.token != self.index["tokens"], got.token)
            for name in OF_TOKEN:
                x = getattr(got, name)
                finite = x.isfinite() if drawn else x < INF
                self.report(f"{name} not finite", known & ~finite, x)
                self.report(f"{name} above 0", known & (x > 1e-6), x)
                self.report(f"{name} above 0 by rounding", known & (x > 0) & (x <= 1e-6), x)
                self.report(f"{name} without a token is not NaN", ~known & ~x.isnan(), x)
        elif any(getattr(got, name) is not None for name in ("token", *OF_TOKEN)):
            self.found.append(Disagreement("fields of a token that nobody asked for", 0, ""))
        if self.log_q is not None:
            greatest = self.log_q.amax(-1)
            self.report("log q above 0", ok & (greatest > 1e-6), greatest)
            self.report("log q above 0 by rounding", ok & (greatest > 0) & (greatest <= 1e-6), greatest)
            self.report("log q NaN", ok & self.log_q.isnan().any(-1))
            self.report("log q of an unusable row is not NaN", ~ok & ~self.log_q.isnan().all(-1))

    def rounded(self, x: Tensor) -> Tensor:
        """To the type of the output, as float64."""
        return x.to(self.dtype).double()

    def statuses(self) -> None:
        """Equal, but for a support that is empty or not by a token at the boundary, or a row all but refused."""
        for row in (self.got.status != self.want.status).nonzero()[:, 0].tolist():
            got, want = (Status(int(step.status[row])).name for step in (self.got, self.want))
            if {got, want} == {"OK", "EMPTY"} and self.usable[row]:
                surely, possibly = self.bounds(row)
                if possibly.any() and not surely.any():
                    self.counts["tokens at a boundary"] += 1
                    continue
            if {got, want} in ({"OK", "INEXACT"}, {"EMPTY", "INEXACT"}) and self.coarse(row):
                self.counts["rows all but refused"] += 1
                continue
            self.found.append(Disagreement(f"status {got} for {want}", row, ""))

    def coarse(self, row: int) -> bool:
        """Whether a step or two of α in float64 move the rule's residual by a share of `tol` that decides on a row; and
        whether rounding leaves KLs beyond [0, 1] as many digits as just are enough."""
        method, own = self.settings.method, RowSettings(*(x[row : row + 1] for x in self.own))
        pair = make_pair(self.theta[row : row + 1], self.t[row : row + 1], self.settings.temperature or 1.0)
        alpha = solve_alpha(pair, self.settings, own)  # not as it is reported: there 1 − 2e-8 is 1
        for part in at(pair, alpha, *neighbourhood(alpha, self.dtype, method == "fixed")):
            size = torch.maximum(part.kl_theta, part.kl_t).clamp(min=1)
            if method == "fixed":
                size = torch.minimum(part.kl_theta, part.kl_t).clamp(min=1)
                if (lost_outside(alpha, part.f, part.slope) > 0.5e-5 * size).any():
                    return True
                continue
            if method in BUDGETS:
                kl, away = (part.kl_theta, 1 - alpha) if method == "kl_budget" else (part.kl_t, alpha)
                slope, size = away * part.curvature, kl.clamp(min=1)
            elif method in ("kl_symmetry", "ess_balance"):
                slope = part.curvature if method == "kl_symmetry" else part.balance_slope
            else:
                return False
            if (slope * 2 * UNIT * alpha.clamp(min=UNIT) > 0.1 * self.settings.tol * size).any():
                return True
        return False

    def outside(self, x: Tensor, name: str, slack: Tensor, floor: float = -INF) -> Tensor:
        """Rows whose x is not, to within `slack`, among the numbers that belong to what rounds to the α reported."""
        ends = torch.stack([getattr(part, name) for part in (self.here, self.low, self.high)]).clamp(min=floor)
        return ~((x >= ends.amin(0) - slack) & (x <= ends.amax(0) + slack))

    def numbers(self) -> None:
        """KLs and ESS at the implementation's own α."""
        got, here = self.got, self.here
        for name in ("kl_theta", "kl_t"):
            x, exact = getattr(got, name), getattr(here, name)
            slack = self.allowed.relative * exact.abs().clamp(min=1) + self.half * exact.abs() + self.rounding
            self.report(
                f"{name} at its own alpha", self.usable & self.outside(x, name, slack), x, exact, "at", here.alpha
            )
        # below these numbers of a type have lost digits; promised of the kernels is 1e-30
        floor = math.log(1e-30 if self.impl == "triton" else 1e-300 if self.dtype == torch.float64 else 1e-37)
        slack = self.allowed.log_ess + 2 * self.half + 16 * UNIT * (here.f.abs() + here.f_sides) + self.rounding
        for name, inside in (("ess_theta", self.pair.theta_inside), ("ess_t", self.pair.t_inside)):
            x = getattr(got, name)
            self.report(f"{name} of a row with mass outside", self.usable & ~inside & (x != 0), x)
            off = self.outside(x.log().clamp(min=floor), name, slack, floor)
            self.report(
                f"{name} at its own alpha", self.usable & inside & off, x.log(), getattr(here, name), "at", here.alpha
            )

    def rule(self) -> None:
        """α where it is determined, and the rule's residual at it."""
        got, want, here, there, chosen = self.got, self.want, self.here, self.there, self.settings
        off = (got.alpha - want.alpha).abs()
        kind = f"alpha of {chosen.method}"
        if chosen.method == "fixed":
            exact = self.rounded(self.own.alpha)
            self.report(kind, self.usable & (got.alpha != exact), got.alpha, exact)
            return
        if chosen.method in BUDGETS:
            self.budget(off)
            return
        slack = self.half * want.alpha.abs() + self.allowed.alpha
        if chosen.method == "entropy":
            # float32 has nothing to say about entropies below its range
            determined = entropy(self.pair.a) + entropy(self.pair.b) > (1e-30 if self.impl == "triton" else 1e-290)
            self.report(kind, self.usable & determined & (off > slack), got.alpha, want.alpha)
            return
        zero, one = at(self.pair, torch.zeros_like(off), torch.ones_like(off))
        size = torch.maximum(there.kl_theta, there.kl_t).clamp(min=1)
        tolerance = self.allowed.relative
        if chosen.method == "reverse_kl_symmetry":  # a straight line from F'(0) − s to F'(1) − s, 0 at 1 − α
            weight = one.slope - zero.slope
            residual = [weight * part.alpha - one.gap for part in (self.low, self.high)]
            size = torch.maximum(size, one.gap.abs())
            rounding = 64 * UNIT * (zero.slope.abs() + one.slope.abs() + self.pair.secant.abs()) + self.rounding
            at_zero, at_one = zero.gap, one.gap
            determined, exists = weight > 1e-6, weight > 1e-14
        else:
            name = "gap" if chosen.method == "kl_symmetry" else "balance"
            weight = here.curvature if name == "gap" else here.balance_slope
            residual = [getattr(part, name) for part in (self.low, self.high)]
            rounding = self.rounding + 64 * UNIT * here.f_sides
            at_zero, at_one = getattr(zero, name), getattr(one, name)
            determined, exists = torch.minimum(there.curvature, here.curvature) > 1e-6, True
            if self.impl == "triton":
                tolerance = chosen.tol
        kinks = ~(self.pair.theta_inside & self.pair.t_inside)
        rootless = kinks & ((at_zero > 0) | (at_one < 0))
        # whether there is a root, and which end is the better one without it, hang on numbers that rounding may turn
        bound = tolerance * size + rounding
        worse = [torch.maximum(part.kl_theta, part.kl_t) for part in (zero, one)]
        unclear = rootless & ((worse[0] - worse[1]).abs() <= self.allowed.relative * size + rounding)
        unclear |= kinks & (torch.minimum(at_zero.abs(), at_one.abs()) <= bound)
        slack = slack + rounding / weight.clamp(min=1e-6)
        if tolerance > self.allowed.alpha:
            slack = slack + tolerance * size / weight.clamp(min=1e-6)
        wrong = self.usable & ~unclear & (off > slack)
        self.report("alpha without a root", wrong & rootless, got.alpha, want.alpha)
        self.report(kind, wrong & ~rootless & determined, got.alpha, want.alpha, "curvature", weight)
        low, high = self.rounded(self.own.low), self.rounded(self.own.high)
        above = (residual[0] > bound) & (got.alpha > low)  # the root lies below α
        below = (residual[1] < -bound) & (got.alpha < high)
        at_an_end = (got.alpha == low) | (got.alpha == high)
        wrong = self.usable & exists & (above | below) & (~rootless | unclear) & ~(unclear & at_an_end)
        self.report(f"residual of {chosen.method}", wrong, *residual, "at", here.alpha, "for", want.alpha)

    def budget(self, off: Tensor) -> None:
        """KL at its budget, or α at the end that is inside the ball or nearest to it; `off` is that of α."""
        got, want, own, method = self.got, self.want, self.own, self.settings.method
        name, sign = ("kl_theta", -1) if method == "kl_budget" else ("kl_t", 1)
        away = 1 - want.alpha if method == "kl_budget" else want.alpha
        residual = [sign * (getattr(part, name) - own.budget) for part in (self.low, self.high)]
        curvature = torch.minimum(self.here.curvature, self.there.curvature)
        rounding = self.rounding + 64 * UNIT * self.pair.norm_theta.abs()
        tolerance = self.settings.tol if self.impl == "triton" else self.allowed.relative
        bound = tolerance * getattr(self.there, name).clamp(min=1) + rounding
        left = bound if tolerance > self.allowed.alpha else rounding
        slack = self.half * want.alpha.abs() + self.allowed.alpha + moved(left, away * curvature, curvature)
        self.report(
            f"alpha of {method}",
            self.usable & (curvature > 1e-6) & (off > slack),
            got.alpha,
            want.alpha,
            "curvature",
            curvature,
        )
        above = (residual[0] > bound) & (got.alpha > self.rounded(own.low))  # the root lies below α
        below = (residual[1] < -bound) & (got.alpha < self.rounded(own.high))
        wrong = self.usable & (above | below)
        self.report(f"residual of {method}", wrong, *residual, "at", self.here.alpha, "for", want.alpha)

    def support(self) -> Tensor:
        """bool [B, V]: the tokens that the implementation keeps, which must be those of the reference at the same α."""
        right = truncate(self.here.log_q, self.pair, self.settings) > -INF
        if self.log_q is None:
            return right
        kept = self.log_q > -INF
        for row in (self.ok & (kept != right).any(-1)).nonzero()[:, 0].tolist():
            surely, possibly = self.bounds(row)
            wrong = (surely & ~kept[row]) | (kept[row] & ~possibly)
            shown = f"{int(kept[row].sum())} kept for {int(right[row].sum())}"
            if wrong.any():
                shown += f", wrong: {wrong.nonzero()[:5, 0].tolist()}"
                self.found.append(Disagreement("support of the truncated q", row, shown))
            elif self.twins_parted(row, kept[row]):
                self.found.append(Disagreement("equal tokens parted by truncation", row, shown))
            else:
                self.counts["tokens at a boundary"] += 1
        return torch.where(self.ok[:, None], kept, right)

    def twins_parted(self, row: int, kept: Tensor) -> bool:
        """Tokens whose logits are equal in both rows are kept or cut together."""
        pairs = torch.stack((self.pair.a[row], self.pair.b[row]), 1)[self.pair.common[row]]
        kept = kept[self.pair.common[row]]
        _, group = pairs.unique(dim=0, return_inverse=True)
        counts = torch.zeros(len(pairs), 2, device=kept.device).index_put_(
            (group, kept.long()), torch.ones_like(kept, dtype=torch.float32), accumulate=True
        )
        return bool((counts.amin(-1) > 0).any())

    def value_slack(self, row: int) -> Tensor:
        """[V], how far values may be off one another: rounding of their sums, and of the α that is reported."""
        d = torch.where(self.pair.common[row], self.pair.a[row] - self.pair.b[row], 0.0)
        moved = self.half * self.here.alpha[row] * (d - d[self.here.log_q[row].argmax()]).abs()
        return self.allowed.value * self.token_size[row] + moved

    def bounds(self, row: int) -> tuple[Tensor, Tensor]:
        """The tokens that truncation must keep and those that it may keep, bool [V] each.

        A token is in doubt where its value, or the mass or number that stands above it, comes within rounding of the
        threshold.
        """
        chosen, pair = self.settings, self.pair
        common = pair.common[row]
        slack = self.value_slack(row)
        surely = possibly = common
        log_t = pair.b[row] - pair.norm_t[row]
        slack_t = self.allowed.value * (pair.b[row].abs().nan_to_num(posinf=0.0) + pair.norm_t[row].abs())
        if chosen.target_top_k or chosen.target_top_p < 1:
            allowed = log_t > -INF
            kept = cut_bounds(
                log_t, slack_t, self.allowed.mass, allowed, allowed, chosen.target_top_k, chosen.target_top_p
            )
            surely, possibly = surely & kept[0], possibly & kept[1]
        value = self.here.log_q[row]
        surely, possibly = cut_bounds(value, slack, self.allowed.mass, surely, possibly, chosen.top_k, chosen.top_p)
        if chosen.min_p > 0 and possibly.any():
            low, high = value - slack, value + slack
            greatest = high.masked_fill(~possibly, -INF).amax()
            least = low.masked_fill(~surely, -INF).amax()
            surely = surely & (low >= greatest + math.log(chosen.min_p))
            possibly = possibly & (high >= least + math.log(chosen.min_p))
        return surely, possibly

    def whole(self, support: Tensor) -> None:
        """log q right after renormalising on the implementation's own support."""
        low, high, _ = self.log_q_on(support)
        wrong = self.ok[:, None] & support & ~((self.log_q >= low) & (self.log_q <= high))
        at = wrong.long().argmax(-1, keepdim=True)
        numbers = (x.gather(-1, at)[:, 0] for x in (self.log_q, low, high))
        self.report("whole log q", wrong.any(-1), *numbers, "of", at[:, 0])

    def log_q_on(self, support: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Least and greatest log q that may be reported, and the one at the reported α: [B, V] each."""
        parts = []
        for part in (self.here, self.low, self.high):
            kept = part.log_q.masked_fill(~support, -INF)
            parts.append(kept - kept.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0))
        ends = torch.stack(parts)
        size = ends[0].abs().nan_to_num(posinf=0.0)
        slack = (
            self.allowed.relative * size.clamp(min=1)
            + self.half * size
            + 32 * UNIT * self.token_size
            + self.rounding[:, None]
        )
        return ends.amin(0) - slack, ends.amax(0) + slack, ends[0]

    def at_token(self, support: Tensor, drawn: bool) -> None:
        """The three log-probabilities of the token."""
        got = self.got
        known = self.ok & (got.token >= 0) & (got.token < self.vocab_size)
        index = got.token.clamp(0, self.vocab_size - 1)[:, None]
        inside = support.gather(-1, index)[:, 0]
        low, high, here = (x.gather(-1, index)[:, 0] for x in self.log_q_on(support))
        if drawn:
            self.report("token outside the support", known & ~inside, got.token, got.logq)
        else:
            self.report("logq of a token that is cut", known & ~inside & (got.logq > -INF), got.logq)
        off = ~((got.logq >= low) & (got.logq <= high))
        self.report("logq", known & inside & off, got.logq, here, "at", self.here.alpha)
        for name, logits in (("logp_theta", self.theta), ("logp_t", self.t)):
            x = getattr(got, name)
            usable = logits.masked_fill(~self.usable[:, None], 0.0)
            exact = usable.log_softmax(-1).gather(-1, index)[:, 0]
            size = (usable - usable.amax(-1, keepdim=True)).gather(-1, index)[:, 0].abs().nan_to_num(posinf=0.0)
            slack = self.allowed.relative * exact.abs().clamp(min=1) + self.half * exact.abs() + 16 * UNIT * size
            self.report(name, known & ~((x == exact) | ((x - exact).abs() <= slack)), x, exact)

    def token(self, support: Tensor) -> None:
        """The reference's token, where it has one; of two whose keys float64 cannot tell apart, either."""
        got, want = self.got.token, self.want.token
        differs = self.ok & (self.want.status == Status.OK) & (got != want) & (got >= 0) & (got < self.vocab_size)
        for row in differs.nonzero()[:, 0].tolist():
            if lead := self.lead(row, support[row]):
                self.found.append(Disagreement("token", row, f"{int(got[row])} for {int(want[row])}, behind by {lead}"))
            else:
                self.counts["ties"] += 1

    def doubt(self, row: int) -> float:
        """How far float64 leaves the rule's α undetermined."""
        method, part = self.settings.method, self.there
        if method == "fixed":
            return 0.0
        if method in BUDGETS:
            away = 1 - part.alpha if method == "kl_budget" else part.alpha
            size = part.f.abs() + part.slope.abs() + self.pair.norm_theta.abs() + self.pair.norm_t.abs()
            left = 4e-15 + 64 * UNIT * size
            return min(1.0, float(moved(left, away * part.curvature, part.curvature)[row]))
        size = part.f_sides if method == "ess_balance" else part.slope.abs() + self.pair.secant.abs()
        weight = part.balance_slope if method == "ess_balance" else part.curvature
        return min(1.0, float((2e-14 + 64 * UNIT * size[row]) / weight[row].clamp(min=1e-300)))

    def lead(self, row: int, support: Tensor) -> str | None:
        """By how much the best key is ahead of the drawn token's, None where that is rounding of float64."""
        token = int(self.got.token[row])
        value = self.there.log_q[row].masked_fill(~support, -INF)
        if not support[token]:
            return "everything: it is outside the support"
        value = value - value.logsumexp(-1)
        d = torch.where(self.pair.common[row], self.pair.a[row] - self.pair.b[row], 0.0)
        slack, doubt = 16 * UNIT * self.token_size[row], self.doubt(row)
        if self.settings.truncates and self.allowed.truncated_key:
            slack = slack + self.allowed.truncated_key
            doubt += self.half + float((self.got.alpha[row] - self.there.alpha[row]).abs())
        slack = slack + doubt * (d - self.there.slope[row]).abs()
        if self.settings.temperature == 0:
            best = int(value.argmax())
            behind = value[best] - value[token]
            return None if behind <= slack[best] + slack[token] else f"{behind:.3g}"
        seeds, positions = (self.index[name][row : row + 1] for name in ("seeds", "positions"))
        groups = -(-len(value) // GROUP_SIZE)
        padding = (0, groups * GROUP_SIZE - len(value))
        padded = torch.nn.functional.pad(value, padding, value=-INF).view(groups, GROUP_SIZE)
        mass = padded.logsumexp(-1)
        slacks = torch.nn.functional.pad(slack, padding).view(groups, GROUP_SIZE)
        slack_of_group = ((padded - mass[:, None]).exp().nan_to_num(nan=0.0) * slacks).sum(-1)
        group = token // GROUP_SIZE
        levels = (
            (mass, slack_of_group, 0, GROUP_STREAM, group),
            (padded[group], slacks[group], group * GROUP_SIZE, TOKEN_STREAM, token % GROUP_SIZE),
        )
        for values, doubts, first, stream, chosen in levels:
            noise = gumbel(seeds, positions, torch.full_like(seeds, first), len(values), stream)[0]
            key = values + noise
            best = int(key.argmax())
            behind = float(key[best] - key[chosen])
            rounding = 64 * UNIT * (1 + noise[[best, chosen]].abs().sum() + values[[best, chosen]].abs().sum())
            allowed = float(doubts[best] + doubts[chosen] + rounding)
            if behind > allowed:
                return f"{behind:.3g} (allowed {allowed:.2g})"
        return None


def cut_bounds(
    value: Tensor, slack: Tensor, mass_slack: float, surely: Tensor, possibly: Tensor, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Top-k, then top-p of values [V] that are each known to within `slack` [V], and their masses to `mass_slack`.

    Takes the tokens that are there for certain and those that may be, and returns the same of what is kept: bool [V].
    """
    bottom, top = value - slack, value + slack
    itself = top > bottom

    def above(ends: Tensor, members: Tensor, counts: Tensor, limits: Tensor) -> Tensor:
        """Sum of `counts` [V] over the members whose end is above a token's limit, [V]."""
        order = ends.masked_fill(~members, -INF).sort(descending=True)
        sums = torch.cat((counts.new_zeros(1), counts.masked_fill(~members, 0.0)[order.indices].cumsum(0)))
        return sums[torch.searchsorted(-order.values, -limits)]

    if 0 < top_k < len(value):
        one = torch.ones_like(value)
        least = above(bottom, surely, one, top)
        most = above(top, possibly, one, bottom) - (possibly & itself).double()
        surely, possibly = surely & (most < top_k), possibly & (least < top_k)
    if top_p < 1 and possibly.any():
        greatest = top.masked_fill(~possibly, -INF).amax()
        low, high = (bottom - greatest).exp(), (top - greatest).exp()
        # the share above a token is greatest where what may be above it weighs much, and the rest of the certain little
        over = above(top, possibly, high, bottom)
        # what is left of a sum when all but its rounding is taken out is that rounding
        over = over - torch.where(possibly & itself, high, 0.0) + 4 * UNIT * over
        rest = low[surely].sum() - (above(top, surely, low, bottom) - torch.where(surely & itself, low, 0.0))
        most = over.clamp(min=0) / (over + rest).clamp(min=1e-320)
        over = above(bottom, surely, low, top)
        rest = high[possibly].sum() - above(bottom, possibly, high, top)
        least = over / (over + rest).clamp(min=1e-320)
        surely, possibly = surely & (most * (1 + mass_slack) < top_p), possibly & (least / (1 + mass_slack) < top_p)
    return surely, possibly
