"""One sweep in NumPy: the sums, what is read off them, and what that may be off by (computation.md, «One sweep»).

The formulas and names of `qstar_kernels/gpu/settle.py`, for one row, so that they can be checked and measured: what
the kernels do in float32 and float64 is done here in any type.
"""

from dataclasses import dataclass
from math import comb, factorial

import numpy as np

GROUP = 1024
ORDER, ORDER_OF_SIDES = 6, 4
THREADS, SUB = 16, 8  # how a warp of the kernels goes over a group of bfloat16: see `tile` in launch.py

# the constants of scratch.py
OF_AN_EXPONENTIAL, OF_A_NAT, OF_A_SUM, DEEPEST = 2.4e-7, 1.8e-7, 19 * 2.0**-24, 7.94
MOST_OF_F, MOST_OF_ESS, MOST_OF_ALPHA, ROUNDING, ROUNDING_OF_ALPHA, FLAT = 1e-6, 4e-5, 4e-6, 3e-5, 6e-4, 5e-7
ROUNDING_OUTSIDE, FARTHEST = 1e-4, 55.0


def total(x: np.ndarray) -> np.ndarray:
    """Σ x [G, 1024] over the ids in the order of the kernels: in a thread, from turn to turn, over the threads."""
    x = x.reshape(len(x), -1, THREADS, SUB)
    return np.add.reduce(np.add.reduce(np.add.reduce(x, axis=3), axis=1), axis=1).astype(np.float64)


