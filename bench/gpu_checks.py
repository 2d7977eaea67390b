"""What `python -m bench.gpu` wants to be right before it times: the cases, and all kernels compiled for them ahead."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from bench.calls import Call, Side, distinct
from bench.machine_code import failure, workers
from bench.rows import llm_like
from bench.timing import captured
from qstar_kernels import METHODS, QStarStep, Status, qstar_logprobs, qstar_sample, qstar_stats
from qstar_kernels.gpu import launch
from qstar_kernels.types import Settings
from tests.interpreter import poisoned
from tests.rows import NEAR_TIES, check_near_ties, check_step, equal_bits, stacked, table, unusable, zipf_pair

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Item = tuple[str, Callable[[], Any]]


class Look(Protocol):
    """What an item is told of the run (`bench.gpu.Run`) that it is part of."""

    device: torch.device
    quick: bool
    budget: float
    on_gpu: bool

    def elapsed(self) -> float: ...


def draw(theta: Tensor, t: Tensor, **kwargs) -> QStarStep:
    """A token a row from logits [B, V], whose noise is that of the row's number."""
    index = torch.arange(len(theta), device=theta.device)
    return qstar_sample(theta, t, **{"seeds": index * 7 + 3, "positions": index} | kwargs)


def checked(theta: Tensor, t: Tensor, names, **settings) -> dict[str, float]:
    """The largest deviations from float64, as shares of what is promised, if none is above 1."""
    with poisoned():
        got = draw(theta, t, **settings)
    want = draw(theta.double(), t.double(), impl="reference", **settings)
    return check_step(got, want, theta, t, names, **settings)


class Case(NamedTuple):
    """Rows that are checked: hard ones, or where `noise` is given two usual pairs so far apart."""

    name: str
    vocab_size: int
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)
    settings: Mapping[str, Any] = MappingProxyType({})
    noise: float | None = None
    every: int = 1

    def rows(self) -> tuple[Tensor, Tensor, list[str]]:
        """Both rows [B, V] on the CPU, and the names."""
        if self.noise is not None:
            return *zipf_pair(2, self.vocab_size, self.noise), ["0", "1"]
        unfit = ["finfo"] if self.dtypes != (F32, F32) else []
        if self.settings.get("method") == "entropy":  # entropies of 1e-42: beyond the reference itself
            unfit.append("nats apart")
        pairs = {k: v for k, v in table(self.vocab_size, self.vocab_size).items() if not any(x in k for x in unfit)}
        names = list(pairs)[:: self.every]
        if Settings(**self.settings).truncates:  # a support that hangs on rounding is not hard but undetermined
            names = ["zipf 1", "zipf 8", "one-hot, different", "-inf in both"]
        theta, t = stacked({name: pairs[name] for name in names})
        if Settings(**self.settings).truncates:
            theta, t, names = torch.cat((theta, theta.round())), torch.cat((t, t.round())), names + ["ties"] * 4
        return theta.to(self.dtypes[0]), t.to(self.dtypes[1]), names

    def call(self, what: str = "sample", rows: int = 3) -> Call:
        greedy = self.settings.get("temperature") == 0 and what == "sample"
        sides = (Side(dtype, "padded") for dtype in self.dtypes)
        return Call("greedy" if greedy else what, Settings(**self.settings), *sides, rows, self.vocab_size)


TRUNCATIONS = (
    {"top_k": 50, "top_p": 0.9},
    {"min_p": 0.05},
    {"target_top_k": 40, "target_top_p": 0.8, "top_p": 0.95},
    {"top_k": 1, "temperature": 0.7},
    {"top_p": 0.7, "temperature": 0.0},
)


def said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "default settings"


