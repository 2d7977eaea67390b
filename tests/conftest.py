"""Shared by all tests: one thread, no network, and the demo pair loaded once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from qstar import Pair
from qstar.demo import THETA, T

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_pair() -> Pair:
    return Pair.from_pretrained(THETA, T, device="cpu")


@pytest.fixture
def loaded_once(monkeypatch, demo_pair):
    """Commands take the demo pair that is loaded already; other models load as always."""
    load = Pair.from_pretrained.__func__

    def from_pretrained(cls, theta, t, **options):
        same = (str(theta), str(t)) == (str(THETA), str(T)) and options["dtype"] == "auto"
        return demo_pair if same else load(cls, theta, t, **options)

    monkeypatch.setattr(Pair, "from_pretrained", classmethod(from_pretrained))
