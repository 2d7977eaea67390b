"""Random rows, types, layouts and settings: every implementation against the reference, until time is up.

    python -m tests.fuzz --impl cpu --minutes 60 --seed 5
    python -m tests.fuzz --impl triton                  # in Triton's interpreter
    python -m tests.fuzz --impl triton --device cuda --copies 256
    python -m tests.fuzz --case '{"vocab_size": …}'     # one case again

A case (`cases`) is a dict of kinds, sizes and seeds that `rows_of` makes logits from; `disagreements` runs it and says
what is wrong. What goes wrong is shrunk by Hypothesis, printed as code that needs nothing of this file, and appended to
`fixtures/fuzz.jsonl`, which `test_fuzz.py` replays.

Cases run in a process of their own that leaves the case at hand on disk: one that never returns, or kills the process,
is a disagreement like any other.
"""

import argparse
import dataclasses
import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from qstar_kernels import METHODS, QStarStep, Status, qstar_logprobs, qstar_sample, qstar_stats
from qstar_kernels.noise import GROUP_SIZE, GROUP_STREAM, TOKEN_STREAM, gumbel
from qstar_kernels.reference import Pair, entropy, make_pair, qstar_reference, truncate
from qstar_kernels.types import Settings, mask_of, output_dtype
from tests.interpreter import interpret_quickly, poisoned

EXAMPLES = Path(__file__).with_name("fixtures") / "fuzz.jsonl"
INF = torch.inf
FLOATS = ("alpha", "kl_theta", "kl_t", "ess_theta", "ess_t")
AT_TOKEN = ("logq", "logp_theta", "logp_t")
CHUNK = 300  # cases that one run of Hypothesis makes
SHRINKING = 20.0  # seconds for each disagreement
UNIT = 2.0**-52  # a step of float64 at 1
HALF32 = 2.0**-24  # what rounding to float32 moves a number by, relative


# Cases

TYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = ("plain", "padded", "columns", "transposed", "offset", "every other row", "expanded")
PLAIN_TYPES = [(x, x) for x in TYPES[:3]]
MIXED_TYPES = [(x, y) for x in TYPES for y in TYPES]
FRACTIONS = (0.5, 0.9, 0.1, 0.999, 1e-3, 1 - 1e-12, 1e-12, 1 - 2**-53, 1e-300)
MASKS = ("-inf", "finfo.min", "-1e4", "-6e4", "-1e9")
BAD = ("nan", "+inf", "none", "none by finfo.min", "disjoint")


@st.composite
def rows(draw) -> dict:
    """What `pair_of` makes a pair of rows from."""
    base = draw(st.sampled_from(("normal", "zipf", "sharp", "flat", "near", "identical")))
    made = {"base": base, "seed": draw(st.integers(0, 9999))}
    if base in ("normal", "zipf"):
        made["noise"] = draw(st.sampled_from((1.0, 0.1, 0.5, 2.0, 4.0, 8.0, 0.01)))
    elif base == "near":
        made["noise"] = draw(st.sampled_from((1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)))
    feature = draw(st.integers(0, 15))
    if feature in (8, 9, 10):
        made["spikes"] = [
            [draw(st.sampled_from(("theta", "t"))), draw(st.integers(0, 9)), draw(st.integers(15, 200))]
            for _ in range(draw(st.integers(1, 3)))
        ]
    if feature in (10, 11, 12):
        made["mask"] = [
            draw(st.sampled_from(("theta", "t", "both", "each"))),
            draw(st.sampled_from((0.5, 0.1, 0.9, 1.0))),  # 1: all but one
            draw(st.sampled_from(MASKS)),
            draw(st.sampled_from(MASKS)),
        ]
    if feature in (12, 13):
        made["grid"] = draw(st.sampled_from((1.0, 0.25, 4.0)))
    if feature in (13, 14):
        made["offset"] = [draw(st.sampled_from((0.0, 3e4, -3e4, 1.0))), draw(st.sampled_from((0.0, 3e4, -3e4)))]
    if feature == 15:
        made["bad"] = draw(st.sampled_from(BAD))
    return made


@st.composite
def cases(draw, interpreted: bool, copies: int = 1, float64: bool = True) -> dict:
    """A call: what, with which settings, on which rows. Everything shrinks towards the plain."""

    def one_in(n: int) -> bool:
        return draw(st.integers(0, n - 1)) == n - 1

    def fraction(*extremes: float) -> float:
        return draw(st.sampled_from(FRACTIONS + extremes)) if draw(st.booleans()) else draw(st.floats(1e-6, 1 - 1e-6))

    sizes = [
        st.integers(1, 12),
        st.integers(1, 40),
        st.integers(41, 300),
        st.sampled_from((255, 256, 257, 1023, 1024, 1025)),
    ]
    large = st.integers(301, 1100) if interpreted else st.integers(301, 5000)
    sizes += [large, st.sampled_from((1100, 2048, 2049) if interpreted else (2047, 2048, 2049, 3073, 4096, 5000))]
    size = draw(st.sampled_from((0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 4) + (() if interpreted else (5,))))
    if interpreted and size == 4 and one_in(3):
        size = 5
    case = {"what": draw(st.sampled_from(("sample", "log_q", "tokens"))), "vocab_size": draw(sizes[size])}
    types = draw(st.sampled_from(MIXED_TYPES if one_in(3) else PLAIN_TYPES))
    if float64 or "float64" not in types:
        case["types"] = list(types)
    else:
        case["types"] = ["float32", "float32"]
    if one_in(4):
        case["layouts"] = [draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))]
    case["rows"] = draw(st.lists(rows(), min_size=1, max_size=4))
    if copies > 1:
        case["copies"] = copies
    chosen = {"method": draw(st.sampled_from(METHODS))}
    if chosen["method"] == "fixed":
        chosen["alpha"] = fraction(0.0, 1.0)
    if one_in(5):
        chosen["alpha_min"], chosen["alpha_max"] = sorted((fraction(0.0, 1.0), fraction(0.0, 1.0)))
    temperature = draw(st.integers(0, 7))
    if temperature == 4:
        chosen["temperature"] = 0.0
    elif temperature > 4:
        chosen["temperature"] = 10.0 ** (draw(st.integers(-60, 60)) / 10)
    cuts = draw(st.integers(0, 47))  # half of the cases are not truncated; the others by any of the five
    if cuts >= 16:
        cuts -= 15
        counts = st.one_of(st.integers(1, 5), st.sampled_from((50, case["vocab_size"], 2**31, 2**63 - 1, 2**64 + 1)))
        if cuts & 1:
            chosen["top_p"] = fraction()
        if cuts & 2:
            chosen["top_k"] = draw(counts)
        if cuts & 4:
            chosen["min_p"] = fraction(1.0)
        if cuts & 8:
            chosen["target_top_p"] = fraction()
        if cuts & 16:
            chosen["target_top_k"] = draw(counts)
    if one_in(16):
        chosen["tol"] = draw(st.sampled_from((1e-3, 1.0, 1e-7)))
    case["settings"] = chosen
    if case["what"] == "sample":
        case["seed"], case["position"] = draw(st.integers(-(2**63), 2**63 - 1)), draw(st.sampled_from((0, 1, 2**40)))
    elif case["what"] == "tokens":
        edge = case["vocab_size"]
        token = st.one_of(st.integers(0, edge - 1), st.sampled_from((-1, edge, edge - 1, 2**31, -(2**63))))
        case["tokens"] = draw(st.lists(token, min_size=1, max_size=4))
    if one_in(12):
        case["alone"] = True
    if one_in(40):
        case["default_device"] = "meta"
    return case


