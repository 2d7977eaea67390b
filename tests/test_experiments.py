"""The experiments: all five end to end, after a kill, estimators against plain formulas, the text against its JSON."""

import copy
import json
import os
import re
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from runs import run_through_kills

from qstar import Pair
from qstar.demo import THETA
from qstar.experiments import report, results, training
from qstar.experiments.__main__ import EXPERIMENTS, main
from qstar.experiments.data import RULES, ArithmeticRule, draw, held_out, kept_right, preferences, problems, right
from qstar.experiments.studies import tokens_needed
from qstar.forced import Scorer
from qstar.sample import DecodeOptions, Sample
from qstar.weights import effective_sample_size
from qstar_kernels.types import Settings

FOLDER = Path(__file__).parents[1] / "qstar" / "experiments"


def seeded() -> int:
    seed = int(os.environ.get("QSTAR_TEST_SEED", "0"))
    print(f"seed {seed}")
    return seed


@cache
def some(rule: str, count: int = 300) -> tuple[Pair, list, list[Sample]]:
    """The demo pair, and problems answered by a rule."""
    pair = Pair.from_pretrained(THETA, THETA.parent / "t", device="cpu")
    return pair, *draw(pair, RULES[rule], 0, count)


@pytest.mark.slow
def test_all_experiments_and_again(tmp_path, capsys):
    assert main(["--quick", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for name in EXPERIMENTS:
        found = results.load(tmp_path / f"{name}.json")
        assert all(set(seeds) == {"0"} for seeds in found["cells"].values())
        assert found["machine"]["versions"]["trl"]
        assert len(found["cells"]) == said.count(f"{name}: ")
        for of_cell in found["cells"].values():
            numbers = json.dumps(of_cell["0"])
            assert "NaN" not in numbers
            assert "Infinity" not in numbers
        for table in report.tables_of(name):
            assert report.table(table, found) in (tmp_path / f"{name}.md").read_text(encoding="utf-8")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    kls = {name: of_cell["0"]["kl"] for name, of_cell in results.load(tmp_path / "main.json")["cells"].items()}
    assert list(kls.values()).count(kls["untrained"]) == 1
    speculation = results.load(tmp_path / "speculation.json")["summary"]
    assert all(numbers["same_answers"]["mean"] == 1 for numbers in speculation.values())

    written = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert main(["--quick", "--output", str(tmp_path)]) == 0
    assert "seed" not in capsys.readouterr().out  # nothing was run again
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == written


def test_goes_on_after_kills(tmp_path):
    """No finished cell is run again, and nothing is lost, wherever a run is killed."""
    path, log, kills = tmp_path / "x.json", tmp_path / "log", 12
    cells = {name: lambda seed, name=name: step(name, seed) for name in "abcdefgh"}

    def step(name: str, seed: int) -> dict:
        with log.open("a") as file:
            file.write(f"{name}{seed}\n")
        time.sleep(0.005)
        return {"value": ord(name) + seed}

    def run() -> int:
        results.run(path, cells, 6, {"a": 1}, lambda line: None)
        return 0

    run_through_kills(run, [path], kills)
    found = results.load(path)
    assert {(n, s): v["value"] for n, seeds in found["cells"].items() for s, v in seeds.items()} == {
        (name, str(seed)): ord(name) + seed for name in cells for seed in range(6)
    }
    ran = log.read_text().split()
    assert len(set(ran)) == 48
    assert len(ran) <= 48 + kills  # a kill costs the cell it falls into
    assert found["summary"]["a"]["value"] == {"mean": 99.5, "std": pytest.approx(np.std(range(6), ddof=1)), "n": 6}


def test_wrong_arguments_get_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    for argv, said in {
        ("nonsense",): "no experiment 'nonsense'; there are main, ablation",
        ("--seeds", "0"): "'0' must be a whole number of at least 1",
        ("--model-theta", str(THETA)): "--model-theta and --model-t go together",
        ("--model-theta", str(tmp_path / "no"), "--model-t", str(THETA)): "does not exist",
        ("--output", str(file)): f"--output {file} is a file",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(list(argv))
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n")) == (2, 1)
        assert said in error


def test_foreign_results_are_refused(tmp_path):
    cells, path = {"a": lambda seed: {"value": seed}}, tmp_path / "x.json"
    results.run(path, cells, 1, {"tokens": 1}, print)
    with pytest.raises(results.ResultsError, match="other settings; give another --output"):
        results.run(path, cells, 1, {"tokens": 2}, print)
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(results.ResultsError, match=re.escape(str(path))):
            results.run(path, cells, 1, {"tokens": 1}, print)


def test_data_keep_to_their_budget():
    pair, asked, samples = some("q*")
    assert 300 - 64 < sum(len(s.token_ids) for s in samples) <= 300
    assert [p.question for p in asked] == [p.question for p in some("on-policy")[1]][: len(asked)]
    trained = {p.question for p, _ in zip(problems(1000), range(2000), strict=False)}
    assert not trained & {p.question for p in held_out(512)}
    problems_, drawn = some("on-policy")[1:]
    kept = kept_right((problems_, drawn))
    assert 0 < len(kept) < len(drawn)
    assert kept == [
        s
        for s, p in zip(drawn, problems_, strict=True)
        if s.text.strip(".").endswith(str(p.answer)) or right(s.text, p)
    ]
    pairs = preferences(pair, 0, 300)
    assert all(p["chosen"] != p["rejected"] and p["prompt"][0]["role"] == "user" for p in pairs)


def test_arithmetic_mixture():
    """χ² of 200,000 draws against ½π_θ + ½π_t, false alarm in one of a million runs; its numbers by plain formulas."""
    generator = torch.Generator().manual_seed(seeded())
    a, b = (2 * torch.randn(40, generator=generator) for _ in range(2))
    mixture = (a.double().softmax(0) + b.double().softmax(0)) / 2
    count = 200_000
    seeds = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    rows = [x.expand(count, -1) for x in (a, b)]
    step = ArithmeticRule(40).step(*rows, seeds=seeds, positions=torch.zeros(count, dtype=torch.int64))
    found = torch.bincount(step.token, minlength=40)
    assert scipy.stats.chisquare(found.numpy(), (count * mixture).numpy()).pvalue > 1e-6
    for side, logits in (("theta", a), ("t", b)):
        log_p = logits.double().log_softmax(0)
        kl = (mixture * (mixture.log() - log_p)).sum().item()
        ess = 1 / (log_p.exp() ** 2 / mixture).sum().item()
        assert getattr(step, f"kl_{side}")[0].item() == pytest.approx(kl, abs=1e-5)
        assert getattr(step, f"ess_{side}")[0].item() == pytest.approx(ess, rel=1e-5)
        torch.testing.assert_close(getattr(step, f"logp_{side}"), log_p[step.token].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(step.logq, mixture.log()[step.token].float(), atol=1e-5, rtol=0)


def test_held_out_kl_is_what_the_scorer_finds():
    pair = some("q*")[0]
    measure = training.Measure.on(pair, 24)
    scorer = Scorer(pair.decoder(DecodeOptions(Settings(method="fixed", alpha=0.0), batch_size=24)))
    scored = scorer.run([Sample(s.request, list(s.token_ids)) for s in measure.texts])
    expected = np.mean(np.concatenate([s.fields["kl_theta"] for s in scored]))
    assert measure.kl(pair.theta) == pytest.approx(expected, rel=1e-4)
    assert measure.kl(pair.t) == pytest.approx(0, abs=1e-7)


def test_weights_of_tokens():
    samples = some("q*")[2]
    ratio = [np.exp(np.subtract(s.fields["logp_t"], s.fields["logq"])) for s in samples]
    flat = np.concatenate(ratio)
    expected = {
        "none": np.ones_like(flat),
        "raw": flat,
        "clipped": flat.clip(max=10),
        "normalised": flat / flat.mean(),
        "answers": np.concatenate([np.full(len(r), min(r.prod(), 10)) for r in ratio]),
    }
    for weighting, wanted in expected.items():
        found = training.token_weights(samples, weighting)
        assert [len(w) for w in found] == [len(s.token_ids) for s in samples]
        np.testing.assert_allclose(np.concatenate(found), wanted, rtol=2e-4, err_msg=weighting)
    assert training.ess_of(samples) == pytest.approx(flat.sum() ** 2 / (flat**2).sum() / len(flat), rel=1e-4)
    assert training.ess_of(samples) < effective_sample_size(torch.zeros(len(flat)))


def plain_loss(model, samples: list[Sample], of_tokens: list[list[float]]) -> torch.Tensor:
    """−Σ w log π_θ'(token) / number of tokens, answer by answer."""
    total = 0
    for sample, w in zip(samples, of_tokens, strict=True):
        ids = torch.tensor(sample.request.ids_theta + sample.token_ids)
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total = total - (torch.tensor(w) * logp[-len(w) :]).sum()
    return total / sum(map(len, of_tokens))


def test_loss_and_gradient_variance_by_plain_formulas(tmp_path, monkeypatch):
    pair, _, samples = some("q*")
    parts = [samples[i : i + 4] for i in (0, 4, 8)]
    make = training.sft(pair.tokenizer_theta, training.rows_of(samples, "raw"), 0)
    trainer = make(copy.deepcopy(pair.theta), str(tmp_path))
    batches = [training.collate(training.rows_of(part, "raw")) for part in parts]
    monkeypatch.setattr(trainer, "get_train_dataloader", lambda: batches)
    gradients = []
    for part, batch in zip(parts, batches, strict=True):
        loss = plain_loss(pair.theta, part, training.token_weights(part, "raw"))
        assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(loss.item(), rel=1e-4)
        of_parameters = torch.autograd.grad(loss, list(pair.theta.parameters()))
        gradients.append(torch.cat([g.flatten() for g in of_parameters]).double())
    gradients = torch.stack(gradients)
    variance = gradients.var(0).sum().item()
    expected = variance / (gradients.mean(0).square().sum().item() - variance / len(parts))
    assert training.gradient_variance(trainer) == pytest.approx(expected, rel=1e-3)


def test_noise_to_signal():
    """Of 20,000 sets of 5 normal gradients, the mean of the variance and of the square that is freed of it: each within
    5 standard errors, a false alarm in about a million runs."""
    generator = np.random.default_rng(seeded())
    mean, std, count = np.array([0.5, -0.2, 0.0]), np.array([1.0, 0.5, 0.7]), 5
    draws = mean + std * generator.standard_normal((20_000, count, 3))
    total, squares = draws.sum(1), (draws**2).sum((1, 2))
    variance = (squares - count * (total / count) ** 2 @ np.ones(3)) / (count - 1)
    signal = ((total / count) ** 2).sum(1) - variance / count
    for found, wanted in ((variance, (std**2).sum()), (signal, (mean**2).sum())):
        assert abs(found.mean() - wanted) < 5 * found.std() / len(found) ** 0.5
    for i in range(20):
        found = training.noise_to_signal(torch.tensor(total[i]), squares[i], count)
        assert found == (pytest.approx(variance[i] / signal[i]) if signal[i] > 0 else None)
    assert training.noise_to_signal(torch.tensor(total[0]), squares[0], 1) is None


def test_training_leaves_the_model_and_can_be_repeated():
    """A second training goes on from the first: a copy of a trained model must not compute with the old weights."""
    pair, _, samples = some("off-policy")
    measure = training.Measure.on(pair, 8)
    before, make = measure.kl(pair.theta), training.sft(pair.tokenizer_theta, training.rows_of(samples, "none"), 0)
    first = training.train(pair.theta, make, measure.kl, 1)
    assert measure.kl(pair.theta) == before
    assert first.curve == [(1.0, pytest.approx(measure.kl(first.model), rel=1e-5))]
    assert first.curve[0][1] < before
    after_first = measure.kl(first.model)
    second = training.train(first.model, make, measure.kl, 1)
    assert measure.kl(first.model) == after_first != measure.kl(second.model)
    assert second.curve[0][1] == pytest.approx(measure.kl(second.model), rel=1e-5)


def test_tokens_needed():
    assert tokens_needed([[0, 0.3], [100, 0.2], [200, 0.1]], 0.15) == pytest.approx(150)
    assert tokens_needed([[0, 0.3], [100, 0.1], [200, 0.4]], 0.2) == pytest.approx(50)
    assert tokens_needed([[0, 0.3], [100, 0.2]], 0.1) is None


def test_text_and_tables_are_those_of_the_results():
    text, folder = (FOLDER / "README.md").read_text(encoding="utf-8"), FOLDER / "results"
    assert report.fill(text, folder) == text
    for name in EXPERIMENTS:
        written = (folder / f"{name}.md").read_text(encoding="utf-8")
        assert all(
            report.table(table, results.load(folder / f"{name}.json")) in written for table in report.tables_of(name)
        )
    filled = re.findall(r"<!-- table (.*?) -->", text)
    assert sorted(filled) == sorted(report.ALL)


def test_every_number_of_the_text_is_in_the_results():
    text, folder = (FOLDER / "README.md").read_text(encoding="utf-8"), FOLDER / "results"
    of_tables = " ".join(re.findall(r"<!-- table .*?<!-- end -->", text, flags=re.DOTALL))
    found = {name: results.load(folder / f"{name}.json") for name in EXPERIMENTS}
    known = set(re.findall(r"[\d.]*\d", of_tables))
    for settings in (found["main"]["settings"]["sizes"], found["main"]["settings"]["training"]):
        known |= set(re.findall(r"[\d.]*\d", str(list(settings.values()))))
    prose = re.sub(r"<!-- table .*?<!-- end -->|```.*?```", "", text, flags=re.DOTALL)
    assert len(re.findall(r"\d ± \d", prose)) > 20
    for spread in re.findall(r"[\d.]+ ± [\d.]*\d", prose):
        assert spread in of_tables
    assert not [n for n in re.findall(r"(?<![\de.-])(?:\d+\.\d+|\d{3,})", prose) if n not in known]
    seconds = sum(s for of in found.values() for seeds in of["seconds"].values() for s in seeds.values())
    assert f"{seconds / 60:.0f} minutes" in text
