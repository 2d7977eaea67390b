"""Templated word problems with small operands, each with a short answer and a worked solution."""

import random
import re
from dataclasses import dataclass

NAMES = (
    "Tom Anna Ben Mia Sam Lily Max Emma Leo Nora Jack Ella Noah Ruby Omar Zoe Ivan Maya Luis Priya Chen Sara Hugo "
    "Aisha Kofi Elena Yuki Dario Freya Malik"
).split()
THINGS = (
    "apples books coins pens marbles cards stickers shells stamps buttons cookies pencils balls stones flowers eggs "
    "oranges toys keys cups"
).split()
BOXES = ["boxes", "bags", "baskets", "jars", "trays", "packs"]

# Each template: question, what is computed, the answer as a sentence
ONE_STEP = [
    ("{n} has {a} {things}. {m} gives {n} {b} more. How many {things} does {n} have now?", "+",
     "{n} has {r} {things}."),
    ("There are {a} {things} on the table and {b} {things} in a bag. How many {things} are there in all?", "+",
     "There are {r} {things} in all."),
    ("{n} found {a} {things} and {m} found {b}. How many {things} did they find together?", "+",
     "They found {r} {things} together."),
    ("{n} had {a} {things} and lost {b} of them. How many {things} are left?", "-", "{r} {things} are left."),
    ("{n} has {a} {things}. {n} gives {b} to {m}. How many {things} does {n} keep?", "-", "{n} keeps {r} {things}."),
    ("{n} has {a} {things} and {m} has {b}. How many more {things} does {n} have?", "-", "{n} has {r} more {things}."),
    ("{n} has {a} {boxes} with {b} {things} in each. How many {things} does {n} have?", "*", "{n} has {r} {things}."),
    ("One pack holds {a} {things}. {n} buys {b} packs. How many {things} is that?", "*", "That is {r} {things}."),
]  # fmt: skip
TWO_STEP = [
    ("{n} has {a} {boxes} with {b} {things} in each and finds {c} more {things}. How many {things} does {n} have?",
     "*+", "{n} has {r} {things}."),
    ("{n} has {a} {things}, {m} gives {n} {b} more, and then {n} loses {c}. How many {things} does {n} have left?",
     "+-", "{n} has {r} {things} left."),
    ("{n} buys {a} {things} on Monday, {b} on Tuesday and {c} on Friday. How many {things} does {n} buy in all?", "++",
     "{n} buys {r} {things} in all."),
]  # fmt: skip
APPLY = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}


@dataclass(frozen=True)
class Problem:
    """A question, its answer in one sentence, worked (`solution`) and as a number."""

    question: str
    sentence: str
    solution: str
    answer: int


def is_right(text: str, answer: str) -> bool:
    """Whether the last number of a text is the answer."""
    return re.findall(r"\d+", text)[-1:] == [answer]


def make_problem(rng: random.Random) -> Problem:
    """Draw one problem: a third need two steps, all operands lie in 2..9 and no intermediate result is negative."""
    question, operations, sentence = rng.choice(TWO_STEP if rng.random() < 1 / 3 else ONE_STEP)
    name, other = rng.sample(NAMES, 2)
    words = {"n": name, "m": other, "things": rng.choice(THINGS), "boxes": rng.choice(BOXES)}
    a, b, c = (rng.randint(2, 9) for _ in range(3))
    if operations == "-":
        a, b = max(a, b) + (a == b), min(a, b)
    steps, result = [], a
    for operation, operand in zip(operations, (b, c), strict=False):
        before = result
        result = APPLY[operation](result, operand)
        if result < 0:
            return make_problem(rng)
        steps.append(f"{before} {operation} {operand} = {result}")
    words |= {"a": a, "b": b, "c": c, "r": result}
    return Problem(question.format(**words), sentence.format(**words), "\n".join([*steps, f"#### {result}"]), result)


def make_problems(count: int, seed: int, exclude: set[str] = frozenset()) -> list[Problem]:
    """Draw `count` problems with different questions, none of them in `exclude`; the same list for the same seed."""
    rng, problems, seen = random.Random(seed), [], set(exclude)
    while len(problems) < count:
        problem = make_problem(rng)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems
