"""Training data from every rule: word problems, and answers to them drawn until a budget of tokens is spent."""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

import torch
from torch import Tensor

from qstar import Pair
from qstar.decode import Decoder
from qstar.demo.problems import Problem, is_right, make_problem
from qstar.pair import sample_seed
from qstar.prompting import PromptFormat
from qstar.rule import Rule
from qstar.sample import DecodeOptions, Sample
from qstar_kernels import QStarStep, qstar_sample
from qstar_kernels.types import Settings

MAX_NEW_TOKENS = 64
BLOCK = 128  # questions that are answered between two looks at the budget
HELD_OUT_SEED = 1  # of the problems that nothing is trained on

# How both models see a question: with a date in it, if their template has one, that is the same at every start
PLAIN = PromptFormat(moment=datetime(2026, 1, 1))
# The rules whose samples are a draw at every token, as settings of the library; the mixture is `ArithmeticRule`.
RULES = {
    "on-policy": {"method": "fixed", "alpha": 1.0},
    "off-policy": {"method": "fixed", "alpha": 0.0},
    "fixed 0.5": {"method": "fixed", "alpha": 0.5},
    "entropy": {"method": "entropy"},
    "arithmetic": None,
    "ESS balance": {"method": "ess_balance"},
    "q*": {},
    "greedy": {"method": "fixed", "alpha": 0.0, "temperature": 0.0},
}


@dataclass(frozen=True)
class ArithmeticRule(Rule):
    """½π_θ + ½π_t: a baseline with the same noise as q*, its `alpha` NaN since there is no such weight."""

    def step(self, logits_theta: Tensor, logits_t: Tensor, *, first: bool = False, **what: Tensor) -> QStarStep:
        log_theta, log_t = (x[:, : self.vocab_size].float().log_softmax(-1) for x in (logits_theta, logits_t))
        log_q = torch.logaddexp(log_theta, log_t) - torch.tensor(2.0).log()
        step = qstar_sample(log_q, log_q, **what, method="fixed")
        chosen = step.token.clamp(min=0)[:, None]
        for side, log_p in (("theta", log_theta), ("t", log_t)):
            setattr(step, f"logp_{side}", log_p.gather(1, chosen)[:, 0])
            setattr(step, f"kl_{side}", (log_q.exp() * (log_q - log_p)).sum(-1))
            setattr(step, f"ess_{side}", (-(2 * log_p - log_q).logsumexp(-1)).exp())
        step.alpha = torch.full_like(step.alpha, torch.nan)
        return step


@functools.cache
def held_out(count: int) -> list[Problem]:
    """The first problems of those that only measure."""
    return list(islice(problems(HELD_OUT_SEED), count))


def problems(seed: int) -> Iterator[Problem]:
    """Word problems without end, none twice; those to train on are none of the first 512 held-out ones."""
    seen = set() if seed == HELD_OUT_SEED else {p.question for p in held_out(512)}
    rng = random.Random(seed)
    while True:
        problem = make_problem(rng)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def decoder_of(pair: Pair, rule: dict | None, batch_size: int = BLOCK, speculate: int = 0) -> Decoder:
    """The decoding loop of a rule: settings of the library, None for the arithmetic mixture."""
    decoder = pair.decoder(DecodeOptions(Settings(**(rule or {})), batch_size, speculate=speculate))
    if rule is None:
        decoder.rule = ArithmeticRule(pair.vocab_size)
    return decoder


def answers(pair: Pair, questions: list[str], seed: int, rule: dict | Decoder | None) -> list[Sample]:
    """One answer to each question, in their order.

    Args:
        rule: as in `decoder_of`, or what that gave.

    Raises:
        ValueError: a token of an answer has no distribution.
    """
    decoder = rule if isinstance(rule, Decoder) else decoder_of(pair, rule)
    requests = (
        pair.request(i, [{"role": "user", "content": q}], sample_seed(seed, i, 0), MAX_NEW_TOKENS, PLAIN, PLAIN)
        for i, q in enumerate(questions)
    )
    samples = sorted(decoder.run(requests), key=lambda s: s.request.key)
    for sample in samples:
        if sample.error is not None:
            raise ValueError(f"an answer of the pair breaks off: {sample.error}")
    return samples


def right(text: str, problem: Problem) -> bool:
    """Whether the last number of an answer is the problem's."""
    return is_right(text, str(problem.answer))


def within(samples: list[Sample], budget: int) -> int:
    """How many samples, from the first, `budget` tokens pay for; at least one."""
    spent = count = 0
    for sample in samples:
        spent += len(sample.token_ids)
        if spent > budget and count:
            break
        count += 1
    return count


def draw(pair: Pair, rule: dict | None, seed: int, budget: int) -> tuple[list[Problem], list[Sample]]:
    """Answers of one rule to fresh problems, whole answers within `budget` tokens, one at least.

    The problems of one seed are the same for every rule.
    """
    source, asked, samples, block = problems(1000 + seed), [], [], 0
    while sum(len(s.token_ids) for s in samples) < budget:
        new = list(islice(source, min(BLOCK, 1 + budget // 8)))
        asked += new
        samples += answers(pair, [p.question for p in new], sample_seed(seed, block, 0), rule)
        block += 1
    count = within(samples, budget)
    return asked[:count], samples[:count]


def kept_right(drawn: tuple[list[Problem], list[Sample]]) -> list[Sample]:
    """Rejection sampling, as reward-ranked fine-tuning has it: those of the answers drawn whose result is right.

    Where none is, all of them.
    """
    return [s for p, s in zip(*drawn, strict=True) if right(s.text, p)] or drawn[1]


def preferences(pair: Pair, seed: int, budget: int) -> list[dict]:
    """Pairs for DPO: π_t's answer chosen, π_θ's rejected; `budget` tokens of both together.

    As conversations, as plain text where the tokenizer has no chat template.
    """
    asked, chosen = draw(pair, RULES["off-policy"], seed, budget)
    questions = [p.question for p in asked]
    rejected = answers(pair, questions, sample_seed(seed, 0, 1), RULES["on-policy"])
    pairs, spent = [], 0
    for question, good, bad in zip(questions, chosen, rejected, strict=True):
        spent += len(good.token_ids) + len(bad.token_ids)
        if spent > budget and pairs:
            break
        if good.text != bad.text:
            pairs.append({"prompt": question, "chosen": good.text, "rejected": bad.text})
    if not pair.tokenizer_theta.chat_template:
        return pairs
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{name: [{"role": roles[name], "content": text}] for name, text in p.items()} for p in pairs]
