"""`python -m bench.gpu` on a machine without a GPU: all of its parts, with a device that is made up."""

import inspect
import json
import subprocess
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench.rows
from bench import gpu, gpu_checks, gpu_times, timing
from bench.calls import distinct
from bench.gpu import PARTS, RESULTS, Part, Run, free_page, page
from qstar_kernels import qstar_sample
from qstar_kernels.gpu.launch import Launch
from qstar_kernels.types import NAMES

CPU = torch.device("cpu")


# What sampling and measuring do without, on a machine with torch, triton, numpy and transformers.
ABSENT = """accelerate datasets fsspec hypothesis matplotlib pandas pyarrow pytest pytest_benchmark ray rich scipy trl
vllm""".split()
IMPORT_WITHOUT = """
import importlib, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Finder(PathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in absent else PathFinder.find_spec(name, path, target)

absent, modules = (argument.split() for argument in sys.argv[1:])
sys.meta_path[:] = BuiltinImporter, FrozenImporter, Finder
for name in modules:
    importlib.import_module(name)
"""


def new_run(tmp_path, on_gpu: bool = False, budget: float = 1000.0) -> Run:
    return Run(CPU, True, budget, tmp_path / "gpu-made-up.md", on_gpu)


def captured(function):
    """A graph's replay: the captured step's own tensors are filled anew."""
    for _ in range(4):
        function()
    steps = inspect.getclosurevars(function).nonlocals.get("steps")

    def replay():
        function()
        if steps:
            new = steps.pop()
            for name in NAMES:
                getattr(steps[-1], name).copy_(getattr(new, name))

    return replay


@pytest.fixture
def made_up(monkeypatch):
    """What the parts ask of `torch.cuda`, answered by the CPU; launches and compilations do nothing."""
    answers = {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (0, 0),
        "Stream": type("Stream", (), {}),
        "stream": lambda stream: nullcontext(),
        "get_device_name": lambda: "A Made-Up GPU",
        "get_device_capability": lambda: (9, 0),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(gpu_checks, "captured", captured)
    monkeypatch.setattr(gpu_times, "captured", captured)
    monkeypatch.setattr(
        gpu_checks, "workers", lambda: SimpleNamespace(map=lambda f, items, timeout: ("" for _ in items))
    )
    monkeypatch.setattr(Launch, "__call__", lambda launch: None)
    gpu.machine.cache_clear()
    yield
    gpu.machine.cache_clear()


def test_a_gpu_machine_needs_four_packages():
    modules = "qstar qstar.decode qstar.pair qstar.drop_in qstar_kernels bench.gpu bench.gpu_times bench.loops"
    command = [sys.executable, "-c", IMPORT_WITHOUT, " ".join(ABSENT), modules]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_every_part_is_green_and_on_the_page(made_up, tmp_path):
    run = new_run(tmp_path, on_gpu=True)
    for part in PARTS:
        run.take(part)
    assert not run.failures, run.failures
    assert not run.left_out
    text, saved = run.page.read_text(), json.loads(run.page.with_suffix(".json").read_text())
    assert text.startswith("# The kernels on A Made-Up GPU")
    assert "0 failed, 0 left out" in text
    assert list(saved["parts"]) == [part.name for part in PARTS]
    for part in PARTS:
        assert saved["parts"][part.name], part.name
        assert f"## {part.name}" in text
    assert "| B | sweep | settle | sweep | finish |" in text
    assert "| B | sweep | settle | sweep | finish | top | 10 × divide | masses | finish |" in text
    assert set(saved["parts"]["The decoding loop"]) >= {"demo pair | 2", "a Llama's forward pass as a CUDA graph | 2"}


def test_a_failure_is_one_items_own(tmp_path, monkeypatch, capsys):
    """It is named, the next item goes on, and so does the next part; the exit code tells."""

    def broken(run):
        yield "wrong", lambda: 1 / 0
        yield "right", lambda: None
        raise RuntimeError("between items")

    def much(run):
        yield "much", lambda: None

    parts = [Part(*x, gpu.held) for x in (("Broken", broken, 1.0), ("Good", much, 1.0), ("Late", much, 0.0))]
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    text = (tmp_path / "gpu-none.md").read_text()
    assert "2 failed, 1 left out" in text
    assert "- Broken: wrong: `ZeroDivisionError: division by zero`" in text
    assert "- Broken: `RuntimeError: between items`" in text
    assert "- Late: much" in text
    assert "Held: right." in text
    assert "Held: much." in text
    monkeypatch.setattr(gpu, "PARTS", parts[1:2])
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "gpu-none-2.md").exists()
    assert "2 failed, 1 left out" in capsys.readouterr().out


