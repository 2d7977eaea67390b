"""What the kernels compile to on GPUs that are not here, and the sampler under torch's tracers."""

import os
import time
from itertools import combinations, islice, pairwise, product

import pytest
import torch
import triton
from rows import zipf_pair
from torch._dynamo.testing import CompileCounterWithBackend
from triton.runtime import driver

from bench.calls import (
    PLACES,
    TRUNCATIONS,
    WHATS,
    Call,
    Distinct,
    Side,
    Specialisation,
    compiled,
    covering,
    distinct,
    every_call,
    pretended,
)
from bench.gpu_checks import prepared
from bench.machine_code import ARCHITECTURES, attempts, estimate, report, reports, sampling_step, whole, workers
from qstar_kernels import qstar_logprobs, qstar_sample, qstar_stats
from qstar_kernels.dispatch import step_op
from qstar_kernels.gpu import launch as gpu
from qstar_kernels.gpu.launch import Kept, kept
from qstar_kernels.types import PER_ROW, Settings

# 20 warps of the sweep find room on a multiprocessor with these, and one program of 256 threads.
# They are those of versions of Triton that are known: others take more.
KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
MOST_REGISTERS = {
    "sweep_kernel": 100,
    "settle_kernel": 192,
    "finish_kernel": 255,
    "divide_kernel": 224,
    "top_kernel": 128,
    "masses_kernel": 168,
    "log_q_kernel": 128,
}


# Instructions of a loop that move registers to memory and back. Those of `settle_kernel` are Newton's, a few turns a
# row; those of truncation, for logits of two types on sm_100 and sm_120, are a few of the thousand that a group takes.
MOST_SPILLED = {"settle_kernel": 16, "divide_kernel": 8, "masses_kernel": 8}

PADDED = Side(torch.bfloat16, "padded")


def check_all_compile(found: Distinct, strength: int | None, architecture: str) -> None:
    """The specialisations, or what `covering` leaves of them, compile, and no loop spills."""
    launches = [found.of[key] for key in (found.of if strength is None else covering(found.of, strength))]
    bad = [
        f"launch {i} of {call}: {result if isinstance(result, str) else f'spills {result.spilled}'}"
        for (call, i), result in zip(launches, attempts(launches, architecture), strict=True)
        if isinstance(result, str) or result.spilled > MOST_SPILLED.get(result.kernel, 0)
    ]
    assert not bad, "\n".join(bad)


def some_calls(architecture: str = "sm_90") -> Distinct:
    return distinct(islice(every_call(), 0, None, 89), architecture)


@pytest.mark.parametrize("what", WHATS)
def test_whatever_is_asked_compiles(what):
    """Every launch of each question with the default settings, and of sampling with all of truncation."""
    cuts = [{}, TRUNCATIONS] if what == "sample" else [{}]
    calls = [Call(what, Settings(temperature=WHATS[what][0], **cut), PADDED, PADDED) for cut in cuts]
    check_all_compile(distinct(calls, "sm_90"), None, "sm_90")


@pytest.mark.slow
def test_every_argument_of_every_kernel_compiles():
    """Types, constants, None, multiples of 16, ones: one that is compiled here has it, and has any two constants."""
    check_all_compile(some_calls(), 1, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "sm_90"])
def test_every_constant_compiles_elsewhere(architecture):
    check_all_compile(some_calls("gfx942" if architecture == "gfx942" else "sm_90"), 0, architecture)


@pytest.mark.slow
def test_the_quick_set_misses_nothing():
    """The calls of the quick test show all that an argument can be in any call."""

    def values(found) -> set:
        return {(key.kernel, value) for key in found.of for value in key.arguments}

    assert values(some_calls()) == values(whole("sm_90"))


def launched(**changes) -> set:
    """The specialisations of a call that differs in this from sampling with the default settings."""
    call = {"what": "sample", "settings": Settings(), "theta": PADDED, "t": PADDED} | changes
    return set(distinct([Call(**call)], "sm_90").of)


