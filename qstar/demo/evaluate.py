"""Measure the demo pair on its bundled problems: `python -m qstar.demo.evaluate` prints the table of the card."""

import json

import numpy as np

from qstar import GenerateOutput, Pair
from qstar.demo import PROMPTS, THETA, T
from qstar.demo.problems import is_right

SAMPLES = 4  # of each of the 128 problems, at temperature 1


def accuracy(out: GenerateOutput, answers: list[str]) -> float:
    """Share of samples whose last number is the answer."""
    return float(np.mean([is_right(text, answer) for text, answer in zip(out.texts, answers, strict=True)]))


def main() -> None:
    pair = Pair.from_pretrained(THETA, T)
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    questions, answers = [row["question"] for row in rows], [row["answer"] for row in rows]
    rules = {
        "π_θ (`alpha = 1`)": {"method": "fixed", "alpha": 1.0},
        "q\\*": {},
        "π_t (`alpha = 0`)": {"method": "fixed", "alpha": 0.0},
    }
    print("| drawn from | sampled | greedy | mean α | KL (nats) | ESS_θ/ESS_t |\n|---|---|---|---|---|---|")
    for name, rule in rules.items():
        out = pair.generate(questions, samples_per_prompt=SAMPLES, max_new_tokens=64, **rule)
        greedy = pair.generate(questions, max_new_tokens=64, temperature=0.0, **rule)
        cells = ["", "", ""]
        if not rule:
            alpha, kl, ess_theta, ess_t = map(np.concatenate, (out.alpha, out.kl_theta, out.ess_theta, out.ess_t))
            ratio = np.exp(np.mean(np.log(ess_theta) - np.log(ess_t)))
            cells = [f"{alpha.mean():.2f}", f"{kl.mean():.3f}", f"{ratio:.2f} (geometric mean)"]
        sampled = accuracy(out, [answer for answer in answers for _ in range(SAMPLES)])
        print(f"| {name} | {sampled:.2f} | {accuracy(greedy, answers):.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
