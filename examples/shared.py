"""What the two trainings with trl have in common: their command line, and how they are run."""

import argparse
from typing import Any

from transformers import Trainer

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


def trained(trainer: Trainer) -> Trainer:
    trainer.train()
    trainer.save_model()
    return trainer