def test_what_is_not_compiled_in_time_is_left_to_the_calls(tmp_path, monkeypatch):
    def results(function, items, timeout):
        yield ""
        raise TimeoutError

    monkeypatch.setattr(gpu_checks, "workers", lambda: SimpleNamespace(map=results))
    found = gpu_checks.compile_ahead(new_run(tmp_path), "sm_90", 1.0)
    assert found["kernels"] == 1 < found["of"]


def test_nothing_is_tried_on_a_device_that_is_lost(made_up, tmp_path, monkeypatch):
    def gone():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    run = new_run(tmp_path, on_gpu=True)
    run.take(Part("Part", lambda run: iter([("bad", gone), ("next", lambda: None)]), 1.0, gpu.held))
    run.take(Part("Other", lambda run: iter([("last", lambda: None)]), 1.0, gpu.held))
    assert run.left_out == ["Part: next", "Other: last"]
    assert "the device is lost" in "\n".join(page(run))


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    def off(*args, **kwargs):
        step = qstar_sample(*args, **kwargs)
        if args[0].dtype != torch.float64:
            step.kl_theta = step.kl_theta + 1e-3
        return step

    monkeypatch.setattr(bench.rows, "qstar_sample", off)
    monkeypatch.setattr(gpu_checks, "qstar_sample", off)
    run = new_run(tmp_path)
    for part in PARTS:
        if part.items in (gpu_times.steps, gpu_times.other_settings):
            run.take(part)
            assert run.results[part.name] == {}
    assert len(run.failures) == 4
    assert "µs" not in "\n".join(page(run)).split("## Failed")[0]


def test_a_replay_that_is_no_graph_is_a_failure(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "captured", lambda function: function)
    items = dict(gpu_checks.bits(new_run(tmp_path, on_gpu=True)))
    with pytest.raises(AssertionError, match="captured"):
        items["graph replays, default settings"]()


def test_no_page_is_written_over(tmp_path):
    assert free_page(RESULTS, "NVIDIA H200") == RESULTS / "gpu-nvidia-h200-2.md"
    assert free_page(tmp_path, "NVIDIA H100 80GB HBM3") == tmp_path / "gpu-nvidia-h100-80gb-hbm3.md"


@pytest.mark.parametrize(("first", "others"), gpu_checks.CHANGES)
def test_what_the_part_on_compilations_counts_is_steady(first, others):
    """As Triton's JIT tells specialisations apart, on no device: later steps launch what the first one did."""

    def calls(settings, rows):
        call = gpu_checks.Case("", 4097, settings=settings).call(rows=rows)
        return call if rows == gpu_checks.BATCHES[0] else call.__class__(**vars(call) | {"first": 1})

    at_first = set(distinct([calls(first, gpu_checks.BATCHES[0])], "sm_90").of)
    later = distinct((calls(*x) for x in product((first, *others), gpu_checks.BATCHES)), "sm_90").of
    assert set(later) == at_first


@pytest.mark.parametrize("cold", [True, False])
def test_a_warm_call_comes_right_after_itself(made_up, monkeypatch, cold):
    done = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end) -> float:
            return 3.0

    flushing = SimpleNamespace(zero_=lambda: done.append("flush"))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: flushing)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "captured", lambda function: function)
    once = timing.timer(lambda: done.append("call"), torch.device("cuda"), cold)
    assert once() == 3e-3
    assert done == ["flush" if cold else "call", "event", "call", "event", "wait"]


def test_counts_what_the_jit_makes_ready(monkeypatch):
    from qstar_kernels.gpu.sweep import sweep_kernel

    before = gpu_checks.prepared()
    monkeypatch.setitem(sweep_kernel.device_caches, "made up", ({"a key": None, "another": None},))
    assert gpu_checks.prepared() == before + 2