@pytest.mark.parametrize("place", [place for place in PLACES if place != "far"])
def test_rows_anywhere_are_launched_alike(place):
    """So a row's bits do not depend on where it lies: the order of a program's sums follows from its specialisation."""
    for theta, t in product((place, "padded"), repeat=2):
        for vocab_size in (999, 50257):
            sides = {"theta": Side(torch.float32, theta), "t": Side(torch.float32, t)}
            padded = {"theta": Side(torch.float32, "padded"), "t": Side(torch.float32, "padded")}
            assert launched(**sides, vocab_size=vocab_size) == launched(**padded, vocab_size=vocab_size)


def test_a_shrinking_batch_compiles_the_sweeps_once():
    sweeps = [
        {key for key in launched(rows=rows) if key.kernel in ("sweep_kernel", "settle_kernel")} for rows in (1, 7, 16)
    ]
    assert sweeps[0] == sweeps[1] == sweeps[2]


def test_other_numbers_of_tokens_compile_truncation_once():
    """1, a multiple of 16 and more than fit in 32 bits are numbers like any other."""
    kept = [launched(settings=Settings(top_k=k, target_top_k=k)) for k in (1, 16, 50, 50256)]
    assert all(keys == kept[0] for keys in kept)
    unlimited = [launched(settings=Settings(top_k=k, target_top_k=k)) for k in (50257, 2**40)]
    assert unlimited[0] == unlimited[1]


def test_rules_share_what_does_not_depend_on_them():
    """The sweep is told only which sums entropies and the reverse rule need, the draw after truncation nothing."""
    by_rule = {
        method: launched(settings=Settings(method=method, top_k=50)) for method in ("kl_symmetry", "ess_balance")
    }
    differ = by_rule["kl_symmetry"] ^ by_rule["ess_balance"]
    assert sorted(key.kernel for key in differ) == ["finish_kernel"] * 2 + ["settle_kernel"] * 2


# what the tests above compile anyway
ASKED = {
    "sample": (qstar_sample, {}),
    "truncated": (qstar_sample, TRUNCATIONS),
    "greedy": (qstar_sample, {"temperature": 0.0}),
    "look up": (qstar_stats, {}),
    "log q": (qstar_logprobs, {}),
}
LOGITS = torch.zeros(2, 9, 50304, dtype=torch.bfloat16)


def ask(what: str, first: int, rows: int):
    """A call on some of 9 rows, which lie apart; its launches and what it returned."""
    function, settings = ASKED[what]
    theta, t = (x[first : first + rows] for x in LOGITS)
    index = torch.arange(9)[first : first + rows]
    names = {qstar_sample: ("seeds", "positions"), qstar_stats: ("tokens",), qstar_logprobs: ()}[function]
    given = {"theta": theta, "t": t} | dict.fromkeys(names, index)
    driver.active.launched.clear()
    result = function(theta, t, impl="triton", vocab_size=50257, **dict.fromkeys(names, index), **settings)
    return given, list(driver.active.launched), result


@pytest.fixture
def no_gpu():
    kept.cache_clear()
    with pretended("sm_90") as device:
        yield device
    kept.cache_clear()


@pytest.mark.parametrize("what", ASKED)
def test_a_step_that_comes_again_is_launched_alike(no_gpu, what):
    """The second time without Triton's binder: equal kernels and numbers, the new addresses at the old ones' places."""
    _, launched, _ = ask(what, 0, 4)
    given, again, result = ask(what, 3, 4)
    assert [name for name, _ in again] == [name for name, _ in launched]
    memory, addresses = {}, {x.data_ptr() for x in given.values()}
    for (_, before), (_, now) in zip(launched, again, strict=True):
        tensors = [isinstance(x, torch.Tensor) for x in before]
        hooks = slice(6, 9)
        assert now[hooks] == (None, None, None)
        for is_tensor, x, y in list(zip(tensors, before, now, strict=True))[hooks.stop :]:
            if is_tensor:
                assert memory.setdefault(id(x), (y, x.nbytes))[0] == y, "one tensor, two addresses"
            else:
                assert type(x) is type(y)
                assert x == y
        assert now[:6] == before[:6]
    assert addresses <= {address for address, _ in memory.values()}
    ends = sorted((address, address + size) for address, size in memory.values() if address not in addresses)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends)), "memory that overlaps"
    assert all(address % 16 == 0 for address, _ in ends)
    step = result[1] if isinstance(result, tuple) else result
    filled = {step.alpha, step.status, *({step.token} if what in ("sample", "greedy") else ())}
    assert {x.data_ptr() for x in filled} <= {start for start, _ in ends}


