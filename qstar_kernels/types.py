"""What goes into and comes out of the sampler."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # a command line has its options from here, and does without torch until a model is loaded
    import torch
    from torch import Tensor

METHODS = ("kl_symmetry", "ess_balance", "reverse_kl_symmetry", "entropy", "kl_budget", "kl_budget_t", "fixed")
BUDGETS = ("kl_budget", "kl_budget_t")  # one KL is given
SOLVED = ("kl_symmetry", "ess_balance", *BUDGETS)  # those whose condition is met to a tolerance


class Status(IntEnum):
    """Why a row has no token; the row's numbers are NaN then, and its neighbours are untouched."""

    OK = 0
    NAN = 1  # a logit is NaN
    POSITIVE_INFINITY = 2  # a logit is +inf, or `LARGEST_LOGIT` or more
    NO_SUPPORT = 3  # all logits of a row are −inf
    DISJOINT = 4  # no token is finite in both rows
    EMPTY = 5  # truncation leaves no token: π_t's top-k/top-p support has none that both models allow
    INEXACT = 6  # the row failed the last look at its own numbers, in float64 too
    BAD_SETTING = 7  # α, a clamp or the budget that was given for this row alone is NaN or outside its range


# What float64 can tell apart on rows of any kind. Beyond it a row is one token, or all of them alike
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


LARGEST_LOGIT = 1e15  # beyond this a logit means an infinity


def mask_of(dtype: "torch.dtype") -> float:
    """The greatest logit of a type that means −inf.

    Masks are also written as the least finite number of the logits' type, or as −1e18, which taken literally puts
    corners into the curve that have nothing to do with the two models. The least number of float16 is −65504; for the
    wider types anything from −1e15 down is taken for a mask.
    """
    import torch

    return -65504.0 if dtype == torch.float16 else -LARGEST_LOGIT


class Range(NamedTuple):
    """The numbers that a setting may be, and how an error says so."""

    least: float
    most: float
    accepted: str


ABOVE_0, MOST = 5e-324, 2**63 - 1  # the least number above 0, and a count that no vocabulary has
SHARE = Range(ABOVE_0, 1.0, "in (0, 1] (1 keeps all tokens)")
COUNT = Range(0, MOST, "an integer, at least 0 (0 keeps all tokens)")
TEMPERATURE = Range(0.0, MAX_TEMPERATURE, f"0 (greedy), or in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]")
LEAST_BUDGET = 1e-15  # nats; what is less rounding hides, and means the end itself
MOST_ALPHA, MOST_BUDGET = 100.0, 1e6  # a budget no pair of models exceeds, and guidance beyond all use
RULE, SAMPLING = "rule for α (the weight of π_θ)", "sampling"


