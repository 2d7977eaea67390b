"""The reward of the examples: does the answer end with the right number? Put your own in its place."""

import re
from typing import Any


def reward(sample: dict[str, Any]) -> float:
    """1 if the last number of a sample's answer is that of its dataset's `answer`, else 0."""
    found, wanted = (re.findall(r"-?\d+(?:\.\d+)?", str(text).replace(",", "")) for text in (
        sample["messages"][-1]["content"], sample["metadata"]["answer"],
    ))  # fmt: skip
    return float(bool(found and wanted) and float(found[-1]) == float(wanted[-1]))
