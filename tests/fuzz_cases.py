"""What `tests/fuzz.py` runs: cases by Hypothesis, and the tensors that a case stands for.

A case is a dict of kinds, sizes and seeds, as JSON holds them: quick to make, easy to shrink and to keep.
"""

import json
import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from qstar_kernels import METHODS
from qstar_kernels.types import BUDGETS, PER_ROW

INF = torch.inf
TYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = ("plain", "padded", "columns", "transposed", "offset", "every other row", "expanded")
MASKS = ("-inf", "finfo.min", "-1e4", "-6e4", "-1e9", "-1e14", "-1e18")
EXTREMES = (0.5, 0.9, 0.1, 0.999, 1e-3, 1 - 1e-12, 1e-12, 1 - 2**-53, 1e-300)

# Strategies are made once: Hypothesis takes longer to make one than to draw from it. All shrink towards their first
COIN, CHANCE = st.booleans(), {n: st.integers(0, n - 1) for n in (3, 4, 5, 12, 16, 40, 48)}
OPEN = st.sampled_from(EXTREMES) | st.floats(1e-6, 1 - 1e-6)  # in (0, 1)
HALF_OPEN = st.sampled_from((*EXTREMES, 1.0)) | st.floats(1e-6, 1.0)
CLOSED = st.sampled_from((*EXTREMES, 0.0, 1.0)) | st.floats(0.0, 1.0)
ALPHA = CLOSED | st.sampled_from((1.5, -0.5, 3.0, -2.0, 1 + 2**-52, -1e-12, 100.0, -100.0)) | st.floats(-4.0, 5.0)
BUDGET = st.sampled_from((0.01, 0.1, 1.0, 1e-3, 1e-4, 1e-6, 0.0, 10.0, 1e-12, 1e-300, 1e6)) | st.floats(1e-8, 5.0)
BAD_NUMBER = st.sampled_from((math.nan, -math.inf, math.inf, -1e-3, 1e7))  # for none of the settings of a row
CLAMPS = st.tuples(CLOSED, CLOSED) | st.tuples(CLOSED)  # one number: α is given
SMALL = (
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(41, 300),
    st.sampled_from((255, 256, 257, 1023, 1024, 1025)),
)
LARGE = (st.integers(301, 5000), st.sampled_from((2047, 2048, 2049, 3073, 4096, 5000)))
LARGE_INTERPRETED = (st.integers(301, 1100), st.sampled_from((1100, 1100, 2048, 2049, 4097)))
SIZES = st.sampled_from((0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 4, 5))
WHAT = st.sampled_from(("sample", "log_q", "tokens"))
METHOD = st.sampled_from(METHODS)
SAME_TYPES = st.sampled_from([[x, x] for x in TYPES[:3]])
MIXED_TYPES = st.sampled_from([[x, y] for x in TYPES for y in TYPES])
NARROW_TYPES = st.sampled_from([[x, y] for x in TYPES[:3] for y in TYPES[:3]])
TWO_LAYOUTS = st.sampled_from([[x, y] for x in LAYOUTS for y in LAYOUTS])
EXPONENT = st.integers(-60, 60)  # of the temperature, in tenths
TOL = st.sampled_from((1e-3, 1.0, 1e-7))
SEED, POSITION = st.integers(-(2**63), 2**63 - 1), st.sampled_from((0, 1, 2**40))

BASES = st.sampled_from(("normal", "zipf", "sharp", "flat", "near", "identical"))
ROW_SEED, FEATURE = st.integers(0, 9999), st.integers(0, 15)
NOISE, NEAR = (
    st.sampled_from((1.0, 0.1, 0.5, 2.0, 4.0, 8.0, 0.01)),
    st.sampled_from((1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)),
)
SPIKES = st.lists(
    st.tuples(st.sampled_from(("theta", "t")), st.integers(0, 9), st.integers(15, 200)).map(list),
    min_size=1,
    max_size=3,
)
MASK = st.tuples(
    st.sampled_from(("theta", "t", "both", "each")),
    st.sampled_from((0.5, 0.1, 0.9, 1.0)),  # the share that is masked; 1: all but one
    st.sampled_from(MASKS),
    st.sampled_from(MASKS),
).map(list)
GRID = st.sampled_from((1.0, 0.25, 4.0))
OFFSET = st.tuples(st.sampled_from((0.0, 3e4, -3e4, 1.0)), st.sampled_from((0.0, 3e4, -3e4))).map(list)
BAD = st.sampled_from(("nan", "+inf", "+1e18", "none", "none by finfo.min", "disjoint"))