def pair_of(row: dict, copies: int, vocab_size: int, types: list[str]) -> tuple[Tensor, Tensor]:
    """π_θ's and π_t's logits, float64 [copies, V] each, to be rounded to `types`."""
    g = torch.Generator().manual_seed(row["seed"])

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(copies, vocab_size, generator=g, dtype=torch.float64)

    base, noise = row["base"], row.get("noise", 0.0)
    if base == "normal":
        sides = [normal(noise), normal(noise)]
    elif base == "zipf":
        rank = normal(1).argsort(-1)
        sides = [(-1.1 * torch.log1p(rank.double())) + normal(1)]
        sides.append(sides[0] + normal(noise))
    elif base == "sharp":
        sides = [normal(20), normal(20)]
    elif base == "flat":
        sides = [torch.zeros(copies, vocab_size, dtype=torch.float64), normal(1e-6)]
    else:
        sides = [normal(2)]
        sides.append(sides[0] + normal(noise))
    if "grid" in row:
        sides = [(x / row["grid"]).round() * row["grid"] for x in sides]
    for side, token, height in row.get("spikes", ()):
        sides[side == "t"][:, token % vocab_size] += height
    for side, offset in enumerate(row.get("offset", ())):
        sides[side] += offset
    if "mask" in row:
        where, share, *values = row["mask"]
        hits = [torch.rand(copies, vocab_size, generator=g) < share for _ in range(2)]
        kept = torch.randint(vocab_size, (copies, 1), generator=g)  # a token that both allow
        for side, name in enumerate(("theta", "t")):
            if where in (name, "both", "each"):
                hit = hits[side if where == "each" else 0].scatter(1, kept, False)
                sides[side] = sides[side].masked_fill(hit, number_of(values[side], types[side]))
    bad = row.get("bad")
    if bad == "nan":
        sides[0][:, -1] = torch.nan
    elif bad == "+inf":
        sides[1][:, 0] = INF
    elif bad in ("none", "none by finfo.min"):
        sides[1].fill_(-INF if bad == "none" else number_of("finfo.min", types[1]))
    elif bad == "disjoint":
        even = torch.arange(vocab_size) % 2 == 0
        sides = [sides[0].masked_fill(even, -INF), sides[1].masked_fill(~even, -INF)]
    return tuple(sides)


def number_of(mask: str, dtype: str) -> float:
    if mask == "finfo.min":
        return torch.finfo(getattr(torch, dtype)).min
    return max(float(mask), -6e4) if dtype == "float16" and mask != "-inf" else float(mask)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same rows [B, V] with other strides, NaN around them."""
    rows, columns = x.shape
    if layout == "padded":
        wide = x.new_full((rows, columns + 8), torch.nan)
        view = wide[:, 3 : 3 + columns]
    elif layout == "columns":
        view = x.new_full((rows, 3 * columns + 1), torch.nan)[:, 1::3]
    elif layout == "transposed":
        view = torch.empty_like(x.T.contiguous()).T
    elif layout == "offset":
        view = x.new_full((rows * columns + 1,), torch.nan)[1:].view(rows, columns)
    elif layout == "every other row":
        view = x.new_full((2 * rows, columns), torch.nan)[::2]
    elif layout == "expanded":
        return x[:1].expand(rows, columns)
    else:
        return x
    return view.copy_(x)


def rows_of(case: dict, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Both models' logits [B, V] in their types and layouts. The numbers are made on the CPU: the same everywhere."""
    vocab_size, copies, types = case["vocab_size"], case.get("copies", 1), case["types"]
    pairs = [pair_of(row, copies, vocab_size, types) for row in case["rows"]]
    sides = []
    for side in range(2):
        rows = torch.cat([pair[side] for pair in pairs])
        if "only" in case:
            rows = rows[case["only"]]
        rows = rows.to(getattr(torch, types[side])).to(device)
        sides.append(laid_out(rows, case.get("layouts", ("plain", "plain"))[side]))
    return sides[0], sides[1]


def index_of(case: dict, rows: int, device: str) -> dict[str, Tensor]:
    """The int64 [B] that go with the rows, by the name of their argument."""
    if case["what"] == "log_q":
        return {}
    which = case.get("only", range(len(case["rows"]) * case.get("copies", 1)))[:rows]
    if case["what"] == "tokens":
        given = case["tokens"]
        return {"tokens": torch.tensor([given[i % len(given)] for i in which], device=device)}
    wrapped = [(case["seed"] + 7 * i + 2**63) % 2**64 - 2**63 for i in which]
    return {
        "seeds": torch.tensor(wrapped, device=device),
        "positions": torch.tensor([case["position"] + i for i in which], device=device),
    }


# Comparing


@dataclass(frozen=True)
class Allowance:
    """What an implementation may differ from the reference by, for the reasons given."""

    relative: float  # of a number (of 1, where it is smaller)
    log_ess: float
    alpha: float  # where F'' (for the other rules: what stands in its place) is above 1e-6
    inner: float  # a step of the type that values are compared and drawn in
    noise: float  # of a Gumbel variable


ALLOWED = {
    # sums in float64; a last step of up to 1e-3 / √F'' by Taylor's formula, whose remainder is of the third power
    "cpu": Allowance(relative=1e-8, log_ess=1e-5, alpha=1e-6, inner=UNIT, noise=1e-12),
    # what is promised; exponents in float32; noise by float32 logarithms
    "triton": Allowance(relative=1e-5, log_ess=1e-4, alpha=1e-5, inner=2.0**-22, noise=4e-6),
    "reference": Allowance(relative=1e-12, log_ess=1e-12, alpha=1e-12, inner=UNIT, noise=1e-14),
}


