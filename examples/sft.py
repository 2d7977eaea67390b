"""Fine-tune a policy on samples of q* with trl's SFTTrainer, which takes the output of `qstar.generate` as it is.

python -m qstar.generate --model-theta ./policy --model-t ./teacher --dataset train.jsonl --output samples.jsonl
python examples/sft.py samples.jsonl ./policy ./trained
"""

import argparse

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer


def main(argv: list[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description="Supervised fine-tuning on samples of q*.")
    parser.add_argument("samples", help="x.jsonl of qstar.generate")
    parser.add_argument("model", help="the policy to train: a folder or a hub name")
    parser.add_argument("output", help="folder for the trained model")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--epochs", type=float, default=1)
    args = parser.parse_args(argv)
    config = SFTConfig(
        args.output,
        learning_rate=args.learning_rate,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        report_to="none",
    )
    data = load_dataset("json", data_files=args.samples, split="train")
    trainer = SFTTrainer(args.model, args=config, train_dataset=data)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