def cases(quick: bool) -> list[Case]:
    some = 1100 if quick else 4097  # more than one group of ids
    types = [(1, F32, F32), (1024, F32, F32), (some, F32, F32), (some, F16, F16), (some, BF16, F32)]
    if not quick:
        types += [(50257, BF16, BF16), (128256, BF16, BF16), (151936, F32, F32)]
    found = [Case(f"V {v}, {a} and {b}".replace("torch.", ""), v, (a, b)) for v, a, b in types]
    for method in METHODS:
        settings = {"method": method, "alpha_min": 0.52, "alpha_max": 0.56}
        found.append(Case(f"{method}, α in a range", some, settings=settings, noise=3.0))
        if method != "kl_symmetry":
            found.append(Case(method, some, settings={"method": method}))
            if not quick:
                found.append(Case(f"{method}, V 128256", 128256, (BF16, BF16), {"method": method}, every=2))
    found += [Case(f"temperature {x}", some, settings={"temperature": x}) for x in (0.0, 0.3, 1.7)]
    found += [Case(f"{x} nats apart", some, noise=x) for x in (1e-3, 3e-3, 0.03)]
    return found + [Case(said(x), some, settings=x) for x in TRUNCATIONS]


def shapes(quick: bool) -> list[tuple[int, int]]:
    """[B, V] of the steps, the largest vocabulary that is common first."""
    if quick:
        return [(1, 1000), (4, 1000)]
    return [(b, v) for v in (128256, 32000, 151936) for b in (1, 16, 64, 256)]


class Option(NamedTuple):
    rows: int
    name: str
    noise: float
    settings: dict[str, Any]


