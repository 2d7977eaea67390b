"""What goes into and comes out of the sampler."""

import dataclasses
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral, Real

import torch
from torch import Tensor

METHODS = ("kl_symmetry", "ess_balance", "reverse_kl_symmetry", "entropy", "fixed")


class Status(IntEnum):
    """Why a row has no token; the row's numbers are NaN then, and its neighbours are untouched."""

    OK = 0
    NAN = 1  # a logit is NaN
    POSITIVE_INFINITY = 2  # a logit is +inf, or `LARGEST_LOGIT` or more
    NO_SUPPORT = 3  # all logits of a row are −inf
    DISJOINT = 4  # no token is finite in both rows
    EMPTY = 5  # truncation leaves no token: π_t's top-k/top-p support has none that both models allow
    INEXACT = 6  # the row failed the last look at its own numbers, in float64 too


# What float64 can tell apart on rows of any kind. Beyond it a row is one token, or all of them alike
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


LARGEST_LOGIT = 1e15  # beyond this a logit means an infinity


def mask_of(dtype: torch.dtype) -> float:
    """The greatest logit of a type that means −inf.

    Masks are also written as the least finite number of the logits' type, or as −1e18, which taken literally puts
    corners into the curve that have nothing to do with the two models. The least number of float16 is −65504; for the
    wider types anything from −1e15 down is taken for a mask.
    """
    return -65504.0 if dtype == torch.float16 else -LARGEST_LOGIT


# name: least, most (5e-324 is the least number above 0), what is accepted
NUMBERS = {
    "alpha": (0.0, 1.0, "in [0, 1]: the weight of π_θ"),
    "alpha_min": (0.0, 1.0, "in [0, 1]"),
    "alpha_max": (0.0, 1.0, "in [alpha_min, 1]"),
    "temperature": (0.0, MAX_TEMPERATURE, f"0 (greedy), or in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]"),
    "top_p": (5e-324, 1.0, "in (0, 1] (1 keeps all tokens)"),
    "min_p": (0.0, 1.0, "in [0, 1] (0 keeps all tokens)"),
    "target_top_p": (5e-324, 1.0, "in (0, 1] (1 keeps all tokens)"),
    "tol": (5e-324, 1.0, "in (0, 1]"),
}
COUNTS = ("top_k", "target_top_k")


@dataclass(frozen=True)
class Settings:
    """The rule for α, temperature and truncation; the meaning of each is in `qstar_kernels.api.qstar_sample`.

    Raises:
        ValueError: a setting is of another type, or outside its range; the message names it, the value seen and what is
            accepted.
    """

    method: str = "kl_symmetry"
    alpha: float = 0.5
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    target_top_k: int = 0
    target_top_p: float = 1.0
    tol: float = 1e-5

    def __post_init__(self) -> None:
        # once a token: what costs more than a comparison is done only where a comparison asks for it
        def refuse(name: str, range_: str) -> None:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {range_}")

        if self.method not in METHODS:
            refuse("method", f"one of {', '.join(METHODS)}")
        for name, (least, most, range_) in NUMBERS.items():
            value = getattr(self, name)
            if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):
                refuse(name, range_)
            if not least <= value <= most:
                refuse(name, range_)
            if type(value) is not float:
                object.__setattr__(self, name, float(value))
        if self.alpha_min > self.alpha_max:
            refuse("alpha_max", f"in [alpha_min = {self.alpha_min}, 1]")
        if 0 < self.temperature < MIN_TEMPERATURE:
            refuse("temperature", NUMBERS["temperature"][2])
        for name in COUNTS:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**63:
                if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
                    refuse(name, "an integer, at least 0 (0 keeps all tokens)")
                object.__setattr__(self, name, min(int(value), 2**63 - 1))  # more than any vocabulary has

    @property
    def truncates(self) -> bool:
        return bool(self.top_k or self.top_p < 1 or self.min_p or self.target_top_k or self.target_top_p < 1)


@dataclass
class QStarStep:
    """One number a row, [B] each; floats are float32, float64 for float64 logits. All in nats where a unit applies.

    `alpha`, the KLs and the ESS describe q* after temperature and before truncation. `logq` is the log-probability of
    the token under the distribution it was drawn from, after temperature and truncation (at temperature 0: under
    q* at temperature 1). `logp_theta` and `logp_t` are the models' own at temperature 1, untruncated.
    """

    alpha: Tensor
    kl_theta: Tensor  # KL(q*‖π_θ)
    kl_t: Tensor  # KL(q*‖π_t)
    ess_theta: Tensor  # 1 / Σ π_θ²/q*, in (0, 1]; 0 where π_θ has mass outside q*'s support
    ess_t: Tensor  # 1 / Σ π_t²/q*
    status: Tensor  # int64, see `Status`
    token: Tensor | None = None  # int64, −1 where `status` is not OK
    logq: Tensor | None = None
    logp_theta: Tensor | None = None
    logp_t: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "QStarStep":
        """The same with its floating-point fields in `dtype`."""
        if self.alpha.dtype == dtype:
            return self
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return QStarStep(
            **{k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in fields.items()}
        )


def output_dtype(theta: Tensor, t: Tensor) -> torch.dtype:
    """float64 where a row is float64, else float32."""
    return torch.float64 if torch.float64 in (theta.dtype, t.dtype) else torch.float32
