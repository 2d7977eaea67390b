"""What the trainings with trl have in common: their command lines, and how they are run."""

import argparse
from typing import Any

from datasets import Dataset
from transformers import Trainer

from qstar.data.prompts import load_prompts
from qstar.demo import PROMPTS, THETA, T

CONFIG = {
    "per_device_train_batch_size": 16,
    "model_init_kwargs": {"dtype": "float32"},
    "bf16": False,
    "report_to": "none",
}


def arguments(argv: list[str] | None, description: str, samples: str, learning_rate: float) -> tuple[Any, dict]:
    """The parsed command line, and what of a trl config it says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("samples", help=samples)
    parser.add_argument("model", help="the policy to train: a folder or a hub name")
    parser.add_argument("output", help="folder for the trained model")
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--epochs", type=float, default=1)
    args = parser.parse_args(argv)
    said = {"output_dir": args.output, "learning_rate": args.learning_rate, "num_train_epochs": args.epochs}
    return args, CONFIG | said


def live_arguments(argv: list[str] | None, description: str, learning_rate: float, **config) -> tuple[Any, dict]:
    """The parsed command line of a training that draws its samples itself, and what of a trl config it says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("output", help="folder for the trained model")
    parser.add_argument("--model", default=str(THETA), help="the policy to train (default: the demo pair's)")
    parser.add_argument("--teacher", default=str(T), help="the teacher (default: the demo pair's)")
    parser.add_argument("--dataset", default=str(PROMPTS), help="the prompts (default: the demo's)")
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    said = {"output_dir": args.output, "learning_rate": args.learning_rate, "max_steps": args.steps, "logging_steps": 1}
    return args, CONFIG | {"max_completion_length": 64, "gradient_checkpointing": False} | said | config


def prompts_of(path: str) -> Dataset:
    """The prompts of any dataset that `qstar.generate` reads, as trl wants them: `prompt` beside the other columns."""
    return Dataset.from_list([{"prompt": prompt.messages, **prompt.metadata} for prompt in load_prompts([path])])


def trained(trainer: Trainer) -> Trainer:
    trainer.train()
    trainer.save_model()
    return trainer