@dataclass(frozen=True)
class Curve:
    """The groups about one centre, [G] each."""

    f: np.ndarray  # log-mass
    mean: np.ndarray  # of d
    moments: np.ndarray  # central ones of d, [J, G]
    most: np.ndarray  # the last of these, at least
    reach: np.ndarray  # the greatest |d − mean|, at least
    spread: np.ndarray  # the root of the mean square of d

    def at(self, x: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-masses, means and variances of d at x from the centre, by Taylor's polynomial for the mass."""
        value, first, second = (series(self.moments, x, k) for k in range(3))
        tilt = first / value
        return self.f + x * self.mean + np.log(value), self.mean + tilt, np.maximum(second / value - tilt * tilt, 0)

    def left_out(self, x: float, order: int) -> np.ndarray:
        """What the polynomial leaves out of the mass's derivative of this order, in parts of the mass, at most."""
        n = len(self.moments) - order
        grown = np.exp(np.minimum(abs(x) * self.reach, 600))
        return self.reach * grown * self.most * abs(x) ** n / factorial(n) / series(self.moments, x, 0)

    def of_moments(self, x: float) -> np.ndarray:
        """What a rounding of the sums by 1 part leaves open of the quotient of this mass and that at the centre."""
        turn = abs(x) * self.spread
        return 4 * turn**2 * np.exp(np.minimum(2 * turn, 600))


def series(moments: np.ndarray, x: float, order: int) -> np.ndarray:
    """The derivative of this order of Σ moments[j] xʲ/j!."""
    return sum(c * x**j / factorial(j) for j, c in enumerate(moments[order:]))


def central(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and central moments of moments about 0, [J, G]."""
    mean, powers = raw[1], range(len(raw))
    moments = [sum(comb(j, k) * raw[k] * (-mean) ** (j - k) for k in range(j + 1)) for j in powers]
    moments = np.stack([np.ones_like(mean), np.zeros_like(mean), *moments[2:]])
    moments[2::2] = np.maximum(moments[2::2], 0)
    return mean, moments


def joined(f: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> tuple[float, float, float, np.ndarray]:
    """F, F′ and F″ of a row from its groups', and the groups' shares."""
    top = f.max()
    share = np.exp(f - top)
    norm = top + np.log(share.sum())
    share = share / share.sum()
    slope = share @ mean
    return norm, slope, share @ (variance + (mean - slope) ** 2), share


class Sweep:
    """What one sweep about `center` gives of a row [V] of logits of each model, exponentials and sums in `dtype`.

    `second`: as the second sweep takes the difference of the models' masses.

    Everything is in log-probabilities: their norms are 0, and F′ is KL(q‖π_t) − KL(q‖π_θ).
    """

    def __init__(
        self, theta: np.ndarray, t: np.ndarray, center: float = 0.5, dtype: type = np.float64, second: bool = False
    ):
        groups, c = -(-len(theta) // GROUP), dtype(center)
        a, b = (np.full((groups, GROUP), -np.inf) for _ in range(2))
        a.reshape(-1)[: len(theta)], b.reshape(-1)[: len(t)] = theta, t
        top_a, top_b = a.max(1), b.max(1)
        a, b = ((x - top[:, None]).astype(dtype) for x, top in ((a, top_a), (b, top_b)))
        with np.errstate(invalid="ignore"):
            d = np.where(np.isfinite(a) & np.isfinite(b), a - b, dtype(0))
        w = np.where(np.isfinite(a) & np.isfinite(b), np.exp(c * a + (1 - c) * b), dtype(0))
        up, down = np.exp((1 - c) * d), np.exp(-c * d)
        at_one, at_zero = w * up, w * down
        high, low = at_one * up, at_zero * down
        self.beyond = max(float(c) - 1, -float(c), 0.0)
        if self.beyond:
            at_one, at_zero = np.exp(a), np.exp(b)
        powers = [d**0, d]
        for _ in range(ORDER - 1):
            powers.append(powers[-1] * d)
        self.of_a_sum = OF_A_SUM if dtype == np.float32 else 19 * 2.0**-53
        self.center, self.second, self.reach = float(c), second, np.abs(d).max(1).astype(np.float64)
        drop_a, drop_b = top_a - top_a.max(), top_b - top_b.max()
        ends = [total(x) for x in (at_one, at_zero)]
        difference = total(np.where(second & (np.abs(d) < 0.25), at_zero * np.expm1(d), at_one - at_zero))
        sum_a, sum_b = np.exp(drop_a) @ ends[0], np.exp(drop_b) @ ends[1]
        apart = np.exp(drop_b) @ difference + (np.exp(drop_a) - np.exp(drop_b)) @ ends[0]
        s = np.log1p(apart / sum_b) if apart > 0 else -np.log1p(-apart / sum_a)
        lean, shift = drop_b - np.log(sum_b), drop_a - drop_b - s
        self.others = sum_a + sum_b - 2
        self.one, self.zero = lean + shift + np.log(ends[0]), lean + np.log(ends[1])

        def curve(w: np.ndarray, alpha: float, order: int) -> Curve:
            raw = np.stack([total(w * p) for p in powers[: order + 1]])
            mass, raw = raw[0], raw / raw[0]
            mean, moments = central(raw)
            most = moments[-1] + 2 * 2**order * self.of_a_sum * raw[-1]
            reach, spread = self.reach + np.abs(mean), np.sqrt(raw[2])
            return Curve(lean + alpha * shift + np.log(mass), shift + mean, moments, most, reach, spread)

        self.curve, self.deep = curve(w, self.center, ORDER), -np.log(total(w))
        self.high = curve(high, 2 - self.center, ORDER_OF_SIDES)
        self.low = curve(low, -self.center, ORDER_OF_SIDES)
        self.row = self._row()

    def _row(self) -> Curve:
        """The whole row as one group."""
        norm, mean, _, share = joined(self.curve.f, self.curve.mean, self.curve.moments[2])
        y = self.curve.mean - mean
        moments = [
            share @ sum(comb(j, k) * y ** (j - k) * self.curve.moments[k] for k in range(j + 1))
            for j in range(ORDER + 1)
        ]
        moments[1] = 0.0
        most = moments[-1] + share @ (self.curve.most - self.curve.moments[-1])
        reach = np.max(np.abs(y) + self.curve.reach)
        return Curve(norm, mean, np.array(moments), most, reach, np.sqrt(moments[2]))

    def at(self, alpha: float) -> tuple[float, float, float]:
        """F, F′, F″."""
        return joined(*self.curve.at(alpha - self.center))[:3]

    def left_out(self, alpha: float) -> tuple[float, float]:
        """What `at` leaves out of F and of F′, at most."""
        x = alpha - self.center
        _, slope, _, share = joined(*self.curve.at(x))
        off, off_tilt = self.curve.left_out(x, 0), self.curve.left_out(x, 1)
        off = off + self.of_a_sum * self.curve.of_moments(x)
        of_f = share @ off
        if of_f >= 0.5:
            return np.inf, np.inf
        return 2 * of_f, share @ (off * np.abs(self.curve.mean - slope) + off_tilt) / (1 - of_f)

    def sides(self, alpha: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """F(2 − α) and F(−α), each with what is left out at most."""
        x = self.center - alpha
        found = []
        for curve in (self.high, self.low):
            norm, _, _, share = joined(*curve.at(x))
            off = share @ (curve.left_out(x, 0) + self.of_a_sum * curve.of_moments(x))
            found.append((norm, 2 * off if off < 0.5 else np.inf))
        return found[0], found[1]

    def near(self, alpha: float) -> tuple[float, float]:
        """F′ by the row's moments, as F is 0 at α = 0 and at 1; and what they leave out, at most."""
        x, c = alpha - self.center, self.center
        high, low = (series(self.row.moments, u, 0) for u in (1 - c, -c))
        rise = sum(self.row.moments[j] * ((1 - c) ** j - (-c) ** j) / factorial(j) for j in range(2, ORDER + 1))
        gap = self.row.at(x)[1] - self.row.mean - np.log1p(rise / low)
        off = self.row.left_out(x, 1) + self.row.left_out(1 - c, 0) + self.row.left_out(-c, 0)
        return gap, 1.1 * off if min(high, low) > 0.91 else np.inf

    def apart(self, alpha: float) -> float:
        """Σ |π_θ − π_t|, at most."""
        (high, _), (low, _), (norm, slope, _) = *self.sides(alpha), self.at(alpha)
        if self.beyond:
            return 2.0
        with np.errstate(over="ignore", invalid="ignore"):
            square = np.exp(norm) * (np.exp(high) + np.exp(low) - 2 * np.exp(norm + (1 - 2 * alpha) * slope))
        return float(np.sqrt(np.clip(square, 0, 4)))

    def rounding(self, alpha: float) -> float:
        """What float32 leaves open of F′, at most."""
        x = alpha - self.center
        f, mean, variance = self.curve.at(x)
        norm, slope, width, share = joined(f, mean, variance)
        weight = self.of_a_weight()
        terms = (2 * weight + OF_A_SUM) * np.abs(mean - slope) + 2 * weight * np.sqrt(variance)
        turn, spread = abs(x) * self.curve.spread, self.curve.spread
        terms = terms + 2 * OF_A_SUM * spread * (1 + 4 * turn * np.exp(np.minimum(2 * turn, 600)))
        rounding = share @ terms + 2 * OF_A_SUM * self.apart(alpha)
        rounding += (4 * OF_AN_EXPONENTIAL + 1e-6) * self.apart(alpha) if self.second else 4 * OF_AN_EXPONENTIAL
        rest = max(self.others, 0) + 2 * OF_A_SUM
        part = min(rest / 2, 1)
        weight = OF_AN_EXPONENTIAL + OF_A_NAT * (DEEPEST - np.log(part))
        of_rest = 1.2 * np.sqrt(width * part) * (2 * weight + 3 * OF_A_SUM) + 2 * rest * OF_AN_EXPONENTIAL
        return min(rounding, of_rest) if rest <= 0.3 and norm >= -0.1 else rounding

    def of_a_weight(self) -> np.ndarray:
        """What float32 leaves open of the weights [G], relative, as a root of the mean square."""
        deep = np.abs(self.deep) if self.beyond else np.maximum(self.deep, 0)
        nats = (DEEPEST + deep) * (1 + 2 * self.beyond) + 2 * self.beyond * (1 + self.beyond) * self.curve.spread
        return OF_AN_EXPONENTIAL + OF_A_NAT * nats

    def of_f(self, alpha: float) -> float:
        """What float32 leaves open of F before the norms are taken off, at most."""
        share = joined(*self.curve.at(alpha - self.center))[3]
        return share @ (self.of_a_weight() + OF_A_SUM)

    def kl(self, alpha: float, of_t: bool) -> tuple[float, float, float]:
        """KL(q‖π_θ), or KL(q‖π_t), what is left out of it, and what float32 leaves open of it, at most."""
        away = alpha if of_t else 1 - alpha
        norm, slope, _ = self.at(alpha)
        off_f, off_slope = self.left_out(alpha)
        kl = (alpha if of_t else alpha - 1) * slope - norm
        return kl, away * off_slope + off_f, away * self.rounding(alpha) + 4 * self.of_f(alpha)

    def near_kl(self, alpha: float, of_t: bool) -> tuple[float, float]:
        """The same by the row's moments, and what they leave out, at most."""
        x, end = alpha - self.center, (0.0 if of_t else 1.0) - self.center
        value, first, _ = (series(self.row.moments, x, k) for k in range(3))
        powers = sum(self.row.moments[j] * (end**j - x**j) / factorial(j) for j in range(2, ORDER + 1))
        kl = np.log1p(powers / value) - (end - x) * first / value
        off = self.row.left_out(end, 0) + self.row.left_out(x, 0) + abs(end - x) * self.row.left_out(x, 1)
        return kl, 1.1 * off if min(value, series(self.row.moments, end, 0)) > 0.91 else np.inf

    def solve_budget(self, budget: float, of_t: bool, tol: float = 1e-5) -> tuple[float, bool]:
        """α with that KL, and whether it is accepted; if not, about where it is."""
        c, away = self.center, lambda alpha: alpha if of_t else 1 - alpha

        def stepped(alpha: float, kl: float, width: float) -> float:
            root = np.sqrt(max(kl, 0))
            steep = away(alpha) * width / (2 * root) if root > 0 else np.sqrt(width / 2)
            change = (np.sqrt(budget) - root) / max(steep, 1e-30)
            return float(np.clip(alpha + change if of_t else alpha - change, 0, 1))

        alpha = away(float(np.clip(np.sqrt(2 * budget / max(self.row.moments[2], 1e-30)), 0, 1)))
        for _ in range(5):
            alpha = stepped(alpha, self.near_kl(alpha, of_t)[0], self.row.at(alpha - c)[2])
        kl, off = self.near_kl(alpha, of_t)
        near, guess = off <= MOST_OF_ALPHA * away(alpha) * self.row.at(alpha - c)[2], alpha
        if not near:
            alpha = c
            for _ in range(8):
                alpha = stepped(alpha, self.kl(alpha, of_t)[0], self.at(alpha)[2])
        norm, slope, width = self.at(alpha)
        of_f, of_slope = self.left_out(alpha)
        size = max(1.0, (alpha - 1) * slope - norm, alpha * slope - norm)
        fit = of_f <= MOST_OF_F * size and of_slope <= tol * size and self.rounding(alpha) <= ROUNDING * size
        fit &= max(off for _, off in self.sides(alpha)) <= 2 * MOST_OF_ESS
        rounding = 16 * self.of_f(alpha) * away(alpha) ** 2 * width * (1 + np.sqrt(width))
        if not near:
            kl, off, rounding = self.kl(alpha, of_t)
        steep, gap = away(alpha) * width, kl - budget if of_t else budget - kl
        stopped = (alpha <= 0 and gap > off + rounding) or (alpha >= 1 and gap < -off - rounding)
        known = (off <= MOST_OF_ALPHA * steep and rounding <= ROUNDING_OF_ALPHA * steep) or width <= FLAT
        fit &= stopped or (known and abs(gap) + off <= tol * max(1, kl))
        return (alpha, True) if fit else (guess, False)

    def fits_outside(self) -> bool:
        """Whether the numbers at a centre outside [0, 1] are accepted."""
        norm, slope, _ = self.at(self.center)
        size = max(1.0, (self.center - 1) * slope - norm, self.center * slope - norm)
        far = self.reach.max() * max(self.center, 1 - self.center) > FARTHEST
        return not far and self.of_kl_outside() <= ROUNDING_OUTSIDE * size

    def of_kl_outside(self) -> float:
        """What float32 leaves open of the KLs at a centre outside [0, 1], at most."""
        of_norms = OF_AN_EXPONENTIAL + OF_A_NAT * DEEPEST + OF_A_SUM
        return (1 + self.beyond) * (self.rounding(self.center) + 2 * of_norms) + self.of_f(self.center)

    def guess(self) -> float:
        """α where F′ vanishes, the groups' log-masses as quartics through those at α = 0 and 1; the centre is ½."""
        mean, c2, c3 = self.curve.mean, self.curve.moments[2], self.curve.moments[3]
        rest_one = 16 * (self.one - self.curve.f - mean / 2) - 2 * c2 - c3 / 3
        rest_zero = 16 * (self.zero - self.curve.f + mean / 2) - 2 * c2 + c3 / 3
        low, high, x = -0.5, 0.5, 0.0
        for _ in range(8):
            rest = rest_one if x > 0 else rest_zero
            f = self.curve.f + x * mean + x * x * (c2 / 2 + x * (c3 / 6 + x * rest))
            width = np.maximum(c2 + x * (c3 + x * 12 * rest), 0)
            _, slope, steep, _ = joined(f, mean + x * (c2 + x * (c3 / 2 + x * 4 * rest)), width)
            low, high = (x, high) if slope < 0 else (low, x)
            step = x - slope / max(steep, 1e-30)
            step = step if low < step < high else (low + high) / 2
            if abs(step - x) <= 1e-5:
                return 0.5 + step
            x = step
        return 0.5 + x

    def solve(self, tol: float = 1e-5) -> tuple[float, bool]:
        """α of the KL rule and whether it is accepted; if not, the centre for a second sweep."""
        alpha = self.center
        for _ in range(5):
            steep = self.row.at(alpha - self.center)[2]
            alpha = float(np.clip(alpha - self.near(alpha)[0] / max(steep, 1e-300), 0, 1))
        gap, off = self.near(alpha)
        near, guess = off <= MOST_OF_ALPHA * self.row.at(alpha - self.center)[2], self.center
        if not near:
            alpha = guess = self.center if self.second else self.guess()
            for _ in range(6):
                _, slope, steep = self.at(alpha)
                alpha = float(np.clip(alpha - slope / max(steep, 1e-30), 0, 1))
        norm, slope, steep = self.at(alpha)
        of_f, of_slope = self.left_out(alpha)
        rounding, size = self.rounding(alpha), max(1.0, (alpha - 1) * slope - norm, alpha * slope - norm)
        fit = of_f <= MOST_OF_F * size and of_slope <= tol * size and rounding <= ROUNDING * size
        fit &= max(off for _, off in self.sides(alpha)) <= 2 * MOST_OF_ESS
        if not near:
            gap, off = slope, of_slope
            known = off <= MOST_OF_ALPHA * steep and rounding <= ROUNDING_OF_ALPHA * steep
            fit &= known or steep <= FLAT
        fit &= abs(gap) + off <= tol * size
        return (alpha, True) if fit else (guess, False)
