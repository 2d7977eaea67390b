"""`python -m qstar.analyze` on hand-made files with known answers, and on files that are none."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rows import chosen_seed
from runs import lines, write_lines

from qstar.analyze import main
from qstar.diagnostics import statistics
from qstar.diagnostics.statistics import CELL, Spread
from qstar.generate import main as generate
from qstar.merge import main as merge
from qstar.run.formats import verl_row
from qstar.run.output import FORMATS
from qstar.run.parts import Parts
from qstar.run.records import RecordError, RunFiles
from qstar_kernels.types import FIELDS

# two samples of two tokens and one of one, everything a round number
ALPHA = [[0.5, 0.7], [0.1, 0.3], [0.9]]
ESS_THETA = [[0.5, 1.0], [0.2, 0.8], [0.4]]
LOGQ = [[-1.0, -1.0], [-1.0, -2.0], [-0.5]]
LOGP_THETA = [[-2.0, -1.0], [-1.0, -1.0], [-0.5]]  # log weights of the samples: −1, 1, 0


def write_run(folder: Path, name: str = "x", settings: dict | None = None, **tokens: list[list[float | None]]) -> Path:
    """A run's files, with `tokens` in place of the numbers above."""
    alpha = tokens.get("alpha", ALPHA)
    sizes = [len(sample) for sample in alpha]
    constants = {"kl_theta": 0.2, "kl_t": 0.2, "ess_t": 0.5, "logp_t": -1.0, "logq": -1.0, "logp_theta": -1.0}
    fields = {field: [[value] * n for n in sizes] for field, value in constants.items()}
    if sizes == [2, 2, 1]:
        fields |= {"ess_theta": ESS_THETA, "logq": LOGQ, "logp_theta": LOGP_THETA}
    else:
        fields["ess_theta"] = fields["ess_t"]
    fields |= {"alpha": alpha} | tokens
    numbers, samples = [], []
    for i, n in enumerate(sizes):
        ids = {"id": f"{i}-0", "prompt_index": i, "sample_index": 0, "num_tokens": n}
        of_tokens = {"id": list(range(n)), "status": [0] * n} | {field: fields[field][i] for field in FIELDS}
        numbers.append(ids | {"tokens": of_tokens})
        samples.append(ids | {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]})
    write_lines(folder / f"{name}.diagnostics.jsonl", numbers)
    (folder / f"{name}.run.json").write_text(json.dumps(settings or {}))
    return write_lines(folder / f"{name}.jsonl", samples)


