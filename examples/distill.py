"""Distil a teacher into a policy with trl's DistillationTrainer on completions of q* between the two.

    python examples/distill.py ./trained                    # the demo pair, a minute or so on a CPU
    python examples/distill.py ./trained --model ./policy --teacher ./teacher --dataset train.jsonl

The loss, the reverse KL to the teacher on every prefix, is trl's own. Whose prefixes they are goes from half way
between the models to the policy's own over the first half of the steps.
"""

from shared import live_arguments, prompts_of, trained
from trl import DistillationConfig, DistillationTrainer

from qstar.integrations.trl import QStarDistillation, QStarRollout, annealed


class Trainer(QStarDistillation, DistillationTrainer):
    """Distillation on completions of q*."""


def main(argv: list[str] | None = None) -> Trainer:
    args, config = live_arguments(argv, "On-policy distillation on completions of q*.", 5e-4, beta=1.0)
    rollout = QStarRollout(method="fixed", schedule={"alpha": annealed(0.5, 1.0, max(1, args.steps // 2))})
    data, config = prompts_of(args.dataset), DistillationConfig(**config)
    return trained(Trainer(args.model, args.teacher, args=config, train_dataset=data, rollout=rollout))


if __name__ == "__main__":
    main()
