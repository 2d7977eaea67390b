"""Training on rollouts that are drawn while the policy learns, by trl's trainers and `qstar.integrations.trl`."""

import copy
import time
from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from qstar import Pair
from qstar.demo.problems import is_right
from qstar.experiments.data import MAX_NEW_TOKENS, problems
from qstar.experiments.training import (
    BATCH_SIZE,
    DISTILLATION_LEARNING_RATE,
    GENERATIONS,
    GRPO_LEARNING_RATE,
    PROMPTS,
    Measure,
    train,
    trainer_options,
)
from qstar.integrations.trl import QStarDistillation, QStarGRPO, QStarRollout
from qstar.sample import Sample

LAST = 10  # steps whose rewards are averaged at the end

Numbers = dict[str, float | list | None]


class Distiller(QStarDistillation, DistillationTrainer):
    """The reverse KL to π_t at every token of completions of a rule."""


class Reinforcer(QStarGRPO, GRPOTrainer):
    """GRPO with log q of the tokens in its ratio."""


class Counted(QStarRollout):
    """Rollouts whose tokens and seconds are counted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens, self.seconds, self.sums = 0, 0.0, dict.fromkeys(("alpha", "kl_theta", "kl_t"), 0.0)

    def draw(self, *args) -> list[Sample]:
        start = time.perf_counter()
        samples = super().draw(*args)
        self.seconds += time.perf_counter() - start
        self.tokens += sum(len(s.token_ids) for s in samples)
        for name in self.sums:
            self.sums[name] += sum(sum(s.fields[name]) for s in samples)
        return samples

    def described(self) -> Numbers:
        """Means over all that was drawn."""
        means = {name: total / self.tokens for name, total in self.sums.items()}
        return {
            "tokens": self.tokens,
            "tokens_a_second": self.tokens / self.seconds,
            "alpha": means["alpha"],
            "draw_kl_theta": means["kl_theta"],
            "draw_kl_t": means["kl_t"],
        }


def options(seed: int, learning_rate: float, steps: int) -> dict:
    return trainer_options(seed, learning_rate) | {"max_steps": steps, "max_completion_length": MAX_NEW_TOKENS}


def watched(measure: Measure, rollout: Counted) -> Callable:
    """What a curve has of a model: the tokens that were drawn until then, and how far it is from π_t."""

    def look(model) -> list[float]:
        drawn = measure.drawn(model)
        return [rollout.tokens, measure.kl(model), drawn["reverse_kl"], drawn["sampled_accuracy"]]

    return look


def distil(
    pair: Pair,
    measure: Measure,
    rollout: Counted,
    seed: int,
    steps: int,
    points: int,
    learning_rate: float = DISTILLATION_LEARNING_RATE,
) -> Numbers:
    """trl's DistillationTrainer, reverse KL, `BATCH_SIZE` completions a step, on what `rollout` draws of the pair as it
    is by then."""
    questions = [p.question for p in islice(problems(4000 + seed), BATCH_SIZE * steps)]

    def make(model, folder: str) -> Distiller:
        return Distiller(
            model,
            copy.deepcopy(pair.t),
            args=DistillationConfig(folder, **options(seed, learning_rate, steps), beta=1.0),
            train_dataset=Dataset.from_list([{"prompt": asked(question)} for question in questions]),
            processing_class=pair.tokenizer_theta,
            rollout=rollout,
        )

    result = train(pair.theta, make, watched(measure, rollout), points)
    return {"curve": [point for _, point in result.curve]} | rollout.described() | measure.all(result.model)


def reinforce(
    pair: Pair, measure: Measure, rollout: Counted, with_ratio: bool, seed: int, steps: int, points: int
) -> Numbers:
    """trl's GRPOTrainer on what `rollout` draws, with log q in the ratio or as trl leaves it."""
    rows = [
        {"prompt": asked(p.question), "answer": str(p.answer)} for p in islice(problems(5000 + seed), PROMPTS * steps)
    ]
    made: list[GRPOTrainer] = []

    def make(model, folder: str) -> GRPOTrainer:
        config = options(seed, GRPO_LEARNING_RATE, steps) | {
            "per_device_train_batch_size": PROMPTS * GENERATIONS,
            "num_generations": GENERATIONS,
            "logging_strategy": "steps",
            "logging_steps": 1,
            "max_grad_norm": 1.0,
        }
        trainer = (Reinforcer if with_ratio else GRPOTrainer)(
            model,
            rewards,
            args=GRPOConfig(folder, **config),
            train_dataset=Dataset.from_list(rows),
            processing_class=pair.tokenizer_theta,
            rollout_func=rollout,
        )
        made.append(trainer)
        return trainer

    result = train(pair.theta, make, watched(measure, rollout), points)
    told = [entry for entry in made[0].state.log_history if "reward" in entry]
    return (
        {
            "curve": [point for _, point in result.curve],
            "reward": float(np.mean([entry["reward"] for entry in told[-LAST:]])),
            "clipped": float(np.mean([entry["clip_ratio/region_mean"] for entry in told])),
            "gradient_norm": float(np.mean([entry["grad_norm"] for entry in told])),
            "moved": measure.moved(result.model),
        }
        | rollout.described()
        | measure.all(result.model)
    )


def generated(pair: Pair, questions: list[str], seed: int) -> int:
    """How many tokens transformers' own `generate` of π_θ alone draws in answer to some questions, all at once."""
    prompts = pair.tokenizer_theta.apply_chat_template(
        [asked(q) for q in questions],
        add_generation_prompt=True,
        padding=True,
        padding_side="left",
        return_dict=True,
        return_tensors="pt",
    )
    torch.manual_seed(seed)
    eos = sorted(pair.eos_ids)
    ids = pair.theta.generate(
        **prompts, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos, pad_token_id=eos[0]
    )[:, prompts["input_ids"].shape[1] :]
    ended = torch.isin(ids, torch.tensor(eos)).cumsum(1)
    return int(((ended == 0) | ((ended == 1) & torch.isin(ids, torch.tensor(eos)))).sum())


def rewards(completions: list, answer: list[str], **_) -> list[float]:
    """1 where the last number is the right one."""
    return [float(is_right(c[0]["content"], x)) for c, x in zip(completions, answer, strict=True)]


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]