def setting(
    default: Any,
    group: str,
    help: str,
    bounds: Range | None = None,
    methods: Sequence[str] = METHODS,
    per_row: bool = False,
) -> Any:
    """A field of `Settings`; `group` and `help` are those of its option on a command line.

    `methods` are those that it has a meaning for; `per_row`: the sampler's functions take a tensor [B] of it, too.
    """
    metadata = {"group": group, "help": help, "range": bounds, "methods": methods, "per_row": per_row}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The rule for α, temperature and truncation; the meaning of each is in `qstar_kernels.api.qstar_sample`.

    Whatever else lists the settings has them from the fields: the C struct, the operator, command lines, requests.

    Raises:
        ValueError: a setting is of another type, or outside its range; the message names it, the value seen and what is
            accepted.
    """

    method: str = setting("kl_symmetry", RULE, "condition that α meets at every token")
    alpha: float = setting(
        0.5,
        RULE,
        "α of method fixed; outside [0, 1] it extrapolates: away from π_t above 1, away from π_θ below 0",
        Range(-MOST_ALPHA, MOST_ALPHA, f"in [-{MOST_ALPHA:g}, {MOST_ALPHA:g}]: the weight of π_θ"),
        ("fixed",),
        per_row=True,
    )
    alpha_min: float = setting(0.0, RULE, "lower clamp", Range(0.0, 1.0, "in [0, 1]"), per_row=True)
    alpha_max: float = setting(1.0, RULE, "upper clamp", Range(0.0, 1.0, "in [alpha_min, 1]"), per_row=True)
    kl_budget: float = setting(
        0.01,
        RULE,
        "nats: KL(q*‖π_θ) of method kl_budget, KL(q*‖π_t) of kl_budget_t",
        Range(0.0, MOST_BUDGET, f"in [0, {MOST_BUDGET:g}] nats"),
        BUDGETS,
        per_row=True,
    )
    temperature: float = setting(1.0, SAMPLING, "of both models, before they are mixed; 0 is greedy", TEMPERATURE)
    top_k: int = setting(0, SAMPLING, "keep the k most probable tokens of q* (0: all)", COUNT)
    top_p: float = setting(1.0, SAMPLING, "keep the most probable tokens with this mass of q*", SHARE)
    min_p: float = setting(
        0.0,
        SAMPLING,
        "drop tokens below this share of q*'s most probable one",
        Range(0.0, 1.0, "in [0, 1] (0 keeps all tokens)"),
    )
    target_top_k: int = setting(0, SAMPLING, "restrict q* to π_t's top k (0: all)", COUNT)
    target_top_p: float = setting(1.0, SAMPLING, "restrict q* to π_t's top-p set", SHARE)
    tol: float = setting(
        1e-5,
        RULE,
        "in nats, bound on |KL(q*‖π_θ) − KL(q*‖π_t)|, or on what a KL is off its budget",
        Range(ABOVE_0, 1.0, "in (0, 1]"),
        SOLVED,
    )

    def __post_init__(self) -> None:
        # once a call: what costs more than a comparison is done only where a comparison asks for it
        def refuse(name: str, accepted: str) -> None:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {accepted}")

        if self.method not in METHODS:
            refuse("method", f"one of {', '.join(METHODS)}")
        for name, least, most, accepted in NUMBERS:
            value = getattr(self, name)
            if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):
                refuse(name, accepted)
            if not least <= value <= most:
                refuse(name, accepted)
            if type(value) is not float:
                object.__setattr__(self, name, float(value))
        if self.alpha_min > self.alpha_max:
            refuse("alpha_max", f"in [alpha_min = {self.alpha_min}, 1]")
        if 0 < self.temperature < MIN_TEMPERATURE:
            refuse("temperature", TEMPERATURE.accepted)
        for name, least, most, accepted in COUNTS:
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                    refuse(name, accepted)
                object.__setattr__(self, name, min(int(value), most))

    @property
    def known_alpha(self) -> float | None:
        """α where it is not solved for: under `fixed`, of a budget that rounding would hide, and between equal clamps.

        A clamp at 0 or at 1 does not bind a given α.
        """
        low, high = self.alpha_min, self.alpha_max
        if self.method == "fixed":
            alpha = low if 0 < low > self.alpha else self.alpha
            return high if 1 > high < alpha else alpha
        if self.method in BUDGETS and (low == high or self.kl_budget <= LEAST_BUDGET):
            return high if self.method == "kl_budget" else low
        return None

    @property
    def truncates(self) -> bool:
        return any(getattr(self, name) != everything for name, everything in TRUNCATIONS)

    def values(self) -> list[str | float | int]:
        """In the order of the fields."""
        return [getattr(self, name) for name in SETTINGS]


SETTINGS = tuple(f.name for f in fields(Settings))
PER_ROW: dict[str, Range] = {f.name: f.metadata["range"] for f in fields(Settings) if f.metadata["per_row"]}
READ_BY: dict[str, Sequence[str]] = {f.name: f.metadata["methods"] for f in fields(Settings)}  # the methods of each
# By their defaults they keep all tokens
TRUNCATIONS = [
    (f.name, f.default) for f in fields(Settings) if f.metadata["group"] == SAMPLING and f.name != "temperature"
]
NUMBERS, COUNTS = (
    [(f.name, *f.metadata["range"]) for f in fields(Settings) if f.type is kind] for kind in (float, int)
)


def check_read(said: Iterable[str], method: str, called: Callable[[str], str] = str) -> None:
    """Refuse what would be ignored: a setting that was said, and that the rule for α does not read.

    Args:
        said: names of settings; others are passed over.
        called: what a message calls them.

    Raises:
        ValueError: there is one.
    """
    for name in said:
        methods = READ_BY.get(name, METHODS)
        if method not in methods:
            raise ValueError(f"{called(name)} goes with {called('method')} {' or '.join(methods)}, and it is {method}")


@dataclass
class QStarStep:
    """One number a row, [B] each; floats are float32, float64 for float64 logits. All in nats where a unit applies.

    `alpha`, the KLs and the ESS describe q* after temperature and before truncation. `logq` is the log-probability of
    the token under the distribution it was drawn from, after temperature and truncation (at temperature 0: under
    q* at temperature 1). `logp_theta` and `logp_t` are the models' own at temperature 1, untruncated.
    """

    alpha: "Tensor"
    kl_theta: "Tensor"  # KL(q*‖π_θ)
    kl_t: "Tensor"  # KL(q*‖π_t)
    ess_theta: "Tensor"  # 1 / Σ π_θ²/q*, in (0, 1]; 0 where π_θ has mass outside q*'s support
    ess_t: "Tensor"  # 1 / Σ π_t²/q*
    status: "Tensor"  # int64, see `Status`
    token: "Tensor | None" = None  # int64, −1 where `status` is not OK
    logq: "Tensor | None" = None
    logp_theta: "Tensor | None" = None
    logp_t: "Tensor | None" = None

    @classmethod
    def of(cls, numbers: Sequence["Tensor"], status: "Tensor", token: "Tensor | None") -> "QStarStep":
        """From `FIELDS`, [B] each; of those `OF_ROW` alone are looked at where there is no token."""
        of_token = () if token is None else numbers[len(OF_ROW) :]
        return cls(*numbers[: len(OF_ROW)], status, token, *of_token)

    def to(self, dtype: "torch.dtype") -> "QStarStep":
        """The same with its floating-point fields in `dtype`."""
        if self.alpha.dtype == dtype:
            return self
        return QStarStep.of([x.to(dtype) for x in self.numbers()], self.status, self.token)

    def numbers(self) -> list["Tensor"]:
        """The `FIELDS` that are there."""
        return [x for name in FIELDS if (x := getattr(self, name)) is not None]


NAMES = tuple(f.name for f in fields(QStarStep))
OF_ROW, OF_TOKEN = NAMES[: NAMES.index("status")], NAMES[NAMES.index("token") + 1 :]
FIELDS = OF_ROW + OF_TOKEN  # the floating-point fields, in the order of every [8, B]


def output_dtype(theta: "Tensor", t: "Tensor") -> "torch.dtype":
    """float64 where a row is float64, else float32."""
    import torch

    return torch.float64 if torch.float64 in (theta.dtype, t.dtype) else torch.float32