def analyzed(capsys, *files) -> list[dict]:
    assert main([*map(str, files), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_known_answers(tmp_path, capsys):
    (result,) = analyzed(capsys, write_run(tmp_path))
    assert (result["file"], result["samples"], result["tokens"]) == ("x", 3, 5)
    alpha = result["fields"]["alpha"]
    expected = {"mean": 0.5, "std": math.sqrt(0.08), "min": 0.1, "q25": 0.3, "median": 0.5, "q75": 0.7, "max": 0.9}
    assert alpha == pytest.approx(expected, abs=1e-6)
    assert result["fields"]["ess_ratio"]["mean"] == pytest.approx((1 + 2 + 0.4 + 1.6 + 0.8) / 5)
    assert result["fields"]["log_weight_theta"]["min"] == -1
    assert result["of_samples"]["num_tokens"]["mean"] == pytest.approx(5 / 3)
    verdicts = result["verdicts"]
    assert verdicts["α"]["tokens_inside"] == pytest.approx(3 / 5)
    assert verdicts["α"]["met"]
    assert verdicts["ESS ratio"]["tokens_inside"] == pytest.approx(1 / 5)
    assert not verdicts["ESS ratio"]["met"]
    expected = {"low": 0.0, "high": 0.05, "mean": 0.0, "tokens_inside": 1.0, "met": True}
    assert verdicts["|ΔKL|"] == expected | {"mean_without_outliers": 0.0, "met_without_outliers": True}
    assert (result["drawn_from_q"], result["quantile_error"]) == (True, 0.0)
    w = np.exp([-1.0, 1.0, 0.0])
    weight = result["weights"]["theta"]
    assert weight["effective_samples"] == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert weight["top_1_percent"] == pytest.approx(w.max() / w.sum())
    assert result["warnings"] == []


def test_tables_of_one_file_and_of_several(tmp_path, capsys):
    first = write_run(tmp_path, "first")
    assert main([str(first)]) == 0
    out = capsys.readouterr().out
    assert "\nalpha " in out
    assert "60.0%" in out
    second = write_run(tmp_path, "second", kl_theta=[[0.4, 0.4], [0.4, 0.4], [0.4]])
    assert main([str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert "first" in out
    assert "second" in out
    assert "0.4 ± 0" in out
    assert "✗ 0.0%" in out  # |ΔKL| of the second
    for folder in ("a[", "b["):  # one file's name closes what the other's does not open
        (tmp_path / folder).mkdir()
        write_run(tmp_path / folder, "bold]x")
    assert main([str(tmp_path / folder / "bold]x.jsonl") for folder in ("a[", "b[")]) == 0
    assert "b[/bold]x" in capsys.readouterr().out


def test_what_generate_wrote(demo_pair, loaded_once, tmp_path, capsys):
    """By whichever of its names, also where Parquet came out of it."""
    for name, form in (("y.jsonl", "jsonl"), ("y.parquet", "parquet"), ("y", "jsonl"), ("y", "openai-batch")):
        output = tmp_path / name
        argv = ["--num-samples", "10", "--save-diagnostics", "--output-format", form, "--output", str(output)]
        assert generate([*argv, "--max-new-tokens", "20"]) == 0
        capsys.readouterr()
        numbers = lines(tmp_path / "y.diagnostics.jsonl")
        for path in (output, tmp_path / "y.diagnostics.jsonl"):
            (result,) = analyzed(capsys, path)
            tokens = [a for n in numbers for a in n["tokens"]["alpha"]]
            assert result["fields"]["alpha"]["mean"] == pytest.approx(np.mean(tokens))
            assert result["of_samples"]["log_weight_t"]["max"] == pytest.approx(
                max(n["logp_t_sum"] - n["logq_sum"] for n in numbers), abs=1e-5
            )
        for path in tmp_path.iterdir():
            path.unlink()


def test_plots(tmp_path, capsys):
    first, second = write_run(tmp_path, "first"), write_run(tmp_path, "second")
    assert main([str(first), str(second), "--plots", str(tmp_path / "a" / "b")]) == 0
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == [
        "along-position.png", "alpha-ess-ratio-1.png", "alpha-ess-ratio-2.png", "distribution-alpha.png",
        "distribution-ess-ratio.png", "distribution-kl.png", "weight-concentration.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "a" / "b").iterdir())
    assert main([str(first), "--plots", str(first)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"kl_theta": [[0.9, 0.9], [0.9, 0.9], [0.9]]}, "the pair is far apart: 0.90 nats a token, above 0.5"),
        ({"ess_theta": [[0.05, 0.05], [0.05, 0.05], [0.05]]}, "ESS_theta is 0.050 a token on average, below 0.1"),
        ({"alpha": [[0.0, 0.7], [0.1, 0.3], [0.9]]}, "α is at its bound 0 (--alpha-min) at 20.0% of the tokens"),
        (
            {"alpha": [[0.5, 0.7], [0.5, 0.5], [0.6]], "settings": {"--alpha-max": 0.7}},
            "α is at its bound 0.7 (--alpha-max) at 20.0% of the tokens",
        ),
        ({"logq": [[-1.0, None], [-1.0, -2.0], [-0.5]]}, "1 samples have a token outside q*'s support"),
        (
            {"alpha": [[0.5]] * 200, "logp_theta": [[9.0]] + [[-1.0]] * 199},
            "1% of the samples carry 99% of the weight π_θ/q*",
        ),
    ],
)
def test_warnings(change, warning, tmp_path, capsys):
    path = write_run(tmp_path, **change)
    (result,) = analyzed(capsys, path)
    assert any(warning in line for line in result["warnings"]), result["warnings"]
    assert main([str(path)]) == 0
    assert warning in capsys.readouterr().out


def test_no_alpha_warning_where_it_was_given(tmp_path, capsys):
    path = write_run(tmp_path, alpha=[[1.0, 1.0]], settings={"--alpha-method": "fixed", "--alpha": 1.0})
    assert analyzed(capsys, path)[0]["warnings"] == []


def test_what_one_file_lacks_is_left_out_and_said(tmp_path, capsys):
    path = write_run(tmp_path)
    for short, other in (("x.jsonl", "x.diagnostics.jsonl"), ("x.diagnostics.jsonl", "x.jsonl")):
        whole = (tmp_path / short).read_text()
        write_lines(tmp_path / short, lines(tmp_path / short)[:1])
        (result,) = analyzed(capsys, path)
        assert result["samples"] == 1
        (warning,) = result["warnings"]
        assert f"2 samples of {tmp_path / other} are left out, which {tmp_path / short} does not have" in warning
        (tmp_path / short).write_text("")
        assert main([str(path)]) == 1
        assert f"3 samples of {tmp_path / other} are left out" in capsys.readouterr().err
        (tmp_path / short).write_text(whole.replace("\n", "\n \n"))
        assert analyzed(capsys, path)[0]["warnings"] == []  # blank lines are no samples
    (tmp_path / "x.run.json").unlink()
    assert "x.run.json is not there" in analyzed(capsys, path)[0]["warnings"][0]


def test_a_torn_last_line_is_left_out_and_said(tmp_path, capsys):
    path = write_run(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    (result,) = analyzed(capsys, path)
    assert result["samples"] == 2
    assert len(result["warnings"]) == 1
    assert "line 3" in result["warnings"][0]
    assert "is torn and left out" in result["warnings"][0]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p, d: p.write_text(""), "has no samples yet"),
        (lambda p, d: (p.unlink(), d.unlink()), "does not exist"),
        (lambda p, d: d.unlink(), "generate with --save-diagnostics"),
        (lambda p, d: d.write_text("a,b\n1,2\n"), "line 1 of"),
        (lambda p, d: p.write_text('{"prompt": "Hi."}\n'), "is not what qstar.generate or qstar.score writes"),
        (lambda p, d: p.write_text("{torn\n" + p.read_text()), "line 1 of"),
        (lambda p, d: write_lines(p, lines(p)[1:]), "the files do not belong together"),
        (lambda p, d: d.write_text(d.read_text().replace("[0, 1]", "[0]", 1)), "line 1 of"),
        (lambda p, d: d.write_text(d.read_text().replace("0.7", '"a"', 1)), "line 1 of"),
        (lambda p, d: p.write_bytes(b"\xff\xfe\n"), "line 1 of"),
        (lambda p, d: d.write_text("[" * 100_000 + "\n"), "line 1 of"),
        (lambda p, d: p.write_text("[" * 100_000 + "\n"), "line 1 of"),
        *(
            (lambda p, d, other=other: d.write_text(d.read_text().replace(*other, 1)), "line 1 of")
            for other in [("0.7", value) for value in ("NaN", "null", "Infinity", "1e300", "1" + "0" * 400)]
            + [("-2.0", "NaN"), ("[0, 1]", "[0, -1]"), ("[0, 1]", "[0, 1.0]"), ('"0-0"', "0")]
            + [('"prompt_index": 0', '"prompt_index": "0"')]
        ),
        *(
            (lambda p, d, other=other: write_lines(p, [line | other for line in lines(p)]), "line 1 of")
            for other in ({"messages": []}, {"messages": ["?"]}, {"messages": [{"role": "user"}]}, {"metadata": [1]})
        ),
        (lambda p, d: write_lines(p, [{"id": "0-0", "response": {"body": {"choices": []}}}]), "line 1 of"),
        (lambda p, d: p.with_suffix(".run.json").write_text("{torn"), "x.run.json is not what a run writes"),
    ],
)
def test_files_that_are_none_get_one_line(break_it, message, tmp_path, capsys):
    path = write_run(tmp_path)
    break_it(path, tmp_path / "x.diagnostics.jsonl")
    assert main([str(path)]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert message in error
    assert error.count("\n") == 1


def test_a_table_that_cannot_be_unpacked_gets_one_line(demo_pair, loaded_once, tmp_path, capsys):
    for name in ("x.diagnostics.parquet", "x.parquet"):
        argv = ["--num-samples", "6", "--save-diagnostics", "--diagnostics-format", "parquet"]
        generate([*argv, "--max-new-tokens", "8", "--output", str(tmp_path / "x.parquet")])
        (tmp_path / "x.journal.jsonl").unlink()
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:50] + b"\xff" * 300 + data[350:])
        capsys.readouterr()
        assert main([str(tmp_path / "x.parquet")]) == 1
        assert f"{name} cannot be read: " in capsys.readouterr().err
        for path in tmp_path.iterdir():
            path.unlink()