def options(quick: bool) -> list[Option]:
    far, near = ("8 nats apart", 8.0, {}), ("0.01 nats apart", 0.01, {})
    ess = ("`ess_balance`, 0.01 nats apart", 0.01, {"method": "ess_balance"})
    top_p = ("`top_p=0.9`", 1.0, {"top_p": 0.9})
    if quick:
        return [Option(4, *far), Option(4, *top_p)]
    rest = [(f"`{x}`", 1.0, {"method": x}) for x in ("ess_balance", "entropy", "fixed")]
    rest.append(("temperature 0.7", 1.0, {"temperature": 0.7}))
    for cut in ({"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {"target_top_p": 0.9}):
        rest.append((", ".join(f"`{k}={v}`" for k, v in cut.items()), 1.0, cut))
    some = (far, near, ess, top_p)
    return [*(Option(1, *x) for x in some), *(Option(64, *x) for x in (*some, *rest))]


# settings of a run's first step, and others that later steps may have
CHANGES = (
    ({}, [{"alpha_min": 0.3, "tol": 1e-4}, {"alpha_max": 0.5}]),
    ({"temperature": 0.7}, [{"temperature": 0.5}, {"temperature": 16.0}]),
    ({"temperature": 0.0}, [{"temperature": 0.0, "alpha_max": 0.5}]),
    ({"method": "fixed"}, [{"method": "fixed", "alpha": x} for x in (0.0, 1.0)]),
    ({"top_k": 50, "top_p": 0.9}, [{"top_k": k, "top_p": p} for k, p in ((1, 0.5), (16, 0.99), (999, 0.25))]),
)
BATCHES = (16, 15, 8, 3, 2, 1)


def every_call(quick: bool) -> Iterator[Call]:
    """The calls of all parts, as far as what is compiled for them differs."""
    yield from (case.call() for case in cases(quick))
    for rows, vocab_size in shapes(quick):
        yield Case("", vocab_size, (BF16, BF16)).call(rows=rows)
    common = shapes(quick)[0][1]
    for option in options(quick):
        yield Case("", common, (BF16, BF16), option.settings).call(rows=option.rows)
    for settings in ({}, TRUNCATIONS[0]):
        yield Case("", 4097, settings=settings).call("log q")
    yield Case("", 4097).call("look up")
    for settings, _ in CHANGES:
        yield Case("", 4097, settings=settings).call(rows=BATCHES[0])


def compile_ahead(run: Look, architecture: str, seconds: float | None = None) -> dict[str, float]:
    """Compile on all cores into Triton's cache, where the calls find it; what is not ready in time they compile."""
    launches = list(distinct(every_call(run.quick), architecture).of.values())
    results = workers().map(failure, [(*launch, architecture) for launch in launches], seconds)
    problems, done = [], 0
    with suppress(TimeoutError):
        for problem, (call, i) in zip(results, launches, strict=True):
            done += 1
            if problem:
                problems.append(f"launch {i} of {call}: {problem}")
    assert not problems, "\n".join(problems)
    return {"kernels": done, "of": len(launches), "seconds": run.elapsed()}


def compilation(run: Look) -> Iterator[Item]:
    if run.on_gpu:
        yield "ahead", partial(compile_ahead, run, architecture(), 0.3 * run.budget)


def architecture() -> str:
    """Of this GPU, as Triton names it."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def correctness(run: Look) -> Iterator[Item]:
    def check(case: Case) -> dict[str, float]:
        theta, t, names = case.rows()
        return checked(theta.to(run.device), t.to(run.device), names, **case.settings)

    for case in cases(run.quick):
        yield case.name, partial(check, case)
    theta, t = (x.to(run.device) for x in zipf_pair(4, 4097, 1.0))

    def log_q(**settings) -> None:
        got, _ = qstar_logprobs(theta, t, **settings)
        want, _ = qstar_logprobs(theta.double(), t.double(), impl="reference", **settings)
        assert torch.equal(got.isneginf(), want.isneginf()), "another support"
        kept = want.isfinite()
        torch.testing.assert_close(got[kept].double(), want[kept], rtol=1e-5, atol=1e-5)

    def look_up() -> None:
        tokens = torch.tensor([3, -1, 4097, 4096], device=run.device)
        got = qstar_stats(theta, t, tokens=tokens)
        want = qstar_stats(theta.double(), t.double(), tokens=tokens, impl="reference")
        for x, y in zip(got.numbers(), want.numbers(), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5, equal_nan=True)

    def no_token() -> None:
        bad = unusable(4097)
        bad_theta, bad_t = (x.to(run.device) for x in stacked(bad))
        among = draw(torch.cat((theta, bad_theta)), torch.cat((t, bad_t)))
        assert equal_bits(among, draw(theta, t), slice(0, 4)), "a neighbour's bits changed"
        assert among.status[4:].tolist() == [Status[name] for name in bad], among.status.tolist()
        assert among.token[4:].tolist() == [-1] * len(bad), among.token.tolist()
        assert all(x[4:].isnan().all() for x in among.numbers()), "numbers where there is no token"

    yield "log q", log_q
    yield "log q, truncated", partial(log_q, **TRUNCATIONS[0])
    yield "tokens looked up", look_up
    yield "rows without a token", no_token


def ties(run: Look) -> Iterator[Item]:
    chosen = [NEAR_TIES[5], NEAR_TIES[3]] if run.quick else NEAR_TIES  # the two that are soonest found
    for vocab_size, seed, noise, settings in chosen:
        case = vocab_size, seed, noise, settings
        yield f"V {vocab_size}, {said(settings)}", partial(check_near_ties, "auto", case, run.device)


def bits(run: Look) -> Iterator[Item]:
    settings_of_all = ({}, {"top_p": 0.9}, {"method": "ess_balance"}, {"temperature": 0.0})
    theta, t = (x.to(run.device, BF16) for x in llm_like(32, shapes(run.quick)[0][1], 1.0, run.device))
    seeds = torch.arange(32, device=run.device)

    def of_rows(rows: slice, **settings) -> QStarStep:
        return qstar_sample(theta[rows], t[rows], seeds=seeds[rows], positions=seeds[rows], **settings)

    def alone(settings: dict) -> None:
        pairs = table(1300, seed=9) | unusable(1300)
        repeat = torch.arange(64) % len(pairs)
        theta, t = (x[repeat].to(run.device) for x in stacked(pairs))
        seeds = torch.arange(64, device=run.device)
        among = qstar_sample(theta, t, seeds=seeds, positions=seeds, **settings)
        for i in range(0, 64, 5):
            row = slice(i, i + 1)
            one = qstar_sample(theta[row], t[row], seeds=seeds[row], positions=seeds[row], **settings)
            assert equal_bits(among, one, row), f"row {i} differs alone"

    def again() -> None:
        among = of_rows(slice(0, 32))
        for _ in range(3 if run.quick else 20):
            assert equal_bits(among, of_rows(slice(0, 32))), "two calls differ"
        for start, stop in ((0, 1), (7, 8), (5, 8), (16, 32)):
            assert equal_bits(among, of_rows(slice(start, stop)), slice(start, stop)), (start, stop)

    def anywhere() -> None:
        theta, t = (x.to(run.device) for x in zipf_pair(3, 1501, 1.0))
        want, wide = draw(theta, t), torch.full((3, 3008), torch.nan, device=run.device)
        for name, place in {
            "padded to a multiple of 16": wide[:, :1501],
            "not at a multiple of 16": wide[:, 5:1506],
            "every second number": wide[:, 3:3005:2],
            "columns": torch.empty(1501, 3, device=run.device).T,
        }.items():
            assert equal_bits(want, draw(place.copy_(theta), t)), name
        assert equal_bits(draw(theta[:1].repeat(3, 1), t), draw(theta[:1].expand(3, -1), t)), "one row expanded"

    def last_rows(rows: int, vocab_size: int, dtype: torch.dtype) -> None:
        theta, t = (torch.empty(rows, vocab_size, dtype=dtype, device=run.device).normal_() for _ in range(2))
        last = slice(rows - 3, rows)
        index = torch.arange(rows, device=run.device)
        want = qstar_sample(theta[last].clone(), t[last].clone(), seeds=index[last] * 7 + 3, positions=index[last])
        assert equal_bits(draw(theta, t), want, last)

    def replayed(settings: dict) -> None:
        given, steps = [x[:8].clone() for x in (theta, t, seeds)], []
        replay = captured(
            lambda: steps.append(qstar_sample(*given[:2], seeds=given[2], positions=given[2], **settings))
        )
        for rows in (slice(8, 16), slice(16, 24)):
            for x, new in zip(given, (theta, t, seeds), strict=True):
                x.copy_(new[rows])
            count = len(steps)
            replay()
            assert len(steps) == count, "could not be captured"
            assert equal_bits(steps[-1], of_rows(rows, **settings)), rows

    def two_streams() -> None:
        among, halves = of_rows(slice(0, 32)), (slice(0, 16), slice(16, 32))
        streams, steps = [torch.cuda.Stream() for _ in halves], []
        torch.cuda.synchronize()
        for _ in range(20):
            for stream, rows in zip(streams, halves, strict=True):
                with torch.cuda.stream(stream):
                    steps.append((rows, of_rows(rows)))
        torch.cuda.synchronize()
        assert all(equal_bits(among, step, rows) for rows, step in steps), "streams disturb each other"

    for settings in settings_of_all[:3]:
        yield f"a row alone and among 64, {said(settings)}", partial(alone, settings)
    yield "calls again, and parts of the batch", again
    yield "rows anywhere in memory", anywhere
    yield "many rows", partial(last_rows, 700 if run.quick else 70000, 1024, F32)
    if run.on_gpu:
        for settings in settings_of_all:
            yield f"graph replays, {said(settings)}", partial(replayed, settings)
        yield "two streams", two_streams
        if torch.cuda.mem_get_info()[0] > 30e9:
            yield "logits beyond the 2³¹st", partial(last_rows, 17000, 128256, BF16)


def prepared() -> int:
    """Kernels that this process has made ready for launching: what is new to it is a wait, for seconds if compiled."""
    kernels = [x for x in vars(launch).values() if isinstance(x, triton.runtime.JITFunction)]
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def steadiness(run: Look) -> Iterator[Item]:
    theta, t = (x.to(run.device) for x in zipf_pair(BATCHES[0], 4097, 1.0))
    index = torch.arange(BATCHES[0], device=run.device)

    def step(rows: int, settings: dict) -> None:
        chosen = slice(BATCHES[0] - rows, None)
        qstar_sample(theta[chosen], t[chosen], seeds=index[chosen], positions=index[chosen], **settings)

    def steady(first: dict, others: list[dict]) -> int:
        step(BATCHES[0], first)
        before = prepared()
        for rows in BATCHES:
            for settings in (first, *others):
                step(rows, settings)
        assert prepared() == before, f"{prepared() - before} kernels compiled on the way"
        return 0

    for first, others in CHANGES:
        yield said(first), partial(steady, first, others)
