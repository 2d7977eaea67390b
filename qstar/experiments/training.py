"""Training π_θ on samples with trl, and what comes of it.

The objective is maximum likelihood of the drawn tokens, each with its weight w: −Σ w log π_θ'(token) / number of
tokens. With w = 1 it is plain fine-tuning, which moves π_θ' towards the rule that drew. With w = π_t/q of the token its
gradient is, on average over the draws, that of the forward KL(π_t‖π_θ') on the prefixes that the rule visits.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from qstar import Pair
from qstar.experiments.data import RULES, answers, held_out, right
from qstar.sample import Sample
from qstar.weights import effective_sample_size, log_weights, weights

BATCH_SIZE = 16  # answers in a step
# Of a few powers those that lowered the held-out KL most, on π_t's answers and on preference pairs of the demo pair
LEARNING_RATE, DPO_LEARNING_RATE = 1e-4, 3e-5
# Of 3e-5, 1e-4, 3e-4 and 1e-3, and of 3e-5 and 1e-4, those that served π_θ's own rollouts best
DISTILLATION_LEARNING_RATE, GRPO_LEARNING_RATE = 1e-4, 3e-5
PROMPTS, GENERATIONS = 8, 8  # of a step of GRPO
CLIP = 10.0
GRADIENT_BATCHES = 12  # batches whose gradients are compared


class WeightedTrainer(SFTTrainer):
    """trl's SFTTrainer on tokenised answers with a weight for every token of them."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, token_weights = inputs["input_ids"], inputs["weights"][:, 1:]
        first = int(inputs["answered"].nonzero()[:, 1].min()) - 1  # logits of the prompts are not needed
        keep = torch.arange(first, ids.shape[1] - 1, device=ids.device)
        outputs = model(input_ids=ids, attention_mask=inputs["attention_mask"], logits_to_keep=keep, use_cache=False)
        logp = outputs.logits.float().log_softmax(-1).gather(-1, ids[:, keep + 1, None])[..., 0]
        loss = -(token_weights[:, keep] * logp).sum() / inputs["answered"].sum()
        return (loss, outputs) if return_outputs else loss