@st.composite
def rows(draw) -> dict:
    """What `pair_of` makes a pair of rows from."""
    row = {"base": draw(BASES), "seed": draw(ROW_SEED)}
    if row["base"] in ("normal", "zipf"):
        row["noise"] = draw(NOISE)
    elif row["base"] == "near":
        row["noise"] = draw(NEAR)
    feature = draw(FEATURE)
    if feature in (8, 9, 10):
        row["spikes"] = draw(SPIKES)
    if feature in (10, 11, 12):
        row["mask"] = draw(MASK)
    if feature in (12, 13):
        row["grid"] = draw(GRID)
    if feature in (13, 14):
        row["offset"] = draw(OFFSET)
    if feature == 15:
        row["bad"] = draw(BAD)
    return row


ROWS = st.lists(rows(), min_size=1, max_size=4)


@st.composite
def settings_of_rows(draw) -> dict:
    """Numbers that the rows take in turn, by setting; and their type."""
    given = {"type": draw(st.sampled_from(("float64", "float32")))}
    which = draw(st.integers(1, 7))
    for bit, (name, values) in enumerate((("kl_budget", BUDGET), ("alpha", ALPHA))):
        if which >> bit & 1:
            given[name] = draw(st.lists(values, min_size=1, max_size=4))
    if which >> 2:
        pairs = draw(st.lists(CLAMPS, min_size=1, max_size=3))
        given["alpha_min"], given["alpha_max"] = ([f(pair) for pair in pairs] for f in (min, max))
    if draw(CHANCE[4]) == 3:
        name = draw(st.sampled_from(sorted(given.keys() - {"type"})))
        given[name].append(draw(BAD_NUMBER if name != "alpha" else st.sampled_from((math.nan, 101.0))))
    return given


@st.composite
def cases(draw, impl: str, interpreted: bool = False, copies: int = 1) -> dict:
    """A call: what, with which settings, on which rows."""

    def one_in(n: int) -> bool:
        return draw(CHANCE[n]) == n - 1

    vocab_size = draw((*SMALL, *(LARGE_INTERPRETED if interpreted else LARGE))[draw(SIZES)])
    case = {"what": draw(WHAT), "vocab_size": vocab_size}
    mixed = NARROW_TYPES if impl == "triton" else MIXED_TYPES
    case["types"] = draw(mixed if one_in(3) else SAME_TYPES)
    if one_in(4):
        case["layouts"] = draw(TWO_LAYOUTS)
    case["rows"] = draw(ROWS)
    if copies > 1:
        case["copies"] = copies
    chosen = case["settings"] = {"method": draw(METHOD)}
    if chosen["method"] == "fixed":
        chosen["alpha"] = draw(ALPHA)
    if chosen["method"] in BUDGETS:
        chosen["kl_budget"] = draw(BUDGET)
    if one_in(5):
        chosen["alpha_min"], chosen["alpha_max"] = sorted((draw(CLOSED), draw(CLOSED)))
    if one_in(4):
        case["per_row"] = draw(settings_of_rows())
    temperature = draw(FEATURE)
    if temperature >= 10:
        chosen["temperature"] = 10.0 ** (draw(EXPONENT) / 10)
    elif temperature >= 8:
        chosen["temperature"] = 0.0
    cuts = draw(CHANCE[48]) - 15  # a third of the cases is not truncated; the others by any of the five
    if cuts > 0:
        counts = st.integers(1, 5) | st.sampled_from((50, vocab_size, 2**31, 2**63 - 1, 2**64 + 1))
        for bit, (name, values) in enumerate(
            (("top_p", OPEN), ("top_k", counts), ("min_p", HALF_OPEN), ("target_top_p", OPEN), ("target_top_k", counts))
        ):
            if cuts >> bit & 1:
                chosen[name] = draw(values)
    if one_in(16):
        chosen["tol"] = draw(TOL)
    if case["what"] == "sample":
        case["seed"], case["position"] = draw(SEED), draw(POSITION)
    elif case["what"] == "tokens":
        outside = st.sampled_from((-1, vocab_size, vocab_size - 1, 2**31, -(2**63)))
        case["tokens"] = draw(st.lists(st.integers(0, vocab_size - 1) | outside, min_size=1, max_size=4))
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
        sides = [-1.1 * torch.log1p(rank.double()) + normal(1)]
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
    elif bad in ("+inf", "+1e18"):
        sides[1][:, 0] = float(bad)
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
        view = x.new_full((rows, columns + 8), torch.nan)[:, 3 : 3 + columns]
    elif layout == "columns":
        view = x.new_full((rows, 3 * columns + 1), torch.nan)[:, 1::3]
    elif layout == "transposed":
        view = x.new_empty(columns, rows).T
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
        x = torch.cat([pair[side] for pair in pairs])
        if "only" in case:
            x = x[case["only"]]
        x = x.to(getattr(torch, types[side])).to(device)
        sides.append(laid_out(x, case.get("layouts", ("plain", "plain"))[side]))
    return sides[0], sides[1]