def test_records(tmp_path):
    path = write_run(tmp_path)
    records = list(RunFiles(path))
    assert [r.id for r in records] == ["0-0", "1-0", "2-0"]
    assert records[1].tokens["alpha"] == [0.1, 0.3]
    assert RunFiles(path).settings == {}
    with pytest.raises(RecordError, match=r"y\.jsonl does not exist"):
        RunFiles(tmp_path / "y.jsonl")


def test_files_of_one_name_are_told_apart(tmp_path, capsys):
    paths = []
    for name in ("a", "b", "b/c"):
        (tmp_path / name).mkdir()
        paths.append(write_run(tmp_path / name))
    assert [result["file"] for result in analyzed(capsys, *paths)] == ["a/x", "b/x", "c/x"]
    assert main([str(paths[0]), str(tmp_path / "a" / "x.diagnostics.jsonl")]) == 1
    assert "is given twice" in capsys.readouterr().err


def test_outliers_are_told_where_they_decide(tmp_path, capsys):
    ess = [[0.5] for _ in range(400)]
    ess[7] = [900.0]
    path = write_run(tmp_path, alpha=[[0.5]] * 400, ess_theta=ess, ess_t=[[0.5]] * 400)
    (result,) = analyzed(capsys, path)
    verdict = result["verdicts"]["ESS ratio"]
    assert not verdict["met"]
    assert verdict["met_without_outliers"]
    assert verdict["mean_without_outliers"] == pytest.approx(1)
    assert any("is what a few outliers make it" in line for line in result["warnings"])


