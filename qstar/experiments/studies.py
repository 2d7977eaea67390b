"""The experiments: which cells each has, and what a cell does."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qstar import Pair
from qstar.demo.problems import Problem
from qstar.experiments.data import PLAIN, RULES, answers, decoder_of, draw, held_out, kept_right, preferences, problems
from qstar.experiments.live import Counted, distil, reinforce
from qstar.experiments.pairs import enlarged, moved, shapes
from qstar.experiments.training import Measure, dpo, ess_of, row, rows_of, sft, train
from qstar.integrations.trl import annealed
from qstar.sample import Sample
from qstar_kernels import qstar_sample

GOAL = 2 / 3  # of the held-out KL at first: what the tokens needed are counted to

Numbers = dict[str, float | int | list | None]
Cells = dict[str, Callable[[int], Numbers]]


@dataclass(frozen=True)
class Sizes:
    """How large everything is; tokens are drawn tokens, steps are batches of 16 answers."""

    main_tokens: int = 6000
    ablation_tokens: int = 4000
    held_out: int = 128
    curve_points: int = 5
    budget_steps: tuple[int, ...] = (1, 3, 10, 30, 100)
    small_widths: tuple[int, ...] = (32, 64)
    small_problems: int = 4800  # that π_θ of a small pair learns from; π_t goes on with half as many
    small_tokens: int = 3000
    vocabularies: tuple[int, ...] = (2048, 8192, 32768, 131072)
    repeats: int = 9
    speculation_problems: int = 32
    enlargements: tuple[int, ...] = (1, 8)
    drafts: tuple[int, ...] = (1, 2, 4, 8)
    distances: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0)
    rounds: int = 5
    round_tokens: int = 2500
    live_steps: int = 100
    warm_up: int = 40  # of those
    grpo_steps: int = 60


QUICK = Sizes(
    main_tokens=60,
    ablation_tokens=40,
    held_out=2,
    curve_points=1,
    budget_steps=(1, 2),
    small_widths=(16,),
    small_problems=16,
    small_tokens=40,
    vocabularies=(100, 1000),
    repeats=1,
    speculation_problems=2,
    enlargements=(1, 2),
    drafts=(1, 2),
    distances=(0.5, 1.0),
    rounds=2,
    round_tokens=40,
    live_steps=2,
    warm_up=1,
    grpo_steps=1,
)


class Studies:
    """All experiments on one pair; draws that several cells need are made once a seed."""

    def __init__(self, pair: Pair, sizes: Sizes):
        self.pair, self.sizes = pair, sizes
        self.measure = Measure.on(pair, sizes.held_out)
        self.kl_before: float | None = None
        self._drawn: dict[tuple, tuple[list[Problem], list[Sample]]] = {}

    def drawn(self, rule: dict | None, seed: int, budget: int) -> tuple[list[Problem], list[Sample]]:
        key = (repr(rule), seed, budget)
        if key not in self._drawn:
            # those of an earlier seed are not asked for again
            self._drawn = {k: v for k, v in self._drawn.items() if k[1] == seed}
            self._drawn[key] = draw(self.pair, rule, seed, budget)
        return self._drawn[key]

    def sft(self, samples: list[Sample], weighting: str, seed: int) -> Callable:
        return sft(self.pair.tokenizer_theta, rows_of(samples, weighting), seed)

    def cells(self, experiment: str) -> Cells:
        return getattr(self, experiment)()

    def untrained(self) -> Cells:
        return {"untrained": lambda seed: self.measure.all(self.pair.theta)}

    def main(self) -> Cells:
        """Every rule with one budget, with importance weights and without."""

        def trained(samples: list[Sample], weighting: str, seed: int) -> Numbers:
            return self.outcome(self.sft(samples, weighting, seed))

        def of_rule(rule: str, weighting: str, seed: int) -> Numbers:
            _, samples = self.drawn(RULES[rule], seed, self.sizes.main_tokens)
            drawn = described(samples) if rule != "greedy" else {"tokens": tokens_of(samples)}
            return drawn | trained(samples, weighting, seed)

        def rejection(seed: int) -> Numbers:
            samples = kept_right(self.drawn(RULES["on-policy"], seed, self.sizes.main_tokens))
            return {"tokens": tokens_of(samples)} | trained(samples, "none", seed)

        def preference(seed: int) -> Numbers:
            pairs = preferences(self.pair, seed, self.sizes.main_tokens)
            numbers = self.outcome(dpo(self.pair.tokenizer_theta, pairs, seed))
            return {"pairs": len(pairs)} | numbers

        cells = self.untrained()
        for rule in RULES:
            cells[f"{rule}, none"] = partial(of_rule, rule, "none")
            if rule not in ("off-policy", "greedy"):  # weights of 1, and none
                cells[f"{rule}, clipped"] = partial(of_rule, rule, "clipped")
        return cells | {"rejection, none": rejection, "DPO": preference}

    def outcome(self, make: Callable) -> Numbers:
        """Train, and measure what came of it."""
        result = train(self.pair.theta, make, self.measure.kl, self.sizes.curve_points, noise=True)
        if self.kl_before is None:
            self.kl_before = self.measure.kl(self.pair.theta)
        budget = self.sizes.main_tokens
        curve = [[0, self.kl_before], *([round(share * budget), kl] for share, kl in result.curve)]
        return {
            "gradient_variance": result.gradient_variance,
            "curve": curve,
            "tokens_needed": tokens_needed(curve, GOAL * self.kl_before),
        } | self.measure.all(result.model, curve[-1][1])

    def ablation(self) -> Cells:
        """q* with one thing changed at a time; clipped weights where nothing else is said."""
        budget = self.sizes.ablation_tokens

        def cell(rule: dict, weighting: str, seed: int) -> Numbers:
            _, samples = self.drawn(rule, seed, budget)
            _, plain = self.drawn({}, seed, budget)
            result = train(self.pair.theta, self.sft(samples, weighting, seed), noise=True)
            same = [a.token_ids == b.token_ids for a, b in zip(samples, plain, strict=False)]
            gap = np.abs(field(samples, "kl_theta") - field(samples, "kl_t"))
            return (
                described(samples)
                | {"same_answers": float(np.mean(same)), "gap_mean": float(gap.mean()), "gap_max": float(gap.max())}
                | {"gradient_variance": result.gradient_variance}
                | self.measure.all(result.model)
            )

        rules = {"q*": {}}
        rules |= {f"α = {alpha}": {"method": "fixed", "alpha": alpha} for alpha in (0.3, 0.5, 0.7)}
        rules |= {f"tolerance {tol:g}": {"tol": tol} for tol in (1e-3, 1e-1)}
        rules |= {f"temperature {temperature}": {"temperature": temperature} for temperature in (0.7, 1.3)}
        cells: Cells = {name: partial(cell, rule, "clipped") for name, rule in rules.items()}
        weightings = ("none", "raw", "normalised", "answers")
        return cells | {f"weights {weighting}": partial(cell, {}, weighting) for weighting in weightings}

    def scaling(self) -> Cells:
        """Pairs of growing size, budgets, and the cost of a draw by vocabulary."""
        cells: Cells = {f"pair of width {width}": partial(self.small_pair, width) for width in self.sizes.small_widths}
        cells["pair as given"] = lambda seed: self.of_pair(self.pair, self.measure, seed)
        for rule, weighting in (("q*", "clipped"), ("q*", "none"), ("off-policy", "none")):
            cells[f"budget: {rule}, {weighting}"] = partial(self.budgets, rule, weighting)
        return cells | {f"vocabulary {size}": partial(self.vocabulary, size) for size in self.sizes.vocabularies}

    def small_pair(self, width: int, seed: int) -> Numbers:
        """A pair made from nothing: π_θ learns 30% worked solutions, π_t goes on with 90%."""
        tokenizer = self.pair.tokenizer_theta
        torch.manual_seed(seed + 1)
        config = LlamaConfig(
            vocab_size=self.pair.vocab_size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        theta, source = LlamaForCausalLM(config).eval(), problems(2000 + seed)
        count, models = self.sizes.small_problems, []
        for size, worked in ((count, 0.3), (count // 2, 0.9)):
            rows = [self.lesson(next(source), i % 10 < 10 * worked) for i in range(size)]
            theta = train(theta, sft(tokenizer, rows, seed, learning_rate=3e-3)).model
            models.append(theta)
        pair = Pair(*models, tokenizer, tokenizer)
        return self.of_pair(pair, Measure.on(pair, self.sizes.held_out), seed)

    def lesson(self, problem: Problem, worked: bool) -> dict[str, list]:
        """A problem to learn from, its answer worked or in a sentence."""
        tokenizer, text = self.pair.tokenizer_theta, problem.solution if worked else problem.sentence
        prompt = PLAIN.encode(tokenizer, [{"role": "user", "content": problem.question}])
        return row(prompt, [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])

    def of_pair(self, pair: Pair, measure: Measure, seed: int) -> Numbers:
        """A pair, its q*, and what training on q* and on π_t does to it."""
        numbers: Numbers = {"parameters": pair.theta.num_parameters(), "pair_kl": measure.kl(pair.theta)}
        for rule, weighting, name in (("off-policy", "none", "kl_off_policy"), ("q*", "clipped", "kl_qstar")):
            start = time.perf_counter()
            _, samples = draw(pair, RULES[rule], seed, self.sizes.small_tokens)
            seconds = time.perf_counter() - start
            make = sft(pair.tokenizer_theta, rows_of(samples, weighting), seed)
            numbers[name] = measure.kl(train(pair.theta, make).model)
        return numbers | described(samples) | {"tokens_a_second": tokens_of(samples) / seconds}

    def budgets(self, rule: str, weighting: str, seed: int) -> Numbers:
        """The held-out KL along one pass, step by step."""
        steps = self.sizes.budget_steps
        source, asked = problems(3000 + seed), []
        while len(asked) < 16 * steps[-1]:
            asked.append(next(source).question)
        samples = answers(self.pair, asked, seed, RULES[rule])
        result = train(self.pair.theta, self.sft(samples, weighting, seed), self.measure.kl, list(steps))
        return {"curve": [[round(share * tokens_of(samples)), kl] for share, kl in result.curve]}

    def vocabulary(self, size: int, seed: int) -> Numbers:
        """Milliseconds a row for q* and for plain softmax sampling, batches of 8 rows, synthetic logits."""
        generator = torch.Generator().manual_seed(seed)
        logits_theta = 3 * torch.randn(8, size, generator=generator)
        logits_t = logits_theta + torch.randn(8, size, generator=generator)
        seeds, positions = torch.arange(8), torch.zeros(8, dtype=torch.int64)
        functions = {
            "qstar_ms": lambda: qstar_sample(logits_theta, logits_t, seeds=seeds, positions=positions),
            "plain_ms": lambda: torch.multinomial(logits_theta.softmax(-1), 1, generator=generator),
        }
        times = {name: [] for name in functions}
        for _ in range(self.sizes.repeats):  # side by side, so that the machine's drift is in both
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                times[name].append(1000 * (time.perf_counter() - start) / 8)
        return {name: statistics.median(values) for name, values in times.items()}

    def speculation(self) -> Cells:
        """Drafts by π_θ: their number, and the distance of the pair, where the two models are of one shape."""
        theta, t, sizes = self.pair.theta, self.pair.t, self.sizes
        enlargements = sizes.enlargements if isinstance(t, LlamaForCausalLM) else (1,)
        distances = sizes.distances if shapes(theta) == shapes(t) else (1.0,)
        cells: Cells = {}
        for times in enlargements:
            for drafts in sizes.drafts:
                cells[f"π_t {times}×, K = {drafts}"] = partial(self.drafting, times, 1.0, drafts)
        for distance in distances:
            cells[f"distance {distance}"] = partial(self.drafting, enlargements[-1], distance, 4)
        return cells

    def drafting(self, times: int, distance: float, drafts: int, seed: int) -> Numbers:
        """π_t moved along the line from π_θ in weight space, and made `times` as costly; plain against drafted."""
        pair = self.pair
        t = pair.t if distance == 1 else moved(pair.theta, pair.t, distance)
        far = Pair(pair.theta, t, pair.tokenizer_theta, pair.tokenizer_t)
        count = self.sizes.speculation_problems
        pair = Pair(pair.theta, enlarged(t, times), pair.tokenizer_theta, pair.tokenizer_t)
        questions = [p.question for p in held_out(count)]
        decoders = {k: decoder_of(pair, {}, batch_size=8, speculate=k) for k in (0, drafts)}
        seconds, texts = {}, {}
        for k, decoder in decoders.items():
            start = time.perf_counter()
            texts[k] = answers(pair, questions, seed, decoder)
            seconds[k] = time.perf_counter() - start
        tally = decoders[drafts].tally
        same = [a.token_ids == b.token_ids for a, b in zip(texts[0], texts[drafts], strict=True)]
        return {
            "pair_kl": Measure.on(far, count).kl(far.theta),
            "kl": float(field(texts[0], "kl_theta").mean()),
            "acceptance": sum(tally.accepted) / sum(tally.drafted),
            "tokens_a_pass": tally.tokens / tally.passes,
            "speedup": seconds[0] / seconds[drafts],
            "same_answers": float(np.mean(same)),
        }

    def long_run(self) -> Cells:
        """Rounds of drawing from the pair as it is by then, and training on it; a new optimiser every round."""
        settings = (("q*", "clipped"), ("q*", "none"), ("on-policy", "clipped"), ("off-policy", "none"))
        return {f"{rule}, {weighting}": partial(self.rounds, rule, weighting) for rule, weighting in settings}

    def rounds(self, rule: str, weighting: str, seed: int) -> Numbers:
        theta, rounds = self.pair.theta, []
        for i in range(self.sizes.rounds):
            pair = self.measure.beside_t(theta)
            _, samples = draw(pair, RULES[rule], 100 * (seed + 1) + i, self.sizes.round_tokens)
            theta = train(theta, sft(pair.tokenizer_theta, rows_of(samples, weighting), seed)).model
            rounds.append(described(samples) | self.measure.all(theta))
        return {name: [numbers[name] for numbers in rounds] for name in rounds[0]}

    def distillation(self) -> Cells:
        """The reverse KL on rollouts of several rules, of the pair as it is at each step; the rates that were tried."""
        warm_up = self.sizes.warm_up
        rules = {
            "π_θ": {"method": "fixed", "alpha": 1.0},
            "π_t": {"method": "fixed", "alpha": 0.0},
            "q*": {},
            "α = ½": {"method": "fixed", "alpha": 0.5},
            "α from ½ to 1": {"method": "fixed", "schedule": {"alpha": annealed(0.5, 1.0, warm_up)}},
            "budget 0.02": {"method": "kl_budget", "kl_budget": 0.02},
            "budget from 0.1 to 0": {"method": "kl_budget", "schedule": {"kl_budget": annealed(0.1, 0.0, warm_up)}},
        }
        rates = (3e-5, 3e-4)

        def cell(rule: dict, seed: int, **options) -> Numbers:
            rollout, sizes = Counted(**rule), self.sizes
            return distil(self.pair, self.measure, rollout, seed, sizes.live_steps, sizes.curve_points, **options)

        cells: Cells = self.untrained() | {name: partial(cell, rule) for name, rule in rules.items()}
        return cells | {f"π_θ, rate {x:g}": partial(cell, rules["π_θ"], learning_rate=x) for x in rates}

    def grpo(self) -> Cells:
        """GRPO on rollouts of q*, with the right ratio and with none, beside the policy's own."""
        rules = {
            "π_θ": ({"method": "fixed", "alpha": 1.0}, True),
            "q*, ratio π_θ/q*": ({}, True),
            "q*, ratio left out": ({}, False),
            "α from ½ to 1, ratio π_θ/q": (
                {"method": "fixed", "schedule": {"alpha": annealed(0.5, 1.0, max(1, self.sizes.grpo_steps // 2))}},
                True,
            ),
        }

        def cell(rule: dict, with_ratio: bool, seed: int) -> Numbers:
            rollout = Counted(self.pair.t, tokenizer_t=self.pair.tokenizer_t, batch_size=64, **rule)
            steps, points = self.sizes.grpo_steps, self.sizes.curve_points
            return reinforce(self.pair, self.measure, rollout, with_ratio, seed, steps, points)

        return self.untrained() | {name: partial(cell, *how) for name, how in rules.items()}


def tokens_needed(curve: list[list[float]], goal: float) -> float | None:
    """Where a curve of (tokens, KL) first comes down to `goal`, between two points by a straight line; None if it never
    does."""
    for (tokens_before, before), (tokens, kl) in pairwise(curve):
        if kl <= goal:
            return tokens_before + (tokens - tokens_before) * (before - goal) / (before - kl)
    return None


def tokens_of(samples: list[Sample]) -> int:
    return sum(len(s.token_ids) for s in samples)


def field(samples: list[Sample], name: str) -> np.ndarray:
    return np.concatenate([s.fields[name] for s in samples])


def described(samples: list[Sample]) -> Numbers:
    """Means over the drawn tokens, and the share of them that is left by the weights π_t/q."""
    alpha = float(field(samples, "alpha").mean())
    return {
        "tokens": tokens_of(samples),
        "alpha": None if np.isnan(alpha) else alpha,
        "draw_kl_theta": float(field(samples, "kl_theta").mean()),
        "draw_kl_t": float(field(samples, "kl_t").mean()),
        "ess_theta": float(field(samples, "ess_theta").mean()),
        "ess_t": float(field(samples, "ess_t").mean()),
        "ess": ess_of(samples),
    }
