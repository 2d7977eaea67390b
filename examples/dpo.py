"""Train a policy with trl's DPOTrainer on pairs of samples of q*: of one prompt, the one with more reward is chosen.

    python -m qstar.generate --model-theta ./policy --model-t ./teacher --dataset train.jsonl \\
        --samples-per-prompt 8 --output samples.jsonl
    python examples/dpo.py samples.jsonl ./policy ./trained
"""

import json
from collections import defaultdict
from pathlib import Path

from datasets import Dataset
from reward import reward
from shared import arguments, trained
from trl import DPOConfig, DPOTrainer


def preference_pairs(path: str) -> Dataset:
    """A pair for each prompt whose samples differ in reward, as conversations: `prompt`, `chosen`, `rejected`."""
    of_prompt = defaultdict(list)
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        of_prompt[sample["prompt_index"]].append(sample)
    pairs = []
    for samples in of_prompt.values():
        samples.sort(key=reward)
        worst, best = samples[0], samples[-1]
        if reward(best) > reward(worst):
            *prompt, chosen = best["messages"]
            pairs.append({"prompt": prompt, "chosen": [chosen], "rejected": [worst["messages"][-1]]})
    return Dataset.from_list(pairs)


def main(argv: list[str] | None = None) -> DPOTrainer:
    description = "Direct preference optimisation on pairs of samples of q*."
    samples = "x.jsonl of qstar.generate with several samples a prompt"
    args, config = arguments(argv, description, samples, learning_rate=1e-6)
    return trained(DPOTrainer(args.model, args=DPOConfig(**config), train_dataset=preference_pairs(args.samples)))


if __name__ == "__main__":
    main()