@pytest.mark.parametrize("what", ASKED)
def test_other_rows_and_batches_compile_nothing(no_gpu, what):
    ask(what, 0, 8)
    before = prepared()
    for first, rows in ((1, 8), (2, 7), (0, 3), (5, 2), (4, 1)):
        ask(what, first, rows)
    assert prepared() == before


def test_a_triton_that_launches_otherwise_is_launched_in_the_ordinary_way(no_gpu, monkeypatch):
    def ordinary(launched) -> bool:
        return all(any(isinstance(x, torch.Tensor) for x in given) for _, given in launched)

    again = Kept()
    monkeypatch.setattr(gpu, "kept", lambda *step: again)
    ask("sample", 0, 4)
    assert not ordinary(ask("sample", 0, 4)[1])
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    assert ordinary(ask("sample", 0, 4)[1]), "who listens hears nothing"
    hook.remove(print)
    again.launches = [(len, arguments) for _, arguments in again.launches]  # which takes one argument
    for _ in range(2):
        _, launched, step = ask("sample", 0, 4)
        assert ordinary(launched)
        assert len(launched) == 4
        assert len(step.token) == 4
    assert again.refused


def test_a_step_that_comes_again_takes_less_than_half_the_time(no_gpu):
    """Before the launchers, which do nothing here; prints the microseconds."""

    def least(prepare) -> float:
        times = []
        for _ in range(30):
            prepare()
            start = time.perf_counter()
            ask("sample", 0, 8)
            times.append(time.perf_counter() - start)
        return 1e6 * min(times)

    ask("sample", 0, 8)
    first, again = least(kept.cache_clear), least(lambda: None)
    print(f"\nhost time of a step: {first:.0f} µs, again {again:.0f} µs")
    assert again < first / 2


def test_any_two_arguments_and_three_constants_meet_in_a_cover():
    """Not all pairs exist here: the fourth argument follows from the first two."""

    def some(i, j, k, *constants) -> Specialisation:
        values = [*(("i32", x) for x in (i, j, k, i + j)), *(("constexpr", x) for x in constants)]
        return Specialisation("kernel", tuple(enumerate(values)))

    every = [some(*x) for x in product(*[range(4)] * 3, *[(False, True)] * 3)]

    def pairs(of) -> set:
        return {pair for s in of for pair in combinations(s.arguments, 2)}

    cover = covering(every, 2)
    assert pairs(cover) == pairs(every)
    assert len({s.arguments[4:] for s in cover}) == 8
    assert len(cover) < 40  # of 512; the last two numbers alone make 28 pairs


def test_a_compiler_that_dies_fails_alone():
    assert list(workers().map(os._exit, [(3,)])) == ["the compiler ended its process"]
    assert list(workers().map(len, [("ab",), ("c",)])) == [2, 1]


def test_a_failure_to_compile_is_seen():
    """A pointer that is None behind a run-time condition compiles for no GPU."""
    launch = Call("stats", Settings(), PADDED, PADDED).launches()[-1]
    launch.arguments["DRAW"] = launch.arguments["DRAW"] + 1  # sampled, without seeds
    with pytest.raises(Exception, match="None"):
        compiled(launch, "sm_90")