def index_of(case: dict, device: str = "cpu") -> dict[str, Tensor]:
    """The int64 [B] that go with the rows, by the name of their argument."""
    which = case.get("only", range(len(case["rows"]) * case.get("copies", 1)))
    if case["what"] == "tokens":
        given = case["tokens"]
        return {"tokens": torch.tensor([given[i % len(given)] for i in which], device=device)}
    if case["what"] == "sample":
        return {
            "seeds": torch.tensor([wrapped(case["seed"] + 7 * i) for i in which], device=device),
            "positions": torch.tensor([case["position"] + i for i in which], device=device),
        }
    return {}


def per_row_of(case: dict, device: str = "cpu") -> dict[str, Tensor]:
    """The settings of the rows, [B] each, by their names."""
    which = case.get("only", range(len(case["rows"]) * case.get("copies", 1)))
    given = case.get("per_row", {})
    return {
        name: torch.tensor(
            [given[name][i % len(given[name])] for i in which], dtype=getattr(torch, given["type"]), device=device
        )
        for name in PER_ROW
        if name in given
    }


def wrapped(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def of_one_row(case: dict, i: int) -> dict:
    """The case with row i only."""
    if "copies" in case or "only" in case:
        return case | {"only": [case["only"][i] if "only" in case else i]}
    single = case | {"rows": case["rows"][i : i + 1]}
    if case["what"] == "sample":
        single |= {"seed": wrapped(case["seed"] + 7 * i), "position": case["position"] + i}
    elif case["what"] == "tokens":
        single["tokens"] = [case["tokens"][i % len(case["tokens"])]]
    if "per_row" in case:
        own = case["per_row"]
        single["per_row"] = {k: v if k == "type" else [v[i % len(v)]] for k, v in own.items()}
    return single


def literal(x: Tensor) -> str:
    """Code that makes the same tensor."""

    def number(value: float) -> str:
        if not math.isfinite(value):
            return "INF" if value > 0 else "-INF" if value < 0 else "NAN"
        return repr(value) if x.dtype == torch.float64 else str(np.float32(value))

    if x.ndim == 1:
        return f"torch.tensor([{', '.join(map(number, x.tolist()))}], dtype={x.dtype})"
    rows = ", ".join("[" + ", ".join(number(value) for value in row) + "]" for row in x.tolist())
    return f"torch.tensor([{rows}], dtype={x.dtype})"


def reproduction(case: dict, impl: str) -> str:
    """Code that makes the call without this file where its rows are short, and the command that runs the case."""
    theta, t = rows_of(case)
    lines = [f"# python -m tests.fuzz --impl {impl} --case '{json.dumps(case)}'"]
    if theta.numel() <= 64:
        what = {"sample": "qstar_sample", "tokens": "qstar_stats", "log_q": "qstar_logprobs"}[case["what"]]
        given = "".join(f"{k}=torch.tensor({v.tolist()}), " for k, v in index_of(case).items())
        chosen = "".join(f"{k}={v!r}, " for k, v in case["settings"].items() if k not in per_row_of(case))
        chosen += "".join(f"{k}={literal(v)}, " for k, v in per_row_of(case).items())
        other = {k: v for k, v in case.items() if k in ("layouts", "default_device", "alone")}
        lines += [
            f"import torch; from qstar_kernels import {what}; INF, NAN = torch.inf, torch.nan",
            f"theta = {literal(theta)}",
            f"t = {literal(t)}",
            f"for impl in ('reference', {impl!r}): print({what}(theta, t, {given}{chosen}impl=impl))",
            *([f"# and {other}"] if other else []),
        ]
    return "\n".join(lines)
