"""Shared by all tests: one thread, no network, the demo pair loaded once, and what a run sees of its rows."""

import json
import os
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
import transformers
from chats import PARTS, TEXT
from runs import lines, write_lines

from qstar import Pair
from qstar.demo import THETA, T
from qstar.generate import main as generate

torch.set_num_threads(1)

INTERPRETED = Path(__file__).with_name("kernels_interpreted.py")
interpreter = pytest.StashKey()


def pytest_collection_modifyitems(items):
    """What waits for the interpreter comes last: its process takes minutes, and runs beside all other tests."""
    items.sort(key=lambda item: "interpreted" in item.fixturenames)


def pytest_collection_finish(session):
    if session.config.option.collectonly or not any("interpreted" in item.fixturenames for item in session.items):
        return
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the session
    process = subprocess.Popen(
        [*command, INTERPRETED], env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=INTERPRETED.parents[1]
    )
    session.config.stash[interpreter] = process, output


def pytest_unconfigure(config):
    if interpreter in config.stash:
        config.stash[interpreter][0].kill()


@pytest.fixture(scope="session")
def interpreted(pytestconfig):
    """The process of the tests in the interpreter, which began with the session, and the file it writes to."""
    return pytestconfig.stash[interpreter]


@pytest.fixture(scope="session")
def demo_pair() -> Pair:
    return Pair.from_pretrained(THETA, T, device="cpu")


@pytest.fixture
def loaded_once(monkeypatch, demo_pair):
    """Commands take the demo pair that is loaded already; other models load as always."""
    load = Pair.from_pretrained.__func__

    def from_pretrained(cls, theta, t, **options):
        same = (str(theta), str(t)) == (str(THETA), str(T)) and options["dtype"] == "auto"
        adapted = options.get("adapter_theta") or options.get("adapter_t")
        return demo_pair if same and not adapted else load(cls, theta, t, **options)

    monkeypatch.setattr(Pair, "from_pretrained", classmethod(from_pretrained))


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON Lines, or text as it is, and returns the path."""

    def write(content, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def run(tmp_path):
    """Generates from rows through two templates; returns the samples, their diagnostics and the errors."""

    def run(rows, *argv, theta=TEXT, t=PARTS, command=generate):
        data = rows if isinstance(rows, Path) else write_lines(tmp_path / "data.jsonl", rows)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        options = ["--dataset", str(data), "--output", str(folder / "x.jsonl"), *argv]
        options += ["--max-new-tokens", "2", "--save-diagnostics"] if command is generate else []
        for side, template in (("theta", theta), ("t", t)):
            if template is not None:
                (folder / side).write_text(template)
                options += [f"--{side}-chat-template", str(folder / side)]
        run.code, run.folder = command(options), folder
        paths = [folder / f"x{end}.jsonl" for end in ("", ".diagnostics", ".errors")]
        return [lines(path) if path.exists() else [] for path in paths]

    return run


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(THETA)


@pytest.fixture
def rendered(tokenizer):
    def rendered(messages, template, **options) -> list[int]:
        options = {"add_generation_prompt": True} | options
        return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **options)

    return rendered
