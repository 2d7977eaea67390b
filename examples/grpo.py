"""Train a policy with trl's GRPOTrainer on completions of q* between the policy, as it is at each step, and a teacher.

    python examples/grpo.py ./trained                       # the demo pair, a minute or so on a CPU
    python examples/grpo.py ./trained --model ./policy --teacher ./teacher --dataset train.jsonl

The ratio of the loss is π_θ/q*; α goes to 1, which is π_θ itself, over the first half of the steps.
"""

from reward import reward
from shared import live_arguments, prompts_of, trained
from trl import GRPOConfig, GRPOTrainer

from qstar.integrations.trl import QStarGRPO, QStarRollout, annealed


class Trainer(QStarGRPO, GRPOTrainer):
    """GRPO whose ratio has the log-probabilities that the completions were drawn with."""


def rewards(prompts, completions, answer, **_) -> list[float]:
    """1 where the answer is right."""
    messages = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    return [reward({"messages": m, "metadata": {"answer": x}}) for m, x in zip(messages, answer, strict=True)]


def main(argv: list[str] | None = None) -> Trainer:
    about = "Group-relative policy optimisation on completions of q*."
    args, config = live_arguments(argv, about, 1e-5, num_generations=8, per_device_train_batch_size=32)
    rollout = QStarRollout(
        args.teacher, method="fixed", schedule={"alpha": annealed(0.5, 1.0, max(1, args.steps // 2))}
    )
    data, config = prompts_of(args.dataset), GRPOConfig(**config)
    return trained(Trainer(args.model, rewards, args=config, train_dataset=data, rollout_func=rollout))


if __name__ == "__main__":
    main()
