"""Fingerprints of checkpoints: what they see, what they leave out, and how little of a large one they read."""

import json
import os
import random
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from qstar.demo import THETA
from qstar.run import checkpoints
from qstar.run.checkpoints import fingerprint


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a checkpoint of 38 tensors."""
    return Path(shutil.copytree(THETA, tmp_path / "checkpoint"))


@pytest.fixture
def as_if_large(monkeypatch):
    """Weights are sampled, by blocks that leave out nearly all of them."""
    for name, value in (("WHOLE", 0), ("BLOCK", 32), ("BLOCKS", 256)):
        monkeypatch.setattr(checkpoints, name, value)


def changed(folder: Path, path: Path, data: bytes) -> bool:
    """Whether the fingerprint is another while a file holds `data`; its size and its time stay as they are."""
    whole, before, stat = path.read_bytes(), fingerprint(str(folder)), path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = fingerprint(str(folder))
    path.write_bytes(whole)
    assert fingerprint(str(folder)) == before
    return after != before


@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin"])
@pytest.mark.usefixtures("as_if_large")
def test_every_tensor_of_a_large_checkpoint_counts(folder, tmp_path, form):
    """One after the other, each is changed all over by its last bit, as a merged adapter or a training step does."""
    tensors, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if form != "safetensors":
        path.unlink()
        path = folder / "pytorch_model.bin"

    def write(to: Path) -> bytes:
        if form == "safetensors":
            save_file(tensors, to)
        else:
            torch.save(tensors, to, _use_new_zipfile_serialization=form == "bin")
        return to.read_bytes()

    write(path)
    assert len(tensors) == 38
    for name, tensor in tensors.items():
        bits = tensor.view(torch.int16)
        bits ^= 1
        data = write(tmp_path / path.name)
        assert len(data) == path.stat().st_size
        assert changed(folder, path, data), name
        bits ^= 1


@pytest.mark.usefixtures("as_if_large")
def test_a_part_of_a_large_tensor_counts_if_it_is_as_long_as_the_distance_of_the_blocks(folder):
    """As one of the experts of a stacked tensor is; of torch's archives, which have checksums, every bit counts."""
    path, rng = folder / "model.safetensors", random.Random(0)
    data = path.read_bytes()
    length = len(data) // checkpoints.BLOCKS + checkpoints.BLOCK
    for start in (rng.randrange(len(data) - length) for _ in range(40)):
        part = bytes(byte ^ 1 for byte in data[start : start + length])
        assert changed(folder, path, data[:start] + part + data[start + length :])
    tensors = load_file(path)
    path.unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    data = path.read_bytes()
    embedding = tensors["model.embed_tokens.weight"]
    embedding[1234, 56] += 1
    torch.save(tensors, folder.parent / "pytorch_model.bin")
    assert changed(folder, path, (folder.parent / "pytorch_model.bin").read_bytes())


def test_every_bit_of_a_small_checkpoint_counts(folder):
    rng = random.Random(1)
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        for place in (0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(5))):
            data[place] ^= 1
            assert changed(folder, path, bytes(data)), (path.name, place)
            data[place] ^= 1


def test_files_that_a_model_is_loaded_from_count_and_no_others(folder):
    before = fingerprint(str(folder))
    for name in ("README.md", "optimizer.pt", "samples.run.json", "samples.jsonl", "checkpoint-5/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert fingerprint(str(folder)) == before
    for name in ("tokenizer.model", "merges.txt", "modeling.py", "additional_chat_templates/tools.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        assert fingerprint(str(folder)) != before
        before = fingerprint(str(folder))


def test_a_copy_is_the_same_checkpoint(folder):
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert fingerprint(str(folder)) == fingerprint(str(THETA))


def on_hub(cache: Path, name: str, commit: str, **files: str) -> None:
    """Make a commit the newest of a repository in a cache of the hub."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for file, text in files.items():
        (snapshot / f"{file}.json").write_text(text)


def test_an_adapter_of_the_hub_is_refused(tmp_path, monkeypatch):
    """Also one that has a configuration of its own: its base would be read at another repository's commit."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    on_hub(tmp_path, "some/adapter", "a" * 40, adapter_config="{}")
    on_hub(tmp_path, "some/other", "a" * 40, adapter_config="{}", config="{}")
    for name in ("some/adapter", "some/other"):
        with pytest.raises(ValueError, match=f"{name} is an adapter; merge it into its base"):
            fingerprint(name)


def test_code_from_another_repository_counts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "some/code--modeling.Model", "AutoTokenizer": [None, "x.Y"]}
    (folder / "config.json").write_text(json.dumps(config))
    found = []
    for commit in ("a" * 40, "b" * 40):
        on_hub(tmp_path, "some/code", commit, config="{}")
        found.append(fingerprint(str(folder)))
    assert found[0] != found[1]


def test_a_model_of_the_hub_is_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert fingerprint("some/model") == "an unknown commit of some/model"
    cache, found = tmp_path / "models--some--model", []
    (cache / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (cache / "refs" / "main").write_text(commit)
        snapshot = cache / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        found.append(fingerprint("some/model"))
    assert found == ["commit:" + "a" * 40, "commit:" + "b" * 40]


def test_a_torn_file_has_a_fingerprint_too(folder, monkeypatch):
    """Loading says what is wrong with it."""
    monkeypatch.setattr(checkpoints, "WHOLE", 0)
    path = folder / "model.safetensors"
    for data in (b"", b"\xff" * 4, b"\xff" * 3000, b"\x02" + b"\0" * 7 + b"[]" + bytes(3000)):
        assert changed(folder, path, data)


def test_a_large_checkpoint_is_read_in_blocks(tmp_path):
    """140 GB, which are holes in a file: some 33,000 blocks, and so hundreds of megabytes."""
    sizes = [size for _ in range(80) for size in (8192 * 8192 * 2, 28672 * 8192 * 2, 28672 * 8192 * 2, 8192 * 2)]
    sizes.append(140 * 10**9 - sum(sizes))
    header, start = {}, 0
    for i, size in enumerate(sizes):
        header[f"t{i}"] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [start, start + size]}
        start += size
    described = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        file.truncate(8 + len(described) + start)
    size = path.stat().st_size
    pieces = checkpoints._blocks(*checkpoints._layout(path, size), size)
    assert sum(length for _, length in pieces) < 6e8
    tensors = [8 + len(described) + t["data_offsets"][0] for t in header.values()]
    assert {*tensors, *(end - checkpoints.BLOCK for end in [*tensors[1:], size])} <= {s for s, _ in pieces} | {
        s + length - checkpoints.BLOCK for s, length in pieces
    }
    assert fingerprint(str(tmp_path)).startswith("sha256:")