@pytest.mark.parametrize(
    "architecture", [a if a in ("sm_90", "gfx942") else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
def test_machine_code(architecture):
    """bfloat16, V = 50257 with padded rows: no loop spills, whole 128-bit loads in both sweeps, registers bounded."""
    found = {r.kernel: r for r in reports(architecture)}
    assert found.keys() == MOST_REGISTERS.keys()
    ceiling = 256 if architecture == "gfx942" or not KNOWN else 0  # an AMD GPU's threads have twice the registers
    for name, r in found.items():
        assert r.spilled <= MOST_SPILLED.get(name, 0), name
        assert r.registers <= max(MOST_REGISTERS[name], ceiling), name
    sweep = found["sweep_kernel"]
    # 8 tokens of two rows a thread are two loads of 128 bits, and there are no other loads of logits
    assert sweep.wide_loads() == sweep.loads() == 2 * sweep.tokens / 8
    # three exponentials a token; on sm_120 ptxas computes four of a turn's twice
    assert sweep.special() <= 3 * sweep.tokens + 4 * (architecture == "sm_120")
    if architecture == "sm_90" and KNOWN:
        assert sweep.a_token() <= 58
    if architecture == "sm_90":
        assert sweep.count("BAR") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_load_wide(dtype):
    for launch in sampling_step(dtype)[:3:2]:
        r = report(launch, "sm_90")
        assert r.spilled == 0
        assert r.wide_loads() == 2 * r.tokens * dtype.itemsize / 16


def test_estimate_is_no_less_than_the_memory_takes():
    for rows in (1, 64):
        sweeps, floor = estimate("sm_90", rows, 128256)
        assert floor < sweeps < 100 * floor


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_compiled_whole(impl):
    """One graph each for the three functions, the same numbers as eager calls."""
    theta, t = zipf_pair(3, 500, 1.0)
    index = torch.arange(3)

    def sample(theta, t, index):
        step = qstar_sample(theta, t, seeds=index, positions=index, top_p=0.9, impl=impl)
        return step.token, step.logq

    def log_q(theta, t, index):
        log_q, step = qstar_logprobs(theta, t, method="entropy", impl=impl)
        return log_q, step.alpha

    def look_up(theta, t, index):
        step = qstar_stats(theta, t, tokens=index, impl=impl)
        return step.token, step.logq, step.kl_t

    for function in (sample, log_q, look_up):
        eager = function(theta, t, index)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(theta, t, index)
        assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))


def test_exported_for_any_batch():
    class Sampler(torch.nn.Module):
        def forward(self, theta, t, index, budget):
            own = {"method": "kl_budget", "kl_budget": budget}
            step = qstar_sample(theta, t, seeds=index, positions=index, **own)
            return step.token, step.logq

    theta, t = zipf_pair(5, 500, 1.0)
    index, batch, budget = torch.arange(5), torch.export.Dim("batch"), torch.linspace(0, 0.4, 5)
    some = (theta[:3], t[:3], index[:3], budget[:3])
    exported = torch.export.export(Sampler(), some, dynamic_shapes=({0: batch},) * 4)
    got = exported.module()(theta, t, index, budget)
    assert all(torch.equal(x, y) for x, y in zip(got, Sampler()(theta, t, index, budget), strict=True))


def test_an_annealed_budget_compiles_once():
    """Other numbers of the rows are other contents of one tensor."""
    theta, t = zipf_pair(3, 200, 1.0)
    counter = CompileCounterWithBackend("aot_eager")

    def stats(budget):
        return qstar_stats(theta, t, method="kl_budget", kl_budget=budget).alpha

    compiled = torch.compile(stats, fullgraph=True, backend=counter)
    for epsilon in (0.3, 0.1, 0.0):
        budget = torch.full((3,), epsilon)
        assert torch.equal(compiled(budget), stats(budget))
    assert counter.frame_count == 1


@pytest.mark.parametrize("what", ["sample", "look up", "log q"])
def test_operator(what):
    """torch's own checks of the schema, the fake implementation and dynamic shapes."""
    theta, t = zipf_pair(3, 200, 1.0)
    index = torch.arange(3)
    sampled = (index, index, None) if what == "sample" else (None, None, index if what == "look up" else None)
    for own, settings in (
        ((None,) * len(PER_ROW), Settings()),
        ((None, torch.full((3,), 0.2), None, torch.full((3,), 0.1)), Settings(method="kl_budget")),
    ):
        torch.library.opcheck(step_op, (theta, t, *sampled, what == "log q", "cpu", *own, *settings.values()))
