"""Pairs of rows that the claims are checked on and that the pictures show, by family.

All logits are float64, drawn with fixed seeds.
"""

import json
from dataclasses import dataclass
from functools import cache

import numpy as np

from theory.direct import Gaussian


@dataclass(frozen=True)
class Family:
    """Logits [B, V] of π_θ and π_t, one pair a row."""

    name: str
    theta: np.ndarray
    t: np.ndarray


def zipf_pair(rows: int, vocab_size: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [rows, vocab_size] that look like a language model's: π_t Zipf-like, π_θ the same plus normal noise."""
    g = np.random.default_rng(seed)
    rank = g.permuted(np.tile(np.arange(vocab_size), (rows, 1)), axis=1)
    t = -1.1 * np.log1p(rank) + g.normal(size=(rows, vocab_size))
    return t + noise * g.normal(size=t.shape), t


def turned(variances: tuple[float, float], degrees: float) -> np.ndarray:
    """Covariance [2, 2] with the given variances along axes that are turned."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rotation = np.array([[c, -s], [s, c]])
    return rotation @ np.diag(variances) @ rotation.T


ROUND = np.eye(2)
GAUSSIANS = {
    "equal": (Gaussian(np.zeros(2), ROUND), Gaussian(np.zeros(2), ROUND)),
    "shifted": (Gaussian(np.array([-1.0, -0.5]), ROUND), Gaussian(np.array([1.0, 0.5]), ROUND)),
    "nested": (Gaussian(np.zeros(2), ROUND), Gaussian(np.array([0.3, 0.0]), 4 * ROUND)),
    "rotated": (Gaussian(np.array([-0.3, 0.0]), turned((2.0, 1.0), 20)), Gaussian(np.zeros(2), turned((2.2, 0.9), 80))),
    "far apart": (Gaussian(np.array([-4.0, 0.0]), ROUND), Gaussian(np.array([4.0, 0.0]), 1.2 * ROUND)),
}
REACH = 18.0  # the grid goes from −REACH to REACH on both axes
STEP = 0.45


def grid() -> np.ndarray:
    """Points [V, 2] of the grid that stands in for the plane."""
    axis = np.arange(-REACH, REACH + STEP / 2, STEP)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


@cache
def gaussians() -> Family:
    """The pairs of GAUSSIANS as rows: log densities at the points of the grid."""
    points = grid()
    theta, t = (np.stack([pair[side].log_density(points) for pair in GAUSSIANS.values()]) for side in (0, 1))
    return Family("Gaussian", theta, t)


def sharp(rows: int, vocab_size: int, height: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows on which each model stands `height` nats high on a token of its own."""
    g = np.random.default_rng(seed)
    theta, t = g.normal(size=(2, rows, vocab_size))
    theta[:, 0] += height
    t[:, 1] += height
    return theta, t


@cache
def families() -> tuple[Family, ...]:
    """Pairs with equal supports."""
    g = np.random.default_rng(1)
    random = 2 * g.normal(size=(2, 20, 50))
    bernoulli = np.zeros((2, 30, 2))
    bernoulli[:, :, 1] = 3 * g.normal(size=(2, 30))
    near = g.normal(size=(10, 30))
    lead = [zipf_pair(1, 4000, noise, seed) for seed, noise in enumerate((0.1, 0.5, 1.0, 2.0, 4.0, 8.0))]
    one_hot = [sharp(3, 40, height, seed) for seed, height in enumerate((5.0, 20.0, 100.0))]
    offset = g.normal(size=(2, 10, 30)) + np.array([3e6, -2e6])[:, None, None]
    tied = np.round(g.normal(size=(2, 10, 12)))
    row = g.normal(size=(3, 25))
    return (
        Family("random", *random),
        Family("LLM-like", *map(np.concatenate, zip(*lead, strict=True))),
        gaussians(),
        Family("Bernoulli", *bernoulli),
        Family("adversarial: nearly equal", near + 1e-3 * g.normal(size=near.shape), near),
        Family("adversarial: nearly disjoint", *map(np.concatenate, zip(*one_hot, strict=True))),
        Family("adversarial: huge offsets", *offset),
        Family("adversarial: ties", *tied),
        Family("adversarial: one distribution", row + 7.0, row),
        Family("adversarial: V = 1", np.array([[3.0], [-1e5]]), np.array([[0.0], [2.0]])),
    )


@cache
def masked() -> Family:
    """Pairs with different supports."""
    g = np.random.default_rng(2)
    theta, t = 2 * g.normal(size=(2, 60, 30))
    theta[:40][g.random((40, 30)) < 0.3] = -np.inf
    t[20:][g.random((40, 30)) < 0.5] = -np.inf
    theta[:, 0], t[:, 0] = 0.0, -1.0  # a common token
    return Family("adversarial: different supports", theta, t)


def small_pairs(rows: int, vocab_size: int, seed: int = 3) -> Family:
    """Pairs small enough for general-purpose optimisers."""
    return Family("small", *1.5 * np.random.default_rng(seed).normal(size=(2, rows, vocab_size)))


@dataclass(frozen=True)
class DemoRows:
    """Rows of the demo pair along its own text: logits [B, V] and, for each row, the text before it."""

    theta: np.ndarray
    t: np.ndarray
    contexts: list[str]
    tokens: list[str]  # [V], how each token reads


@cache
def demo_rows(prompts: int) -> DemoRows:
    """The demo pair at every token of one q* sample for each of its first `prompts` problems."""
    import torch

    from qstar import Pair
    from qstar.demo import PROMPTS, THETA, T

    pair = Pair.from_pretrained(THETA, T, device="cpu")
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[:prompts]
    samples = pair.generate([json.loads(line)["question"] for line in lines], max_new_tokens=64).samples
    rows, contexts = ([], []), []
    for sample in samples:
        prompt = sample.request.ids_theta
        ids = torch.tensor([prompt + sample.token_ids[:-1]])
        for side, model in zip(rows, (pair.theta, pair.t), strict=True):
            with torch.inference_mode():
                side.append(model(ids).logits[0, len(prompt) - 1 :, : pair.vocab_size].double().numpy())
        contexts += [pair.tokenizer_theta.decode(sample.token_ids[:i]) for i in range(len(sample.token_ids))]
    tokens = [pair.tokenizer_theta.decode([i]) for i in range(pair.vocab_size)]
    return DemoRows(*map(np.concatenate, rows), contexts, tokens)
