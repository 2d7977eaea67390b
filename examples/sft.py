"""Fine-tune a policy on samples of q* with trl's SFTTrainer: the output of `qstar.generate`, and what it says of tools.

python -m qstar.generate --model-theta ./policy --model-t ./teacher --dataset train.jsonl --output samples.jsonl
python examples/sft.py samples.jsonl ./policy ./trained
"""

import json
from typing import Any

from datasets import Features, Json, List, Value, load_dataset
from shared import arguments, trained
from trl import SFTConfig, SFTTrainer

from qstar.conversation import read_tools
from qstar.prompting import with_objects

# Told, since `datasets` would give all rows the keys of any: other arguments of a call, and other schemas of a tool.
FEATURES = Features(
    dict.fromkeys(("id", "finish_reason"), Value("string"))
    | dict.fromkeys(("prompt_index", "sample_index", "num_tokens"), Value("int64"))
    | {"messages": List(Json()), "metadata": Json()}
)


def as_sampled(row: dict[str, Any]) -> dict[str, Any]:
    """What the chat template was given: the row's tools (those of an OpenAI request are in its body), in a column where
    trl looks for them, and calls with objects for their arguments."""
    messages = [
        message | {"tool_calls": with_objects(message["tool_calls"])} if message.get("tool_calls") else message
        for message in row["messages"]
    ]
    tools = read_tools((row["metadata"].get("body") or row["metadata"]).get("tools"), "tools")
    return {"messages": messages, "tools": json.dumps(tools)}


def main(argv: list[str] | None = None) -> SFTTrainer:
    description, samples = "Supervised fine-tuning on samples of q*.", "x.jsonl of qstar.generate"
    args, config = arguments(argv, description, samples, learning_rate=2e-5)
    data = load_dataset("json", data_files=args.samples, split="train", features=FEATURES)
    data = data.map(as_sampled, features=Features({**FEATURES, "tools": Value("string")}))
    return trained(SFTTrainer(args.model, args=SFTConfig(**config), train_dataset=data))


if __name__ == "__main__":
    main()
