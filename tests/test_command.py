"""`qstar`: one command with everything that all of them share, and that the documentation's command lines are ones."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import lines

import qstar
from qstar import __main__ as program
from qstar.demo import THETA, T
from qstar.generate import main as generate
from qstar.pair import naming
from qstar.rule import Rule
from qstar.run import options
from qstar.run.command import guarded, number
from qstar.serve import make_parser as serve_parser
from qstar_kernels.types import Settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "guide.md"]


def run(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qstar", *argv], capture_output=True, text=True, timeout=120, cwd=ROOT, **options
    )


def commands() -> list[str]:
    """Every command of ours in a fenced block of README and guide."""
    found = []
    for page in PAGES:
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                is_command = kind == "bash" or line.startswith("$ ")
                words = shlex.split(line.removeprefix("$ "), comments=True) if is_command else []
                parts = " ".join(map(shlex.quote, words)).split("'&&'")
                found += [p.strip() for p in parts if re.match(r"(python -m )?qstar[. ]\w", p.strip())]
    return found


def test_the_command_lines_of_the_documentation_are_understood():
    found = commands()
    assert len(found) > 15
    for line in found:
        name, *rest = shlex.split(line.removeprefix("python -m ").replace("qstar.", "qstar ", 1).removeprefix("qstar "))
        assert name in program.COMMANDS, line
        if name == "serve":
            args, _ = serve_parser().parse_known_args(rest)
        else:
            parser = program.module(name).make_parser()
            args = parser.parse_args(rest)
            if name == "generate":
                options.check_unused(args, parser.given)
        if "alpha_method" in args:
            options.settings_of(args)


@pytest.mark.parametrize("command", program.COMMANDS)
def test_help_and_errors_need_no_torch(command):
    code = f"import sys, runpy; sys.argv = ['qstar', '{command}', '--help']\n"
    code += "try: runpy.run_module('qstar', run_name='__main__')\n"
    code += "except SystemExit: print(sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "--config" in done.stdout


def test_hints_versions_and_what_is_installed():
    assert run("--version").stdout == f"qstar {qstar.__version__}\n"
    for argv, said in (
        (["genrate"], "there is no command genrate; did you mean generate?"),
        (["generate", "--num-sample", "3"], "did you mean --num-samples?"),
        (["plan", "--model-theta", "x"], "--model-t is missing"),
    ):
        done = run(*argv)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    env = run("env").stdout
    assert f"torch {torch.__version__}" in env
    assert str(Path.home()) not in env
    for shell in program.SHELLS:
        assert "alpha-method" in run("completion", shell).stdout


def test_numbers_with_their_thousands():
    count = number(int, 1, "a whole number of at least 1")
    assert [count(text) for text in ("10k", "1.5M", "0.3k", "7")] == [10_000, 1_500_000, 300, 7]
    for text in ("1.5", "0.0001k", "0", "k", "10q", "1e3k5"):
        with pytest.raises(Exception, match="must be a whole number"):
            count(text)


@pytest.mark.usefixtures("loaded_once")
def test_a_configuration_and_what_a_run_remembers(tmp_path, capsys):
    """The command line goes before the file, a run's own file makes the same run, and a printed one is complete."""
    config = tmp_path / "run.yaml"
    config.write_text("alpha-method: fixed\n--alpha: 0.25\nnum_samples: 2\nmax_new_tokens: 8\nstop: ['zzz']\n")
    config.write_text(config.read_text().replace("--alpha:", "alpha:"))
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    assert generate(["-q", "--config", str(config), "--output", str(paths[0])]) == 0
    assert capsys.readouterr().out == ""
    assert generate(["--config", str(tmp_path / "a.run.json"), "--output", str(paths[1])]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert generate(["--config", str(config), "--num-samples", "1", "--output", str(paths[2])]) == 0
    assert len(lines(paths[2])) == 1
    capsys.readouterr()
    with pytest.raises(SystemExit):
        generate(["--config", str(config), "--alpha", "0.5", "--print-config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["alpha_method"], printed["alpha"], printed["num_samples"]) == ("fixed", 0.5, 2)
    config.write_text(yaml.safe_dump(printed))
    assert generate(["--config", str(config), "--output", str(tmp_path / "d.jsonl")]) == 0
    for text, said in (
        ("alfa: 1", "there is no option alfa; did you mean --alpha?"),
        ("top_k: x", "must be a whole number"),
        ("save_diagnostics: 3", "must be true or false"),
        ("seed: [1, 2]", "must be one value"),
        ("dtype: int8", "invalid choice"),
        ("- 1", "must have a name and a value"),
        ("a: [", "while parsing"),
    ):
        config.write_text(text)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            generate(["--config", str(config)])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--alpha", "0.5"], "--alpha goes with --alpha-method fixed"),
        (["--tol", "1e-3", "--alpha-method", "entropy"], "--tol goes with"),
        (["--draft", "t"], "--draft goes with --speculate"),
        (["--t-hint-template", "{prompt}{hint}"], "--t-hint-template goes with --t-hint-field"),
        (["--dataset-split", "train"], "--dataset-split goes with --dataset"),
        (["--output", "x.jsonl", "--output-format", "verl"], "in a .parquet file"),
        (["--output", "x.parquet", "--output-format", "jsonl"], "in a .jsonl file"),
        (["--output", "x.errors.jsonl"], "is called as the errors of another run are"),
        (["--num-workers", "2"], "--num-workers goes with --engine ray"),
        (["--diagnostics-format", "parquet"], "--diagnostics-format goes with --save-diagnostics"),
    ],
)
def test_what_would_be_ignored_is_refused(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        generate(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("loaded_once")
def test_a_name_that_says_its_format(tmp_path, capsys):
    argv = ["--num-samples", "1", "--max-new-tokens", "4"]
    assert generate([*argv, "--output", str(tmp_path / "x.parquet")]) == 0
    assert (tmp_path / "x.parquet").read_bytes()[:4] == b"PAR1"
    assert generate([*argv, "--output", str(tmp_path / "x.jsonl"), "--save-diagnostics"]) == 0
    score = program.module("score").main
    for unused in (["--no-eos"], ["--t-system-prompt", "x"], ["--theta-chat-template", "none"]):
        with pytest.raises(SystemExit):
            score(["--dataset", str(tmp_path / "x.jsonl"), *unused])
        assert "its own tokens" in capsys.readouterr().err
    report = program.module("report").main
    with pytest.raises(SystemExit):
        report([str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "x.jsonl")])


def hears() -> None:
    """A child hears Ctrl-C, though these tests may run where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_during_the_start_is_one_line(number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "qstar.generate", "--output", str(tmp_path / "x.jsonl"), "--samples-per-prompt", "50"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=hears,
    )  # fmt: skip
    time.sleep(1.5)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "interrupted; start the same command again to go on\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("start", [["-m", "qstar.generate"], ["-m", "qstar", "generate"], ["qstar-generate"]])
def test_an_interruption_before_a_command_has_begun_is_one_line(number, start, tmp_path):
    """What a command imports first waits here for the signal."""
    (tmp_path / "qstar_kernels.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)")
    (tmp_path / "qstar-generate").write_text("import sys\nfrom qstar.generate import main\nsys.exit(main())")
    process = subprocess.Popen(
        [sys.executable, *start], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, preexec_fn=hears,
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory; less"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (ImportError("x.so: failed to map segment from shared object"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (options.argparse.ArgumentTypeError("ours"), None),
        (KeyError("a fault"), None),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_failures_are_a_line_and_faults_are_shown(error, said, capsys):
    def work() -> int:
        raise error

    before = signal.getsignal(signal.SIGTERM)
    if said is None:
        with pytest.raises(type(error)):
            guarded("qstar x", work)
    else:
        assert guarded("qstar x", work, memory="; less") == 1
        printed = capsys.readouterr().err
        assert printed.startswith(f"qstar x: error: {said}")
        assert printed.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_a_terminal_without_greek_letters(encoding):
    argv, env = [sys.executable, "-m", "qstar.generate", "--help"], os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(argv, capture_output=True, timeout=60, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert b"q* ~ pi_theta^alpha" in done.stdout


def test_a_misspelt_name_of_the_hub_is_named_without_a_network():
    pair = ["--model-theta", "no/such-model", "--model-t", "no/other"]
    done = run("plan", *pair, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    assert "no/such-model cannot be loaded" in done.stderr
    assert done.stderr.count("\n") == 1
    for model, said in (("no/such", "no/such cannot be loaded: no net"), ("net", "no net")):
        with pytest.raises(OSError, match=f"^{said}$"), naming(model):
            raise OSError("no net")


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_special_tokens_of_t_where_truncation_leaves_no_other(temperature):
    """They are all then, in π_t's proportions; with others left they have π_t's own probabilities."""
    theta, t = torch.zeros(2, 6), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    theta[0, 4], t[0, 4] = 30.0, 25.0
    settings = Settings(top_p=0.5, temperature=temperature)
    rule = Rule(6, settings, force_t_special_tokens=True, special_ids=(4, 5))
    log_q, of_t = rule.log_q(theta, t).double(), (t.double() / temperature).log_softmax(-1)
    assert torch.allclose(log_q[0, 4:], of_t[0, 4:].log_softmax(-1), atol=1e-6)
    assert bool((log_q[0, :4] == -torch.inf).all())
    assert torch.allclose(log_q[1, 4:], of_t[1, 4:], atol=1e-6)
    assert torch.allclose(log_q.exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-6)
    step = rule.step(theta, t, seeds=torch.tensor([1, 2]), positions=torch.zeros(2, dtype=torch.int64))
    assert step.status.tolist() == [0, 0]
    assert step.token[0].item() in (4, 5)


@pytest.mark.usefixtures("loaded_once")
def test_forced_special_tokens_with_truncation_on_the_demo_pair(tmp_path):
    argv = ["--force-t-special-tokens", "--top-p", "0.9", "--num-samples", "16", "--output", str(tmp_path / "x.jsonl")]
    assert generate([*argv, "--model-theta", str(THETA), "--model-t", str(T)]) == 0
    assert len(lines(tmp_path / "x.jsonl")) == 16
