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
    POSITIVE_INFINITY = 2  # a logit is +inf
    NO_SUPPORT = 3  # all logits of a row are −inf
    DISJOINT = 4  # no token is finite in both rows
    EMPTY = 5  # truncation leaves no token: π_t's top-k/top-p support has none that both models allow
    INEXACT = 6  # the row failed the last look at its own numbers, in float64 too


# What float64 can tell apart on rows of any kind. Beyond it a row is one token, or all of them alike
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


def mask_of(dtype: torch.dtype) -> float:
    """The greatest logit of a type that means −inf.

    Masks are also written as the least finite number of the logits' type, which taken literally puts corners into the
    curve that have nothing to do with the two models. That number is −65504 for float16; for the wider types anything
    from −1e30 down is taken for one.
    """
    return torch.finfo(dtype).min if dtype == torch.float16 else -1e30


@dataclass(frozen=True)
class Settings:
    """The rule for α, temperature and truncation; the meaning of each is in `qstar_kernels.api.qstar_sample`.

    Raises:
        ValueError: a setting is outside its range; the message names it, the value seen and what is accepted.
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
        def check(name: str, accepted: bool, range_: str) -> None:
            if not accepted:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {range_}")

        def number(name: str, low: float, high: float, range_: str, above: bool = False) -> None:
            value = getattr(self, name)
            real = isinstance(value, Real) and not isinstance(value, bool)
            check(name, real and (low < value if above else low <= value) and value <= high, range_)
            object.__setattr__(self, name, float(value))

        def count(name: str) -> None:
            value = getattr(self, name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            check(name, whole and value >= 0, "an integer, at least 0 (0 keeps all tokens)")
            object.__setattr__(self, name, min(int(value), 2**63 - 1))  # more than any vocabulary has

        check("method", self.method in METHODS, f"one of {', '.join(METHODS)}")
        number("alpha", 0, 1, "in [0, 1]: the weight of π_θ")
        number("alpha_min", 0, 1, "in [0, 1]")
        number("alpha_max", self.alpha_min, 1, f"in [alpha_min = {self.alpha_min}, 1]")
        range_ = f"0 (greedy), or in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]"
        number("temperature", 0, MAX_TEMPERATURE, range_)
        check("temperature", self.temperature == 0 or self.temperature >= MIN_TEMPERATURE, range_)
        count("top_k")
        number("top_p", 0, 1, "in (0, 1] (1 keeps all tokens)", above=True)
        number("min_p", 0, 1, "in [0, 1] (0 keeps all tokens)")
        count("target_top_k")
        number("target_top_p", 0, 1, "in (0, 1] (1 keeps all tokens)", above=True)
        number("tol", 0, 1, "in (0, 1]", above=True)

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
