"""Timing several functions side by side, so that a machine's drift meets all of them."""

import statistics
import time
from collections.abc import Callable

import torch

SECONDS_A_CASE = 6.0
CACHE_FLUSH_BYTES = 256 << 20  # more than any GPU's L2


def timer(function: Callable[[], object], device: torch.device, cold: bool = True) -> Callable[[], float]:
    """A function that runs `function` once and returns its seconds.

    On a GPU: as a CUDA graph where it can be captured, by events on the device, with the caches flushed before if
    `cold`, else right after itself.
    """
    if device.type != "cuda":

        def once() -> float:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start

        return once
    launch = captured(function)
    before = torch.empty(CACHE_FLUSH_BYTES, dtype=torch.int8, device=device).zero_ if cold else launch
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once_on_device() -> float:
        before()
        start.record()
        launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return once_on_device


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of `function`; the function itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and allocates outside the capture
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        return function
    return graph.replay


def rounds_in(timers: dict[str, Callable[[], float]], seconds: float) -> int:
    """Rounds of all timers that fit the time, 5 to 50; runs each twice, so that the first round is not their first."""
    for once in timers.values():
        once()
    return max(5, min(50, int(seconds / sum(once() for once in timers.values()))))


def in_turns(timers: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """The median seconds of each, timed round by round."""
    rounds = [{name: once() for name, once in timers.items()} for _ in range(rounds_in(timers, seconds))]
    return {name: statistics.median(times[name] for times in rounds) for name in timers}


def side_by_side(benchmark, functions: dict[str, Callable[[], object]], device: torch.device, **info) -> dict:
    """Time the functions in turns, round by round; the first is also pytest-benchmark's own.

    Keeps the seconds of every round, by name, in the benchmark's `extra_info`, beside `info`. Ratios are to be taken
    within a run, between medians.
    """
    timers = {name: timer(function, device) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    rounds = rounds_in(timers, SECONDS_A_CASE)

    def all_once() -> None:
        for name, once in timers.items():
            seconds[name].append(once())

    benchmark.pedantic(next(iter(timers.values())), setup=all_once, rounds=rounds)
    benchmark.extra_info.update(info, seconds=seconds)
    return {name: statistics.median(values) for name, values in seconds.items()}