@dataclass(frozen=True)
class Disagreement:
    kind: str
    row: int
    detail: str


class At:
    """What the reference's formulas say at given α [B]: before truncation, float64."""

    def __init__(self, pair: Pair, alpha: Tensor):
        self.alpha = alpha
        self.log_q, self.f, self.slope, self.curvature = pair.curve(alpha)
        self.kl_theta, self.kl_t = pair.kls(alpha, self.f, self.slope)
        _, f_high, _, self.curvature_high = pair.curve(2 - alpha)
        _, f_low, _, self.curvature_low = pair.curve(-alpha)
        self.ess_theta = (2 * pair.norm_theta - self.f - f_high).masked_fill(~pair.theta_inside, -INF)  # logarithms
        self.ess_t = (2 * pair.norm_t - self.f - f_low).masked_fill(~pair.t_inside, -INF)
        self.gap = self.slope - pair.secant
        self.balance = f_low - f_high + 2 * pair.secant
        self.f_sides = f_high.abs() + f_low.abs()


def stacked(pair: Pair, times: int) -> Pair:
    fields = {f.name: getattr(pair, f.name) for f in dataclasses.fields(pair)}
    return Pair(**{k: v.repeat(times, *(1,) * (v.ndim - 1)) for k, v in fields.items()})


