"""The pair of small models and the prompts that ship with the package.

`THETA` is the policy π_θ, `T` the target π_t: two Llamas of a million parameters with one tokenizer, trained by
`python -m qstar.demo.train` (see the card, `README.md` in this folder). `PROMPTS` are word problems neither has seen.
"""

from pathlib import Path

DEMO_DIR = Path(__file__).parent
THETA = DEMO_DIR / "theta"
T = DEMO_DIR / "t"
PROMPTS = DEMO_DIR / "prompts.jsonl"