@pytest.mark.parametrize(
    "values",
    [
        lambda rng: rng.normal(size=50_000),
        lambda rng: rng.exponential(1e-7, 50_000),
        lambda rng: -rng.exponential(3, 999),
        lambda rng: rng.integers(0, 2, 20),
        lambda rng: rng.choice([-np.inf, np.nan, -0.0, 3e38], 500),
    ],
)
def test_statistics_of_a_stream_are_those_of_all(values):
    """Whatever the pieces: moments and extremes to rounding, quartiles to within a cell."""
    rng = np.random.default_rng(chosen_seed() >> 32)
    values, spread = values(rng).astype(np.float32), Spread()
    for piece in np.split(values, np.sort(rng.integers(0, len(values), 5))):
        spread.add(piece)
    finite = values[np.isfinite(values)].astype(np.float64)
    assert spread.count == len(finite)
    assert (spread.low, spread.high) == (finite.min(), finite.max())
    assert spread.mean == pytest.approx(finite.mean(), rel=1e-12, abs=1e-12 * abs(finite).max())
    assert np.sqrt(spread.squares / spread.count) == pytest.approx(finite.std(), rel=1e-9)
    expected = np.quantile(finite, (0.25, 0.5, 0.75))
    np.testing.assert_allclose(spread.quantiles((0.25, 0.5, 0.75)), expected, rtol=CELL, atol=1e-37)