def neighbourhood(alpha: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ends of what rounds to α in the output's type; a bracket of float64 is not closed further than 1e-15."""
    if dtype == torch.float64:
        return (alpha - 1e-15).clamp(min=0), (alpha + 1e-15).clamp(max=1)
    narrow = alpha.to(dtype)
    ends = (narrow.nextafter(torch.full_like(narrow, x)).double() for x in (-1.0, 2.0))
    low, high = ((alpha + x) / 2 for x in ends)
    return low.clamp(0, 1), high.clamp(0, 1)


def call(case: dict, impl: str, theta: Tensor, t: Tensor, index: dict[str, Tensor]) -> tuple[QStarStep, Tensor | None]:
    options = case["settings"] | {"impl": impl}
    with torch.device(case["default_device"]) if "default_device" in case else nullcontext():
        if case["what"] == "sample":
            return qstar_sample(theta, t, **index, **options), None
        if case["what"] == "tokens":
            return qstar_stats(theta, t, **index, **options), None
        log_q, step = qstar_logprobs(theta, t, **options)
        return step, log_q


def disagreements(case: dict, impl: str, device: str = "cpu", counts: Counter | None = None) -> list[Disagreement]:
    """Run a case and compare; `counts` takes the ties that were proved."""
    theta, t = rows_of(case, device)
    chosen = Settings(**case["settings"])
    index = index_of(case, len(theta), device)
    with poisoned(), Watch.over(case):
        got, got_log_q = call(case, impl, theta, t, index)
        support_log_q = got_log_q
        if support_log_q is None and chosen.truncates:
            support_log_q = call(case | {"what": "log_q"}, impl, theta, t, {})[1]
        alone = None
        if case.get("alone"):
            which = (case["vocab_size"] + len(theta)) % len(theta)
            one = slice(which, which + 1)
            alone = call(case, impl, theta[one], t[one], {k: v[one] for k, v in index.items()})
    want, _ = qstar_reference(theta, t, chosen, **index)
    comparison = Comparison(case, impl, theta, t, chosen, index, got, got_log_q, support_log_q, want)
    if alone is not None:
        comparison.alone(which, *alone)
    comparison.run()
    if counts is not None:
        counts.update(comparison.counts)
    return comparison.found


class Comparison:
    """One call's results against the reference's; what is wrong is in `found`, at most one row for each kind."""

    def __init__(self, case, impl, theta, t, chosen, index, got, got_log_q, support_log_q, want):
        self.case, self.settings, self.index, self.want = case, chosen, index, want
        self.raw, self.got, self.dtype = got, got.to(torch.float64), output_dtype(theta, t)
        self.log_q = None if got_log_q is None else got_log_q.double()
        self.support_log_q = None if support_log_q is None else support_log_q.double()
        self.theta, self.t = (x.double().masked_fill(x <= mask_of(x.dtype), -INF) for x in (theta, t))
        self.allowed, self.impl = ALLOWED[impl], impl
        self.half = 0.0 if self.dtype == torch.float64 else HALF32
        self.found: list[Disagreement] = []
        self.counts: Counter = Counter()

    def report(self, kind: str, wrong: Tensor, *numbers: Tensor) -> None:
        """Rows of `wrong` [B], with what was got and what is right, as [B] each."""
        if not wrong.any():
            return
        row = int(wrong.nonzero()[0, 0])
        shown = ", ".join(f"{x[row].item():.9g}" if torch.is_tensor(x) else str(x) for x in numbers)
        self.found.append(Disagreement(kind, row, shown))
        self.counts["disagreements"] += int(wrong.sum())

    def alone(self, row: int, step: QStarStep, log_q: Tensor | None) -> None:
        """The same bits, whatever stands beside it."""
        names = [f.name for f in dataclasses.fields(step) if getattr(step, f.name) is not None]
        pairs = [(name, getattr(self.raw, name)[row], getattr(step, name)[0]) for name in names]
        if log_q is not None:
            pairs.append(("log q", self.log_q[row], log_q[0].double()))
        for name, among, single in pairs:
            if not torch.equal(among.nan_to_num(nan=7e7), single.nan_to_num(nan=7e7)):
                self.found.append(Disagreement(f"bits of {name} alone and among others", row, f"{among} {single}"))

    def run(self) -> None:
        got, want = self.got, self.want
        drawn, looked_up = "seeds" in self.index, "tokens" in self.index
        status = got.status
        self.patterns(drawn, looked_up)
        same = status == want.status
        usable = same & ((status == Status.OK) | (status == Status.EMPTY))
        theta, t = (x.masked_fill(~usable[:, None], 0.0) for x in (self.theta, self.t))
        self.pair = make_pair(theta, t, self.settings.temperature or 1.0)
        alpha = torch.where(usable & got.alpha.isfinite(), got.alpha, want.alpha.nan_to_num(nan=0.5)).clamp(0, 1)
        low, high = neighbourhood(alpha, self.dtype)
        rows = len(alpha)
        at = At(stacked(self.pair, 4), torch.cat((alpha, low, high, want.alpha.nan_to_num(nan=0.5))))
        parts = [{k: v[i * rows : (i + 1) * rows] for k, v in vars(at).items()} for i in range(4)]
        self.here, self.low, self.high, self.there = parts
        self.usable = usable & got.alpha.isfinite()
        # what float64 leaves on sums of numbers of this size: both sides make such errors
        size = self.pair.a.abs().nan_to_num(posinf=0) + self.pair.b.abs().nan_to_num(posinf=0)  # [B, V]
        self.token_size = size + self.here["f"].abs()[:, None]
        q = self.here["log_q"].exp()
        d = torch.where(self.pair.common, self.pair.a - self.pair.b, 0.0)
        self.deviation = (d - self.here["slope"][:, None]).abs()  # [B, V]
        spread = (q * self.deviation * self.token_size).sum(-1)
        norms = self.pair.norm_theta.abs() + self.pair.norm_t.abs()
        self.rounding = 16 * UNIT * (self.here["f"].abs() + self.here["slope"].abs() + norms + spread)
        self.statuses(same)
        self.numbers()
        self.rule()
        support = self.support()
        if drawn or looked_up:
            self.at_token(support, drawn)
        if self.log_q is not None:
            self.whole(self.log_q, support)
        if drawn:
            self.token(support)

    def patterns(self, drawn: bool, looked_up: bool) -> None:
        """What the docstrings say of fields whatever the numbers are."""
        got, vocab_size = self.got, self.case["vocab_size"]
        solved = (got.status == Status.OK) | (got.status == Status.EMPTY)
        ok = got.status == Status.OK
        for name in FLOATS:
            x = getattr(got, name)
            self.report(f"{name} not finite", solved & ~x.isfinite(), x)
            self.report(f"{name} of an unusable row is not NaN", ~solved & ~x.isnan(), x)
        for name in ("kl_theta", "kl_t"):
            self.report(f"{name} < 0", getattr(got, name) < 0, getattr(got, name))
        for name in ("ess_theta", "ess_t"):
            x = getattr(got, name)
            self.report(f"{name} outside [0, 1]", (x < 0) | (x > 1), x)
        ends = (
            torch.tensor([self.settings.alpha_min, self.settings.alpha_max], dtype=torch.float64)
            .to(self.dtype)
            .double()
        )
        self.report("alpha outside its range", (got.alpha < ends[0].item()) | (got.alpha > ends[1].item()), got.alpha)
        if not (drawn or looked_up):
            fields = (got.token, *(getattr(got, name) for name in AT_TOKEN))
            if any(x is not None for x in fields):
                self.found.append(Disagreement("fields of a token that nobody asked for", 0, ""))
        else:
            if drawn:
                inside = (got.token >= 0) & (got.token < vocab_size)
                self.report("no token", ok & ~inside, got.token)
                self.report("a token of an unusable row", ~ok & (got.token != -1), got.token)
                known = ok
            else:
                self.report("token is not the given one", got.token != self.index["tokens"], got.token)
                known = ok & (got.token >= 0) & (got.token < vocab_size)
            for name in AT_TOKEN:
                x = getattr(got, name)
                self.report(f"{name} not finite", known & (x.isnan() | x.isposinf() | (x.isinf() & drawn)), x)
                self.report(f"{name} above 0 by rounding", known & (x > 0) & (x <= 1e-6), x)
                self.report(f"{name} above 0", known & (x > 1e-6), x)
                self.report(f"{name} without a token is not NaN", ~known & ~x.isnan(), x)
        for log_q in (self.log_q, self.support_log_q):
            if log_q is None:
                continue
            worst = log_q.amax(-1)
            self.report("log q above 0 by rounding", ok & (worst > 0) & (worst <= 1e-6), worst)
            self.report("log q above 0", ok & (worst > 1e-6), worst)
            self.report("log q NaN", ok & log_q.isnan().any(-1))
            self.report("log q of an unusable row is not NaN", ~ok & ~log_q.isnan().all(-1))
            break

    def statuses(self, same: Tensor) -> None:
        """Equal, but for a support that is empty or not by a token at the boundary."""
        wrong = ~same
        for row in wrong.nonzero()[:, 0].tolist():
            pair = {int(self.got.status[row]), int(self.want.status[row])}
            self.found.append(
                Disagreement(
                    "status " + " for ".join(Status(int(s.status[row])).name for s in (self.got, self.want)),
                    row,
                    str(pair),
                )
            )
            self.counts["disagreements"] += 1

    def outside(self, x: Tensor, name: str, slack: Tensor) -> Tensor:
        """Rows whose x is not among the values that α's rounding leaves, to within `slack`."""
        ends = torch.stack([part[name] for part in (self.here, self.low, self.high)])
        low, high = ends.amin(0), ends.amax(0)
        return ~((x >= low - slack) & (x <= high + slack)) & ~((x == low) | (x == high))

    def numbers(self) -> None:
        """KLs and ESS at the implementation's own α."""
        got, here = self.got, self.here
        for name in ("kl_theta", "kl_t"):
            x = getattr(got, name)
            slack = self.allowed.relative * here[name].abs().clamp(min=1) + self.half * here[name].abs() + self.rounding
            self.report(
                f"{name} at its own alpha",
                self.usable & self.outside(x, name, slack),
                x,
                here[name],
                "at",
                here["alpha"],
            )
        tiny = 1e-300 if self.dtype == torch.float64 else 1e-37  # subnormal numbers have lost digits
        floor = math.log(tiny) if self.impl != "triton" else math.log(1e-30)
        slack = self.allowed.log_ess + self.half * 2 + 16 * UNIT * (here["f"].abs() + here["f_sides"]) + self.rounding
        for name, side in (("ess_theta", "theta_inside"), ("ess_t", "t_inside")):
            x = getattr(got, name)
            inside = getattr(self.pair, side)
            self.report(f"{name} of a row with mass outside", self.usable & ~inside & (x != 0), x)
            for part in (self.here, self.low, self.high):
                part[name] = part[name].clamp(min=floor, max=0)
            log = x.log().clamp(min=floor, max=0)
            self.report(
                f"{name} at its own alpha",
                self.usable & inside & self.outside(log, name, slack),
                log,
                here[name],
                "at",
                here["alpha"],
            )

    def rule(self) -> None:
        """α where it is determined, and the rule's residual at it."""
        got, want, here, there, chosen = self.got, self.want, self.here, self.there, self.settings
        off = (got.alpha - want.alpha).abs()
        size = torch.maximum(there["kl_theta"], there["kl_t"]).clamp(min=1)
        slack = self.half * want.alpha.abs() + self.allowed.alpha
        iterative = chosen.method in ("kl_symmetry", "ess_balance")
        tolerance = chosen.tol if self.impl == "triton" and iterative else self.allowed.relative
        if chosen.method == "fixed":
            exact = min(max(chosen.alpha, chosen.alpha_min), chosen.alpha_max)
            exact = torch.tensor(exact, dtype=torch.float64).to(self.dtype).item()
            self.report(f"alpha of {chosen.method}", self.usable & (got.alpha != exact), got.alpha)
            return
        if chosen.method == "entropy":
            total = entropy(self.pair.a) + entropy(self.pair.b)
            # float32 sums have nothing to say about entropies below its range
            determined = total > (1e-30 if self.impl == "triton" else 1e-290)
            self.report(f"alpha of {chosen.method}", self.usable & determined & (off > slack), got.alpha, want.alpha)
            return
        at_ends = At(stacked(self.pair, 2), torch.cat((torch.zeros_like(off), torch.ones_like(off))))
        rows = len(off)
        zero, one = ({k: v[i * rows : (i + 1) * rows] for k, v in vars(at_ends).items()} for i in range(2))
        if chosen.method == "reverse_kl_symmetry":
            weight = one["slope"] - zero["slope"]
            wanted = one["gap"] / weight
            size = torch.maximum(size, one["gap"].abs())
            residual = [weight * (part["alpha"] - wanted) for part in (self.low, self.high)]
            rounding = 64 * UNIT * (zero["slope"].abs() + one["slope"].abs() + self.pair.secant.abs()) + self.rounding
            at_zero, at_one = zero["gap"], one["gap"]
            determined = weight > 1e-6
            exists = weight > 1e-14
        else:
            name = "gap" if chosen.method == "kl_symmetry" else "balance"
            residual = [part[name] for part in (self.low, self.high)]
            weight = here["curvature"] if name == "gap" else here["curvature_high"] + here["curvature_low"]
            rounding = self.rounding + 64 * UNIT * here["f_sides"]
            at_zero, at_one = zero[name], one[name]
            determined = torch.minimum(there["curvature"], here["curvature"]) > 1e-6
            exists = torch.ones_like(determined)
        kinks = ~(self.pair.theta_inside & self.pair.t_inside)
        rootless = kinks & ((at_zero > 0) | (at_one < 0))
        # whether there is a root, and which end is the better one without it, hang on numbers that rounding may turn
        worse = [torch.maximum(part["kl_theta"], part["kl_t"]) for part in (zero, one)]
        unclear = rootless & ((worse[0] - worse[1]).abs() <= self.allowed.relative * size + rounding)
        unclear |= kinks & (torch.minimum(at_zero.abs(), at_one.abs()) <= tolerance * size + rounding)
        slack = slack + rounding / weight.clamp(min=1e-6)
        if tolerance > self.allowed.alpha:
            slack = slack + tolerance * size / weight.clamp(min=1e-6)
        wrong = self.usable & (off > slack)
        numbers = got.alpha, want.alpha, "curvature", weight
        self.report("alpha without a root", wrong & rootless & ~unclear, *numbers)
        self.report(f"alpha of {chosen.method}", wrong & ~rootless & ~unclear & determined, *numbers)
        low_end, high_end = (
            x.to(self.dtype).item() for x in torch.tensor([chosen.alpha_min, chosen.alpha_max], dtype=torch.float64)
        )
        bound = tolerance * size + rounding
        above = (residual[0] > bound) & (got.alpha > low_end)  # the root lies below α
        below = (residual[1] < -bound) & (got.alpha < high_end)
        at_an_end = (got.alpha == low_end) | (got.alpha == high_end)
        self.report(
            f"residual of {chosen.method}",
            self.usable & exists & (~rootless | unclear) & (above | below) & ~(unclear & at_an_end),
            *residual,
            "at",
            here["alpha"],
            "for",
            want.alpha,
        )

    def support(self) -> Tensor:
        """bool [B, V]: the tokens that the implementation keeps, which must be those of the reference at the same α."""
        log_q = truncate(self.here["log_q"], self.pair, self.settings)
        right = ~log_q.isneginf()
        if self.support_log_q is None:
            return right
        ok = self.usable & (self.got.status == Status.OK)
        kept = self.support_log_q > -INF
        for row in (ok & (kept != right).any(-1)).nonzero()[:, 0].tolist():
            surely, possibly = self.bounds(row)
            twins = self.twins_parted(row, kept[row])
            wrong = (surely & ~kept[row]) | (kept[row] & ~possibly)
            if wrong.any() or twins:
                self.counts["disagreements"] += 1
                kind = "ties parted by truncation" if twins and not wrong.any() else "support of the truncated q"
                tokens = wrong.nonzero()[:, 0].tolist()[:5]
                self.found.append(
                    Disagreement(kind, row, f"{int(kept[row].sum())} kept of {int(right[row].sum())}; wrong: {tokens}")
                )
            else:
                self.counts["tokens at a boundary"] += 1
        return torch.where(ok[:, None], kept, right)

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
        """[V], how far the value of a token may be off: rounding of its sum, and of the α that is reported."""
        moved = self.half * self.here["alpha"][row] * self.deviation[row]
        return 2 * self.allowed.inner * self.token_size[row] + moved

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
        slack_t = 2 * self.allowed.inner * (pair.b[row].abs().nan_to_num(posinf=0) + pair.norm_t[row].abs())
        if chosen.target_top_k or chosen.target_top_p < 1:
            allowed = log_t > -INF
            kept = cut_bounds(log_t, slack_t, allowed, allowed, chosen.target_top_k, chosen.target_top_p)
            surely, possibly = surely & kept[0], possibly & kept[1]
        value = self.here["log_q"][row]
        surely, possibly = cut_bounds(value, slack, surely, possibly, chosen.top_k, chosen.top_p)
        if chosen.min_p > 0 and possibly.any():
            low, high = value - slack, value + slack
            greatest = high.masked_fill(~possibly, -INF).amax()
            least = low.masked_fill(~(surely if surely.any() else possibly), -INF).amax()
            surely = surely & (low >= greatest + math.log(chosen.min_p))
            possibly = possibly & (high >= least + math.log(chosen.min_p))
        return surely, possibly

    def whole(self, log_q: Tensor, support: Tensor) -> None:
        """log q right after renormalising on the implementation's own support."""
        low, high, _ = self.log_q_on(support)
        ok = self.usable & (self.got.status == Status.OK)
        wrong = ok[:, None] & support & ~((log_q >= low) & (log_q <= high))
        wrong |= ok[:, None] & ~support & (log_q > -INF)
        at = wrong.long().argmax(-1, keepdim=True)
        self.report("whole log q", wrong.any(-1), at[:, 0], *(x.gather(-1, at)[:, 0] for x in (log_q, low, high)))

    def log_q_on(self, support: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Least and greatest log q that may be reported, and the one at the reported α: [B, V] each."""
        parts = []
        for part in (self.here, self.low, self.high):
            kept = part["log_q"].masked_fill(~support, -INF)
            parts.append(kept - kept.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0))
        ends = torch.stack(parts)
        size = ends[0].abs().nan_to_num(posinf=0)
        slack = (
            self.allowed.relative * size.clamp(min=1)
            + self.half * size
            + 32 * UNIT * self.token_size
            + self.rounding[:, None]
        )
        return ends.amin(0) - slack, ends.amax(0) + slack, ends[0]

    def at_token(self, support: Tensor, drawn: bool) -> None:
        got, vocab_size = self.got, self.case["vocab_size"]
        known = self.usable & (got.status == Status.OK) & (got.token >= 0) & (got.token < vocab_size)
        index = got.token.clamp(0, vocab_size - 1)[:, None]
        inside = support.gather(-1, index)[:, 0]
        low, high, here = (x.gather(-1, index)[:, 0] for x in self.log_q_on(support))
        if drawn:
            self.report("token outside the support", known & ~inside, got.token, got.logq)
        else:
            self.report("logq of a token that is cut", known & ~inside & (got.logq > -INF), got.logq)
        self.report(
            "logq", known & inside & ~((got.logq >= low) & (got.logq <= high)), got.logq, here, "at", self.here["alpha"]
        )
        for name, logits in (("logp_theta", self.theta), ("logp_t", self.t)):
            x = getattr(got, name)
            usable = logits.masked_fill(~self.usable[:, None], 0.0)
            exact = usable.log_softmax(-1).gather(-1, index)[:, 0]
            raw = (usable - usable.amax(-1, keepdim=True)).gather(-1, index)[:, 0].abs().nan_to_num(posinf=0)
            slack = self.allowed.relative * exact.abs().clamp(min=1) + self.half * exact.abs() + 16 * UNIT * raw
            self.report(name, known & ~((x == exact) | ((x - exact).abs() <= slack)), x, exact)

    def token(self, support: Tensor) -> None:
        """The reference's token, or one whose key cannot be told from the best."""
        got, want = self.got, self.want
        differs = self.usable & (got.status == Status.OK) & (got.token != want.token)
        differs &= (got.token >= 0) & (got.token < self.case["vocab_size"])
        for row in differs.nonzero()[:, 0].tolist():
            lead = self.lead(row, support[row])
            if lead is None:
                self.counts["ties"] += 1
            else:
                self.counts["disagreements"] += 1
                self.found.append(
                    Disagreement(
                        "token", row, f"{int(got.token[row])} for {int(want.token[row])}, which leads by {lead}"
                    )
                )

    def lead(self, row: int, support: Tensor) -> str | None:
        """By how much the best key is ahead of the drawn token's, None where that is within rounding."""
        token = int(self.got.token[row])
        value = self.here["log_q"][row].masked_fill(~support, -INF)
        if not support[token]:
            return "all: it is outside the support"
        value = value - value.logsumexp(-1)
        slack = self.value_slack(row)
        if self.settings.temperature == 0:
            best = int(value.argmax())
            behind = value[best] - value[token]
            return None if behind <= slack[best] + slack[token] else f"{behind:.3g}"
        seeds, positions = (self.index[name][row : row + 1] for name in ("seeds", "positions"))
        groups = -(-len(value) // GROUP_SIZE)
        padding = (0, groups * GROUP_SIZE - len(value))
        padded = torch.nn.functional.pad(value, padding, value=-INF).view(groups, GROUP_SIZE)
        mass = padded.logsumexp(-1)
        doubt = torch.nn.functional.pad(slack, padding).view(groups, GROUP_SIZE)
        doubt_of_group = ((padded - mass[:, None]).exp().nan_to_num(nan=0.0) * doubt).sum(-1)
        levels = (
            (mass, doubt_of_group, 0, GROUP_STREAM, token // GROUP_SIZE),
            (
                padded[token // GROUP_SIZE],
                doubt[token // GROUP_SIZE],
                token // GROUP_SIZE * GROUP_SIZE,
                TOKEN_STREAM,
                token % GROUP_SIZE,
            ),
        )
        for values, doubts, first, stream, chosen in levels:
            noise = gumbel(seeds, positions, torch.full_like(seeds, first), len(values), stream)[0]
            key = values + noise
            best = int(key.argmax())
            behind = float(key[best] - key[chosen])
            scale = values[[best, chosen]].abs().sum() + noise[[best, chosen]].abs().sum() + 1
            allowed = doubts[best] + doubts[chosen] + 2 * self.allowed.noise + 2 * self.allowed.inner * scale
            if behind > allowed:
                return f"{behind:.3g} (allowed {float(allowed):.2g})"
        return None


def cut_bounds(
    value: Tensor, slack: Tensor, surely: Tensor, possibly: Tensor, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Top-k, then top-p of values [V] that are each known to within `slack`.

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
        mass = (value - value.masked_fill(~possibly, -INF).amax()).exp()
        low, high = mass * (1 - 2 * slack).clamp(min=0), mass * (2 * slack).exp()
        # the share above a token is greatest where what may be above it weighs much, and the rest of the certain little
        over = above(top, possibly, high, bottom) - torch.where(possibly & itself, high, 0.0)
        rest = low[surely].sum() - (above(top, surely, low, bottom) - torch.where(surely & itself, low, 0.0))
        greatest = over.clamp(min=0) / (over + rest).clamp(min=1e-320)
        over = above(bottom, surely, low, top)
        rest = high[possibly].sum() - above(bottom, possibly, high, top)
        smallest = over / (over + rest).clamp(min=1e-320)
        rounding = 1 + len(value) * UNIT  # of a sum in any order
        surely, possibly = surely & (greatest * rounding < top_p), possibly & (smallest / rounding < top_p)
    return surely, possibly


# Running


class Watch:
    """Leaves the case at hand on disk and ends the process if its call does not return."""

    file: Path | None = None
    seconds = 30.0

    @classmethod
    @contextmanager
    def over(cls, case: dict):
        if cls.file is None:
            yield
            return
        cls.file.write_text(json.dumps(case))
        faulthandler.dump_traceback_later(cls.seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


@cache
def wrong_as(kind: str) -> type[AssertionError]:
    """An exception for each kind of disagreement: Hypothesis shrinks within a type."""
    return type("Wrong", (AssertionError,), {"kind": kind})


def in_a_child(compare, case: dict, seconds: float) -> list[tuple[str, str]]:
    """`compare(case)` in a process of its own, whose end is a finding too."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with os.fdopen(writer, "w") as pipe:
            json.dump(compare(case), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return [tuple(x) for x in json.loads(answer)]
    return [(fate(os.waitstatus_to_exitcode(status)), "")]


def fate(code: int) -> str:
    return "never returns" if code in (1, -signal.SIGALRM) else f"ends the process ({code})"


class Worker:
    """Runs chunks of cases, each a Hypothesis test of its own, and writes down what it finds."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.worker
        self.known: set[str] = set(json.loads((self.folder / "known.json").read_text()))
        self.counts, self.kinds, self.proved = Counter(), Counter(), Counter()
        self.deadline = time.monotonic() + options.seconds

    def save(self) -> None:
        numbers = {"counts": self.counts, "kinds": self.kinds}
        temporary = self.folder / "counts.tmp"
        temporary.write_text(json.dumps(numbers))
        temporary.replace(self.folder / "counts.json")

    def chunk(self, number: int) -> None:
        """The cases of one Hypothesis run, until one disagrees in a way not seen yet, which is shrunk."""
        options, smallest, seen = self.options, {}, {}
        interpreted = options.impl == "triton" and options.device == "cpu"
        stop = math.inf

        def run(case: dict) -> list[tuple[str, str]]:
            return in_a_child(self.compare, case, options.patience) if options.isolated else self.compare(case)

        def compare(case: dict) -> list[tuple[str, str]]:
            key = json.dumps(case)
            if key not in seen:
                if time.monotonic() > stop:  # small enough; Hypothesis still wants to see the smallest case fail again
                    return []
                found = run(case)
                if not smallest:
                    self.count(case, found)
                    return found
                seen[key] = found
            return seen[key]

        @seed(options.seed * 1_000_003 + number)
        @settings(
            max_examples=CHUNK,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @given(cases(interpreted, options.copies, float64=options.impl != "triton"))
        def test(case: dict) -> None:
            nonlocal stop
            if not smallest and time.monotonic() > self.deadline:
                return
            for kind, detail in (found := compare(case)):
                if kind not in self.known:
                    if not smallest:
                        stop = time.monotonic() + SHRINKING
                        seen[json.dumps(case)] = found
                    smallest[kind] = case, detail
                    raise wrong_as(kind)(kind)

        try:
            test()
        except AssertionError as error:
            if not hasattr(error, "kind"):
                raise
        for kind, (case, detail) in smallest.items():
            self.known.add(kind)
            self.write(kind, detail, alone_if_still_wrong(case, kind, run))

    def run(self, number: int) -> None:
        """Chunks from `number` on, one only if cases are isolated."""
        while time.monotonic() < self.deadline:
            (self.folder / "chunk").write_text(str(number))
            self.save()
            self.chunk(number)
            number += 1
            if self.options.isolated:
                break
        self.save()

    def replay(self, number: int) -> None:
        """The cases of the supervisor's list from `number` on."""
        for i, case in enumerate(json.loads((self.folder / "cases.json").read_text())[number:], number):
            (self.folder / "chunk").write_text(str(i))
            for kind, detail in self.compare(case):
                self.write(kind, detail, case)

    def write(self, kind: str, detail: str, case: dict) -> None:
        with (self.folder / "found.jsonl").open("a") as file:
            file.write(json.dumps({"impl": self.options.impl, "kind": kind, "detail": detail, "case": case}) + "\n")

    def compare(self, case: dict) -> list[tuple[str, str]]:
        """Kind and details of what is wrong."""
        self.proved = Counter()
        try:
            found = disagreements(case, self.options.impl, self.options.device, self.proved)
        except Exception as error:  # what an implementation raises on a case that is right is a finding like any other
            found = [Disagreement(f"{type(error).__name__}: {str(error)[:60]}", 0, repr(error))]
        return [(x.kind, f"row {x.row}: {x.detail}") for x in found]

    def count(self, case: dict, found: list[tuple[str, str]]) -> None:
        self.counts.update(self.proved)
        self.counts["cases"] += 1
        self.counts["rows"] += len(case["rows"]) * case.get("copies", 1)
        self.counts["cases that disagree"] += bool(found)
        self.kinds.update(kind for kind, _ in found)
        if self.counts["cases"] % 50 == 0:
            self.save()


def alone_if_still_wrong(case: dict, kind: str, compare) -> dict:
    """The case with the failing row only, if that fails the same way."""
    copies = case.get("copies", 1)
    for i in range(len(case["rows"]) * copies):
        if copies == 1:
            single = case | {"rows": case["rows"][i : i + 1]}
            if "seed" in case:
                single |= {"seed": (case["seed"] + 7 * i + 2**63) % 2**64 - 2**63, "position": case["position"] + i}
            if "tokens" in case:
                single["tokens"] = [case["tokens"][i % len(case["tokens"])]]
        else:
            single = case | {"only": [i]}
        if single != case and any(found == kind for found, _ in compare(single)):
            return single
    return case


@dataclass
class Report:
    counts: Counter
    kinds: Counter
    found: list[dict]
    seconds: float

    def __str__(self) -> str:
        counts, minutes = self.counts, self.seconds / 60
        lines = [
            f"{counts['cases']} cases ({counts['rows']} rows) in {self.seconds:.0f} s: "
            f"{counts['cases'] / self.seconds:.0f} cases and {counts['rows'] / self.seconds:.0f} rows a second; "
            f"{counts['cases that disagree']} cases disagree; proved: {counts['ties']} tokens are ties, "
            f"{counts['tokens at a boundary']} rows have a token at a boundary of truncation"
        ]
        lines += [f"{n:6d} ({n / minutes:.1f} a minute)  {kind}" for kind, n in self.kinds.most_common()]
        return "\n".join(lines)


def environment_of(impl: str, device: str) -> dict[str, str]:
    more = {"TRITON_INTERPRET": "1"} if impl == "triton" and device == "cpu" else {}
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


def work(folder: Path, impl: str, device: str, *flags) -> subprocess.CompletedProcess:
    """One worker, until it ends or is ended."""
    command = [sys.executable, "-m", "tests.fuzz", "--worker", folder, "--impl", impl, "--device", device, *flags]
    return subprocess.run(
        [str(x) for x in command],
        cwd=Path(__file__).parents[1],
        env=environment_of(impl, device),
        capture_output=True,
        text=True,
    )


def taken(file: Path) -> list[dict]:
    """The lines of a worker's file, which is removed."""
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return lines


def fuzz(impl: str, seconds: float, seed: int, device: str = "cpu", copies: int | None = None) -> Report:
    """Workers, one after another, until time is up."""
    start, number, found = time.monotonic(), 0, []
    counts, kinds, known = Counter(), Counter(), set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        isolated = False
        while (left := seconds - (time.monotonic() - start)) > 1 or isolated:
            (folder / "known.json").write_text(json.dumps(sorted(known)))
            flags = ["--seed", seed, "--first", number, *(["--copies", copies] if copies else [])]
            flags += ["--isolated", "--seconds", 60] if isolated else ["--seconds", left]
            run = work(folder, impl, device, *flags)
            for numbers in taken(folder / "counts.json"):
                counts.update(numbers["counts"])
                kinds.update(numbers["kinds"])
            news = taken(folder / "found.jsonl")
            if run.returncode != 0 and (isolated or not (folder / "now.json").exists()):
                raise RuntimeError(f"the worker failed: {run.stderr[-3000:]}")
            number = int((folder / "chunk").read_text()) + 1
            isolated = False
            if run.returncode != 0:
                kind = fate(run.returncode)
                counts.update({"cases": 1, "cases that disagree": 1})
                kinds[kind] += 1
                if kind not in known and device == "cpu":  # the chunk again, to shrink it
                    isolated, number = True, number - 1
                elif kind not in known:
                    fatal = json.loads((folder / "now.json").read_text())
                    news.append({"impl": impl, "kind": kind, "detail": "", "case": fatal})
            for x in news:
                print(f"\n# {impl}: {x['kind']}\n# {x['detail']}\n{reproduction(x['case'], impl)}", flush=True)
            found += news
            known.update(x["kind"] for x in news)
    return Report(counts, kinds, found, time.monotonic() - start)


def replay(cases: list[dict], impl: str, device: str = "cpu") -> list[dict]:
    """What is wrong with the cases, run one after another."""
    found, number = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "known.json").write_text("[]")
        (folder / "cases.json").write_text(json.dumps(cases))
        while number < len(cases):
            run = work(folder, impl, device, "--first", number)
            found += taken(folder / "found.jsonl")
            if run.returncode == 0:
                break
            if not (folder / "now.json").exists():
                raise RuntimeError(f"the worker failed: {run.stderr[-3000:]}")
            number = int((folder / "chunk").read_text())
            found.append({"impl": impl, "kind": fate(run.returncode), "detail": "", "case": cases[number]})
            number += 1
    return found


def keep(found: list[dict]) -> None:
    """Append to the examples that `test_fuzz.py` replays."""
    lines = EXAMPLES.read_text().splitlines() if EXAMPLES.exists() else []
    lines += [line for x in found if (line := json.dumps(x)) not in lines]
    EXAMPLES.write_text("".join(line + "\n" for line in lines))


def literal(x: Tensor) -> str:
    """Code that makes the same tensor."""
    if x.numel() > 64:
        return f"... {list(x.shape)} {x.dtype}"

    def number(value: float) -> str:
        if not math.isfinite(value):
            return "INF" if value > 0 else "-INF" if value < 0 else "NAN"
        return repr(value) if x.dtype == torch.float64 else str(np.float32(value))

    rows = ", ".join("[" + ", ".join(number(v) for v in row) + "]" for row in x.tolist())
    return f"torch.tensor([{rows}], dtype={x.dtype})"


def reproduction(case: dict, impl: str) -> str:
    """Code that makes the call without this file where its rows are short, and the command that runs the case."""
    theta, t = rows_of(case)
    what = {"sample": "qstar_sample", "tokens": "qstar_stats", "log_q": "qstar_logprobs"}[case["what"]]
    lines = []
    if max(theta.numel(), t.numel()) <= 64:
        given = "".join(f"{k}=torch.tensor({v.tolist()}), " for k, v in index_of(case, len(theta), "cpu").items())
        chosen = "".join(f"{k}={v!r}, " for k, v in case["settings"].items())
        other = {k: v for k, v in case.items() if k in ("layouts", "default_device", "alone")}
        lines = [
            f"import torch; from qstar_kernels import {what}; INF, NAN = torch.inf, torch.nan",
            f"theta = {literal(theta)}",
            f"t = {literal(t)}",
            f"for impl in ('reference', {impl!r}): print({what}(theta, t, {given}{chosen}impl=impl))"
            + (f"  # and {other}" if other else ""),
        ]
    return "\n".join([*lines, f"# python -m tests.fuzz --impl {impl} --case '{json.dumps(case)}'"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--impl", choices=("cpu", "triton", "reference"), default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="triton on the CPU is interpreted")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--copies", type=int, help="rows made from each kind of row (4; interpreted 1; on a GPU 64)")
    parser.add_argument("--keep", action="store_true", help="append what is found to the examples of test_fuzz.py")
    parser.add_argument("--case", type=json.loads, help="run this case only")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--isolated", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.copies is None:
        options.copies = 64 if options.device == "cuda" else 4 if options.impl == "cpu" else 1
    options.patience = 2.0 if options.impl == "cpu" else 60.0
    torch.set_num_threads(1)
    if (options.worker or options.case) and options.impl == "triton" and options.device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            command = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]]
            return subprocess.run(command, env=environment_of("triton", "cpu")).returncode
        interpret_quickly()
    if options.case:
        found = disagreements(options.case, options.impl, options.device)
        print(*found or ["no disagreement"], sep="\n")
        return bool(found)
    if options.worker:
        worker = Worker(options)
        Watch.seconds = 3 * options.patience
        Watch.file = None if options.isolated else worker.folder / "now.json"
        (worker.replay if (worker.folder / "cases.json").exists() else worker.run)(options.first)
        return 0
    report = fuzz(options.impl, 60 * options.minutes, options.seed, options.device, options.copies)
    print(f"\nseed {options.seed}: {report}")
    if options.keep:
        keep(report.found)
    return bool(report.kinds)


if __name__ == "__main__":
    sys.exit(main())
