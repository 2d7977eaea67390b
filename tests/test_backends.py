"""A backend is an entry of `BACKENDS`: the command line, a run's settings and its samples follow from it."""

import json

import pytest
from runs import lines

from qstar.backends import BACKENDS, Backend
from qstar.generate import main as generate

JOB = ["--num-samples", "3", "--max-new-tokens", "8"]


@pytest.fixture
def loaded(monkeypatch, demo_pair) -> list:
    """The demo pair as a third backend's, which it notes down."""
    found = []

    def load(args):
        found.append((args.batch_size, args.stub_options))
        return demo_pair

    stub = Backend(load, 4, "for this test", engine="its own", placement=frozenset({"where"}), package="qstar")
    monkeypatch.setitem(BACKENDS, "stub", stub)
    return found


def test_another_backend_has_the_same_samples(loaded, loaded_once, tmp_path):
    own = ["--stub-options", '{"where": 1, "what": 2}']
    assert generate([*JOB, "--backend", "stub", *own, "--output", str(tmp_path / "x.jsonl")]) == 0
    assert loaded == [(4, {"where": 1, "what": 2})]
    assert json.loads((tmp_path / "x.run.json").read_text())["--stub-options"] == {"what": 2}
    assert generate([*JOB, "--output", str(tmp_path / "y.jsonl")]) == 0
    assert lines(tmp_path / "x.jsonl") == lines(tmp_path / "y.jsonl")


def test_a_run_goes_on_on_a_backend_that_it_did_not_know(loaded, tmp_path):
    command = [*JOB, "--backend", "stub", "--output", str(tmp_path / "x.jsonl")]
    assert generate(command) == 0
    settings = json.loads((tmp_path / "x.run.json").read_text())
    assert settings.pop("--stub-options") == {}
    (tmp_path / "x.run.json").write_text(json.dumps(settings))
    assert generate(command) == 0
    assert generate([*command, "--stub-options", '{"what": 2}']) == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--backend", "stub", "--device", "cpu"], "is of --backend transformers; stub's own are in --stub-options"),
        (["--stub-options", '{"what": 2}'], "--stub-options is of --backend stub"),
        (["--backend", "other"], "invalid choice: 'other'"),
    ],
)
def test_options_are_of_one_backend(argv, said, loaded, capsys):
    with pytest.raises(SystemExit):
        generate(argv)
    assert said in capsys.readouterr().err


def test_a_backend_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setitem(BACKENDS, "stub", Backend(pytest.fail, 4, "nowhere", package="no_such_package"))
    with pytest.raises(SystemExit):
        generate(["--backend", "stub"])
    assert "no_such_package is not installed; pip install 'qstar[stub]'" in capsys.readouterr().err
