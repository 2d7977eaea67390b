"""The report on the benchmarks, from small runs made by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench.report
from bench.competitors import research_step
from bench.loops import own_loop, plain_loop, split_times
from bench.report import main
from bench.rows import check_exact, llm_like
from bench.test_decode import first_requests
from qstar_kernels import qstar_sample
from qstar_kernels.types import Settings


def run(ours: float, date: str = "2030-01-01T00:00:00", cpu: str = "Some CPU") -> dict:
    """A run as pytest-benchmark saves it: one step case, all rounds within 2% of `ours` seconds."""
    rounds = [ours * factor for factor in (0.98, 0.99, 1.0, 1.01, 1.02)]
    seconds = {
        "qstar_sample": rounds,
        "ordinary sampling, one model": [0.030, 0.031, 0.032, 0.031, 0.031],
        "research code": [0.3] * 5,
    }
    info = {"kind": "step", "batch": 8, "vocab_size": 131072, "dtype": "float32", "floor": 1e-3, "seconds": seconds}
    machine = {"cpu": cpu, "gpu": None, "threads": 1, "cores": 2, "system": "Linux", "python": "3.11"}
    machine["versions"] = {"torch": "2"}
    return {
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": date,
        "benchmarks": [{"name": "test_step[8-131072-float32]", "extra_info": info}],
    }


def report(tmp_path, now: dict, before: dict) -> str:
    paths = tmp_path / "now.json", tmp_path / "before.json"
    for path, content in zip(paths, (now, before), strict=True):
        path.write_text(json.dumps(content))
    assert main([str(paths[0]), "--before", str(paths[1]), "--output", str(tmp_path / "page" / "report.md")]) == 0
    return (tmp_path / "page" / "report.md").read_text()


def test_a_regression_is_marked(tmp_path):
    text = report(tmp_path, run(0.012), run(0.010))
    assert "| test_step[8-131072-float32] | qstar_sample |" in text
    assert "| 1.20 | **slower** |" in text
    assert "| 0.83 | faster |" in report(tmp_path, run(0.010), run(0.012))
    text = report(tmp_path, run(0.0101), run(0.010))
    assert "Nothing moved by more than the spread." in text


def test_others_get_no_verdict(tmp_path):
    """What is timed beside ours moves with the machine."""
    now = run(0.010)
    now["benchmarks"][0]["extra_info"]["seconds"]["research code"] = [0.5] * 5
    text = report(tmp_path, now, run(0.010))
    assert "| research code |" in text
    assert "| 1.67 | not ours |" in text
    assert "**slower**" not in text


def test_a_partial_run_leaves_the_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "report.md"
    page.write_text("whole")
    monkeypatch.setattr(bench.report, "RESULTS", tmp_path)
    monkeypatch.setattr(bench.report, "PAGE", page)
    saved = tmp_path / "machine" / "0001.json"
    saved.parent.mkdir()
    saved.write_text(json.dumps(run(0.010)))
    assert main([]) == 0
    assert "is a partial run, without scaling, memory" in capsys.readouterr().out
    assert page.read_text() == "whole"
    assert "## One step" in (tmp_path / "machine" / "0001" / "report.md").read_text()
    assert main(["--output", str(page)]) == 0
    assert "## One step" in page.read_text()


def test_from_the_flag_to_the_page(tmp_path):
    """The benchmarks run under the pinned pytest, and what they save is what the report reads."""
    case = "bench/test_scaling.py::test_memory"
    pytest_run = [sys.executable, "-m", "pytest", case, "--benchmark", f"--benchmark-storage=file://{tmp_path}"]
    done = subprocess.run(pytest_run, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (saved,) = tmp_path.glob("*/*.json")
    assert main([str(saved), "--output", str(tmp_path / "report.md")]) == 0
    assert "| peak memory over one float32 [B, V] |" in (tmp_path / "report.md").read_text()


def test_ratios_and_targets(tmp_path):
    text = report(tmp_path, run(0.0124), run(0.0124))
    assert "**0.40**" in text  # of ordinary sampling
    assert "| [8, 131072]: ours over ordinary sampling | 0.404 | at most 0.8 | yes |" in text
    assert "| [8, 131072]: research code over ours | 24.2 | at least 11 | yes |" in text
    assert "| at most 0.8 | **no** |" in report(tmp_path, run(0.030), run(0.030))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{torn", "no JSON file, or torn"),
        ("[1, 2]", "was not saved by"),
        ('{"benchmarks": []}', "was not saved by"),
        (json.dumps(run(0.01) | {"benchmarks": []}), "no benchmark that this report knows"),
    ],
)
def test_bad_files_get_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path), "--output", str(tmp_path / "report.md")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.md").exists()


def test_research_code_is_right():
    """What we are compared with gives q*, too: α within 1e-4 of float64, and everything else that is checked."""
    theta, t = llm_like(4, 5000, 1.0, torch.device("cpu"))
    index = torch.arange(4)
    check_exact(theta, t, index)
    exact = qstar_sample(theta, t, seeds=index, positions=index, impl="reference")
    torch.testing.assert_close(research_step(theta, t)["alpha"], exact.alpha, atol=1e-4, rtol=0)


def test_both_loops_go_on_past_eos(demo_pair):
    """Whole loops are timed over as many tokens as were asked for, and on equal ones: at every batch size."""
    requests = first_requests(demo_pair, 6, 40)
    greedy = plain_loop(demo_pair, requests, cached=True, greedy=True)
    assert torch.isin(greedy[:, :-1], torch.tensor(sorted(demo_pair.eos_ids))).any()
    for batch_size in (1, 4, 6):
        own = own_loop(demo_pair, requests, True, batch_size=batch_size, settings=Settings(temperature=0.0))
        assert [s.token_ids for s in own] == greedy.tolist()
    ended = own_loop(demo_pair, requests, False, settings=Settings(temperature=0.0))
    assert any(s.finish_reason == "eos" for s in ended)


def test_every_part_of_a_loop_with_drafts_is_timed(demo_pair):
    requests = first_requests(demo_pair, 2, 8)
    with split_times(demo_pair) as times:
        timed = own_loop(demo_pair, requests, False, speculate=2)
    assert [s.token_ids for s in timed] == [s.token_ids for s in own_loop(demo_pair, requests, False)]
    assert all(seconds > 0 for passes in times.values() for _, seconds in passes)
    assert {name for name, passes in times.items() if passes} == {"theta", "t", "q* step", "draft"}
    assert {size for size, _ in times["q* step"]} > {1}


def test_what_is_wrong_is_not_timed(monkeypatch):
    """The check that stands before the timing fails on a step that is off."""
    import bench.rows

    def off(*args, **kwargs):
        step = qstar_sample(*args, **kwargs)
        if args[0].dtype != torch.float64:
            step.kl_theta = step.kl_theta + 1e-3
        return step

    monkeypatch.setattr(bench.rows, "qstar_sample", off)
    with pytest.raises(AssertionError):
        check_exact(*llm_like(2, 2000, 1.0, torch.device("cpu")), torch.arange(2))