def row(prompt_ids: list[int], answer_ids: list[int], weights: list[float] | None = None) -> dict[str, list]:
    """What is trained on: an answer behind its prompt, every token of it with a weight, 1 by default."""
    return {"prompt_ids": prompt_ids, "answer_ids": answer_ids, "weights": weights or [1.0] * len(answer_ids)}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Prompts and answers padded on the right: [B, L] each."""
    batch = {"input_ids": [], "attention_mask": [], "answered": [], "weights": []}
    for of_answer in rows:
        prompt, answer = of_answer["prompt_ids"], of_answer["answer_ids"]
        batch["input_ids"].append(torch.tensor(prompt + answer))
        batch["attention_mask"].append(torch.ones(len(prompt) + len(answer), dtype=torch.int64))
        batch["answered"].append(torch.tensor([False] * len(prompt) + [True] * len(answer)))
        batch["weights"].append(torch.tensor([0.0] * len(prompt) + of_answer["weights"]))
    return {name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True) for name, values in batch.items()}


def token_log_weights(samples: list[Sample]) -> list[torch.Tensor]:
    """log π_t/q of the tokens of each sample, by what was written when they were drawn."""
    return [
        log_weights(torch.tensor(s.fields["logp_t"])[None], torch.tensor(s.fields["logq"])[None], level="token")[0]
        for s in samples
    ]


def token_weights(samples: list[Sample], weighting: str) -> list[list[float]]:
    """A weight for every token of every sample.

    Args:
        weighting: `none`: 1; `raw`: π_t/q of the token; `clipped`: at most 10; `normalised`: 1 on average over all
            tokens; `answers`: π_t/q of the whole answer for each of its tokens, at most 10.
    """
    log_w = token_log_weights(samples)
    lengths = [len(x) for x in log_w]
    if weighting == "answers":
        return [[float(weights(x.sum(), high=CLIP))] * len(x) for x in log_w]
    flat = torch.cat(log_w)
    if weighting == "none":
        flat = torch.ones_like(flat)
    else:
        flat = weights(flat, high=CLIP if weighting == "clipped" else torch.inf, normalise=weighting == "normalised")
    return [x.tolist() for x in flat.split(lengths)]


@torch.inference_mode()
def answer_logprobs(model, samples: list[Sample], side: str, vocab_size: int) -> Iterator[torch.Tensor]:
    """Log-probabilities [tokens, V] at the tokens of the answers behind the prompts of `side`, 32 answers at a time."""
    for start in range(0, len(samples), 32):
        chunk = samples[start : start + 32]
        batch = collate([row(getattr(s.request, f"ids_{side}"), s.token_ids) for s in chunk])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        yield logits[:, :-1][batch["answered"][:, 1:]][:, :vocab_size].float().log_softmax(-1)


@dataclass(frozen=True)
class Measure:
    """Held-out measures against π_t of a pair, the same texts and noise for every trained policy.

    Args:
        pair: π_θ before training and π_t.
        problems: number of held-out problems.
        texts: an answer of π_t to each.
        log_t: π_t's log-probabilities at their tokens, as `answer_logprobs` gives them.
    """

    pair: Pair
    problems: int
    texts: list[Sample]
    log_t: list[torch.Tensor]

    @classmethod
    def on(cls, pair: Pair, problems: int) -> "Measure":
        """On the first `problems` of the held-out ones."""
        texts = answers(pair, [p.question for p in held_out(problems)], 0, RULES["off-policy"])
        return cls(pair, problems, texts, list(answer_logprobs(pair.t, texts, "t", pair.vocab_size)))

    def beside_t(self, theta) -> Pair:
        return Pair(theta, self.pair.t, self.pair.tokenizer_theta, self.pair.tokenizer_t)

    def kl(self, theta) -> float:
        """KL(π_t‖π_θ') in nats a token, over the whole vocabulary at every token of the held-out texts of π_t."""
        of_theta = answer_logprobs(theta, self.texts, "theta", self.pair.vocab_size)
        kl = [(t.exp() * (t - x)).sum(-1) for t, x in zip(self.log_t, of_theta, strict=True)]
        return torch.cat(kl).double().mean().item()

    def drawn(self, theta) -> dict[str, float]:
        """`reverse_kl`, KL(π_θ'‖π_t) a token on texts of π_θ', and the share of those that are right."""
        problems = held_out(self.problems)
        drawn = answers(self.beside_t(theta), [p.question for p in problems], 0, RULES["on-policy"])
        return {
            "reverse_kl": float(np.mean(np.concatenate([s.fields["kl_t"] for s in drawn]))),
            "sampled_accuracy": float(np.mean([right(s.text, p) for s, p in zip(drawn, problems, strict=True)])),
        }

    def all(self, theta, kl: float | None = None) -> dict[str, float]:
        """`kl`, where it is not known yet; what `drawn` gives; the share of greedy answers that are right."""
        problems = held_out(self.problems)
        questions = [p.question for p in problems]
        greedy = answers(self.beside_itself(theta), questions, 0, RULES["on-policy"] | {"temperature": 0.0})
        return {
            "kl": self.kl(theta) if kl is None else kl,
            **self.drawn(theta),
            "greedy_accuracy": float(np.mean([right(s.text, p) for s, p in zip(greedy, problems, strict=True)])),
        }

    def moved(self, theta) -> float:
        """KL(π_θ'‖π_θ) a token, to π_θ as it was before training, on texts of π_θ'."""
        pair = Pair(theta, self.pair.theta, self.pair.tokenizer_theta, self.pair.tokenizer_theta)
        drawn = answers(pair, [p.question for p in held_out(self.problems)], 0, RULES["on-policy"])
        return float(np.mean(np.concatenate([s.fields["kl_t"] for s in drawn])))

    def beside_itself(self, theta) -> Pair:
        return Pair(theta, theta, self.pair.tokenizer_theta, self.pair.tokenizer_theta)


class At(TrainerCallback):
    """Calls a function with the model after the given steps, and keeps what it returns."""

    def __init__(self, steps: set[int], function: Callable):
        self.steps, self.function, self.found = steps, function, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            model.eval()
            self.found[state.global_step] = self.function(model)
            model.train()


def rows_of(samples: list[Sample], weighting: str) -> list[dict[str, list]]:
    """What `sft` trains on."""
    of_samples = token_weights(samples, weighting)
    return [row(s.request.ids_theta, s.token_ids, w) for s, w in zip(samples, of_samples, strict=True)]


def sft(tokenizer, rows: list[dict], seed: int, learning_rate: float = LEARNING_RATE) -> Callable:
    """Makes a trainer of a model on weighted answers, given the model and a folder."""
    return lambda model, folder: WeightedTrainer(
        model,
        args=SFTConfig(
            folder,
            **trainer_options(seed, learning_rate),
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        processing_class=tokenizer,
    )


def dpo(tokenizer, pairs: list[dict], seed: int) -> Callable:
    """Makes a trainer of a model on preference pairs, the model as it is as the reference."""
    return lambda model, folder: DPOTrainer(
        model,
        args=DPOConfig(folder, **trainer_options(seed, DPO_LEARNING_RATE)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )


def settings() -> dict[str, float]:
    """What every training has in common."""
    return {
        "answers_a_step": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "learning_rate_dpo": DPO_LEARNING_RATE,
        "learning_rate_distillation": DISTILLATION_LEARNING_RATE,
        "learning_rate_grpo": GRPO_LEARNING_RATE,
        "prompts_a_step_grpo": PROMPTS,
        "generations_grpo": GENERATIONS,
        "clip": CLIP,
        "gradient_batches": GRADIENT_BATCHES,
    }


def trainer_options(seed: int, learning_rate: float) -> dict:
    """One pass over the data at a constant learning rate, so that every step is the end of a run of that budget."""
    return {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH_SIZE,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "seed": seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def gradient_variance(trainer) -> float | None:
    """tr Cov of the gradient of a batch over its squared mean, at the parameters as they are; None of a single batch.

    The mean's own square is freed of the noise that is in it: ‖ḡ‖² − tr Cov/n is unbiased for ‖E g‖². Where that is not
    above 0 the gradient is nothing but noise, and there is no ratio: None.
    """
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    count, total, squares = 0, None, 0.0
    trainer.model.train()
    for batch in trainer.get_train_dataloader():
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
        gradient = torch.cat([p.grad.flatten() for p in parameters]).double()
        trainer.model.zero_grad()
        total = gradient if total is None else total + gradient
        squares += gradient.square().sum().item()
        count += 1
        if count == GRADIENT_BATCHES:
            break
    return noise_to_signal(total, squares, count)


def noise_to_signal(total: torch.Tensor, squares: float, count: int) -> float | None:
    """The ratio of `gradient_variance` from the sum of the gradients and the sum of their squared norms."""
    if count < 2:
        return None
    mean = (total / count).square().sum().item()
    variance = (squares - count * mean) / (count - 1)
    signal = mean - variance / count
    return variance / signal if signal > 0 else None


@dataclass(frozen=True)
class Trained:
    """A trained policy, and what was seen of it on the way by the share of the data."""

    model: torch.nn.Module
    curve: list[tuple[float, Any]]
    gradient_variance: float | None


def train(
    model, make: Callable, look: Callable | None = None, points: int | list[int] = 0, noise: bool = False
) -> Trained:
    """Train a copy of a model once over the data.

    Args:
        make: what `sft` or `dpo` gave, or anything that makes a trainer.
        look: what is wanted of the model on the way.
        points: that many points of the curve, evenly, or the numbers of steps to look at.
        noise: measure the variance of the gradient before the first step.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(copy.deepcopy(model), folder)
        variance = gradient_variance(trainer) if noise else None
        steps = max(trainer.args.max_steps, -(-len(trainer.train_dataset) // BATCH_SIZE))
        at = {round(steps * i / points) for i in range(1, points + 1)} if isinstance(points, int) else set(points)
        watch = At(at - {0}, look)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        # The trainer wraps its model's forward so that a copy of it would go on computing with the old weights.
        trained = copy.deepcopy(model)
        trained.load_state_dict(trainer.model.state_dict())
    return Trained(trained, [(step / steps, seen) for step, seen in sorted(watch.found.items())], variance)


def ess_of(samples: list[Sample]) -> float:
    """(Σw)²/Σw² over the number of tokens, w = π_t/q: what share of the tokens is as good as drawn from π_t."""
    log_w = torch.cat(token_log_weights(samples))
    return effective_sample_size(log_w) / len(log_w)
