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