def test_large_files_have_the_statistics_of_small_ones(tmp_path, capsys, monkeypatch):
    """Where the tokens have no room in memory: all but the quartiles are exact."""
    rng = np.random.default_rng(chosen_seed() >> 32)
    sizes = rng.integers(1, 30, 300)
    path = write_run(tmp_path, alpha=[rng.beta(8, 8, n).tolist() for n in sizes])
    capsys.readouterr()
    (exact,) = analyzed(capsys, path)
    monkeypatch.setattr(statistics, "KEPT_TOKENS", 500)
    monkeypatch.setattr(statistics, "CHUNK_TOKENS", 100)
    (found,) = analyzed(capsys, path)
    assert (exact.pop("quantile_error"), found.pop("quantile_error")) == (0.0, CELL)
    for result in (exact, found):
        result["fields"] = {name: pytest.approx(of, rel=CELL, abs=1e-9) for name, of in result["fields"].items()}
        for verdict in result["verdicts"].values():
            verdict |= {name: pytest.approx(verdict[name], rel=CELL) for name in ("mean", "mean_without_outliers")}
    assert [result["samples"] for result in (exact, found)] == [300, 300]
    assert exact["weights"] == found["weights"]
    assert exact["of_samples"] == found["of_samples"]
    (numbers,) = statistics.read_all([RunFiles(path)], ["x"], Console(quiet=True))
    assert 0 < numbers.kept < 100
    assert len(numbers.tokens["alpha"]) <= 500
    alpha = json.loads(json.dumps(statistics.analysis(numbers)["fields"]["alpha"]))
    assert alpha["mean"] == pytest.approx(np.mean([a for record in RunFiles(path) for a in record.tokens["alpha"]]))


def test_a_folder_of_parts_is_read_as_the_merged_file(demo_pair, loaded_once, tmp_path, capsys):
    """Of any format, of samples as of diagnostics, on this machine and on an object store; a part that is missing is
    said."""
    for form in FORMATS:
        for numbers in ("jsonl", "parquet"):
            url, whole, settings = f"memory://{form}-{numbers}/run", [], {"--diagnostics-format": numbers}
            argv = ["--max-new-tokens", "8", "--save-diagnostics"]
            argv += ["--output-format", form, "--diagnostics-format", numbers]
            with Parts(url, form, True, settings, numbers) as parts:
                for part in (0, 1):  # prompts that fail in place of the other part's
                    prompts = [{"prompt": f"What is {i} + {i}?" if i // 6 == part else None} for i in range(12)]
                    made = tmp_path / f"{form}-{numbers}-{part}"
                    data = write_lines(tmp_path / "data.jsonl", prompts)
                    assert generate([*argv, "--dataset", str(data), "--output", str(made / f"x{FORMATS[form]}")]) == 1
                    (made / "x.errors.jsonl").unlink()
                    whole += [record.diagnostics for record in RunFiles(made / f"x{FORMATS[form]}")]
                    if form == "verl":  # whose parts are lines
                        (made / "x.parquet").unlink()
                        write_lines(made / "x.jsonl", [verl_row(line, "x") for line in lines(made / "x.journal.jsonl")])
                    parts.put_part(part, made)
                    parts.done.add(part)
                parts.write_manifest(complete=False)
            read = RunFiles(url)
            assert [record.diagnostics for record in read] == whole
            assert "is not complete: 2 parts are there" in read.notes[0]
            capsys.readouterr()
            (result,) = analyzed(capsys, url)
            assert (result["file"], result["samples"]) == ("run", 12)
            with Parts(url, form, True, settings, numbers) as parts:
                parts.write_manifest(complete=True)
            merged = made / f"merged{FORMATS[form]}"
            assert merge([url, "--output", str(merged)]) == 0
            assert merged.with_name(f"merged.diagnostics.{numbers}").exists()
            assert [record.diagnostics for record in RunFiles(made / f"merged.diagnostics.{numbers}")] == whole
