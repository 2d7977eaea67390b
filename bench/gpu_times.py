"""What `python -m bench.gpu` times, each only after a check of the same rows."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bench.calls import pretended
from bench.competitors import ordinary_sampling, research_step, two_log_softmax
from bench.gpu_checks import BF16, Item, Look, Option, checked, options, shapes
from bench.rows import check_exact, llm_like
from bench.timing import captured, in_turns, timer
from qstar_kernels import qstar_sample
from qstar_kernels.gpu import launch
from qstar_kernels.types import Settings


def like_models(run: Look, rows: int, vocab_size: int, noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 logits of both models [rows, vocab_size], and the rows' numbers."""
    theta, t = (x.to(BF16) for x in llm_like(rows, vocab_size, noise, run.device))
    return theta, t, torch.arange(rows, device=run.device)


def steps(run: Look) -> Iterator[Item]:
    def times(rows: int, vocab_size: int) -> dict[str, float]:
        theta, t, index = like_models(run, rows, vocab_size)
        check_exact(theta, t, index)
        both = torch.stack((theta, t))
        target = torch.empty_like(both)
        ours = partial(qstar_sample, theta, t, seeds=index, positions=index)
        others = {
            "one model": partial(ordinary_sampling, theta),
            "log_softmax": partial(two_log_softmax, theta, t),
            "copying both rows": partial(target.copy_, both),
            "research": partial(research_step, theta, t),
        }
        timers = {"`qstar_sample`": timer(ours, run.device), "warm": timer(ours, run.device, cold=False)}
        timers |= {name: timer(function, run.device) for name, function in others.items()}
        return in_turns(timers, 0.0 if run.quick else 1.5)

    for rows, vocab_size in shapes(run.quick):
        yield f"[{rows}, {vocab_size}]", partial(times, rows, vocab_size)


def other_settings(run: Look) -> Iterator[Item]:
    vocab_size = shapes(run.quick)[0][1]

    def time_of(option: Option) -> float:
        theta, t, index = like_models(run, option.rows, vocab_size, option.noise)
        checked(theta[:8], t[:8], range(8), **option.settings)
        ours = partial(qstar_sample, theta, t, seeds=index, positions=index, **option.settings)
        return in_turns({"": timer(ours, run.device)}, 0.0 if run.quick else 0.5)[""]

    for option in options(run.quick):
        yield f"{option.rows} | {option.name}", partial(time_of, option)


REPEATS = 20  # of a kernel within one timing: alone, the shortest take less than the events


def kernels(run: Look) -> Iterator[Item]:
    vocab_size = shapes(run.quick)[0][1]

    def times(rows: int, **settings) -> list[tuple[str, float]]:
        theta, t, index = like_models(run, rows, vocab_size)
        checked(theta[:8], t[:8], range(8), **settings)
        launches, _ = launch.plan(launch.aligned(theta), launch.aligned(t), Settings(**settings), index, index)
        found = []
        for name, group in groupby(launches, lambda one: one.kernel.__name__.removesuffix("_kernel")):
            some = list(group)
            once = timer(lambda some=some: [one() for _ in range(REPEATS) for one in some], run.device, cold=False)
            seconds = in_turns({"": once}, 0.0 if run.quick else 0.3)[""] / REPEATS
            found.append((name if len(some) == 1 else f"{len(some)} × {name}", seconds))
        return found

    if run.on_gpu:
        for rows in (1, 16, 64, 256):
            yield str(rows), partial(times, rows)
        yield "1, `top_p=0.9`", partial(times, 1, top_p=0.9)


def host(run: Look) -> Iterator[Item]:
    """Without a GPU the launches do nothing: what is left is what this project and Triton do before each."""

    def seconds(function: Callable[[], object], calls: int = 50) -> float:
        function()
        found = []
        if run.on_gpu:
            torch.cuda.synchronize()
        for _ in range(calls):  # too few to fill the queue of launches, so the device is not waited for
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
        if run.on_gpu:
            torch.cuda.synchronize()
        return statistics.median(found)

    def times(rows: int, **settings) -> dict[str, float]:
        theta, t, index = like_models(run, rows, shapes(run.quick)[0][1])
        checked(theta[:8], t[:8], range(8), **settings)
        with nullcontext() if run.on_gpu else pretended("sm_90"):
            make = partial(launch.plan, launch.aligned(theta), launch.aligned(t), Settings(**settings), index, index)
            launches, _ = make()
            step = partial(qstar_sample, theta, t, seeds=index, positions=index, impl="triton", **settings)
            return {
                "the whole call": seconds(step),
                "`plan`, once": seconds(make),
                f"its {len(launches)} launches, the first time": seconds(lambda: [one() for one in launches]),
            }

    for rows in (1, 64):
        yield f"{rows}{'' if run.on_gpu else ', with launches that do nothing'}", partial(times, rows)


@dataclass
class Models:
    """What `bench.loops` asks of a pair; tokens alone, so no tokenizer."""

    theta: Any
    t: Any
    vocab_size: int
    eos_ids: frozenset[int] = frozenset()

    def decoder(self, options):
        from qstar.decode import Decoder

        return Decoder(self.theta, self.t, self.vocab_size, set(self.eos_ids), set(), None, options)


@cache
def demo_pair(device: torch.device, quick: bool) -> Models:
    from transformers import AutoModelForCausalLM

    from qstar.demo import THETA, T

    theta, t = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32).eval().to(device) for x in (THETA, T))
    return Models(theta, t, theta.config.vocab_size)


@cache
def llamas(device: torch.device, quick: bool) -> Models:
    """Two with random weights in bfloat16, of 1.24·10⁹ parameters each unless `quick`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, vocab_size = (2, 128, 1000) if quick else (16, 2048, 128256)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 256), tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        theta, t = (LlamaForCausalLM(config).to(BF16).eval() for _ in range(2))
    return Models(theta, t, vocab_size)


def loop(run: Look) -> Iterator[Item]:
    def clock(function: Callable[[], Any]) -> tuple[float, Any]:
        if run.on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        if run.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    def times(make: Callable[..., Models], batch: int) -> dict[str, float]:
        from bench.loops import own_loop, plain_loop, split_times
        from qstar.graphs import say
        from qstar.sample import Request

        models, new_tokens = make(run.device, run.quick), 8 if run.quick else 64
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, models.vocab_size, (32 - i % 7,), generator=generator) for i in range(batch)]
        requests = [Request(i, ids.tolist(), ids.tolist(), i, new_tokens) for i, ids in enumerate(prompts)]

        def tokens(asked: list[Request] = requests, **options) -> list[list[int]]:
            return [sample.token_ids for sample in own_loop(models, asked, True, **options)]

        if models.theta.dtype == torch.float32:  # in half precision rounding moves a token now and then
            greedy = plain_loop(models, requests, cached=True, greedy=True).tolist()
            assert tokens(settings=Settings(temperature=0.0)) == greedy, "not the tokens of the plain loop"
            coming = [replace(x, max_new_tokens=5 + 11 * i % new_tokens) for i, x in enumerate(4 * requests)]
            played, launched = (tokens(coming, batch_size=batch, cuda_graphs=x) for x in ("auto", "off"))
            assert played == launched, "other tokens from steps that are recorded"
            assert not run.on_gpu or not say.cache_info().currsize, "no step was recorded"
        first = tokens()
        assert all(len(row) == new_tokens for row in first), "a row ended early"
        taken = [clock(tokens) for _ in range(2)]
        assert all(again == first for _, again in taken), "other tokens the second time"
        seconds = min(seconds for seconds, _ in taken)
        unrecorded = partial(tokens, cuda_graphs="off")
        by_launches = min(clock(unrecorded)[0] for _ in range(2))
        with split_times(models) as parts:  # which waits for the device, as no recording may
            unrecorded()
        forward = [statistics.median(s for columns, s in parts[name] if columns == 1) for name in ("theta", "t")]
        return {
            "tokens/s": batch * new_tokens / seconds,
            "tokens/s, nothing recorded": batch * new_tokens / by_launches,
            "a step": seconds / new_tokens,
            "forward passes": sum(forward),
            "q* step": statistics.median(s for _, s in parts["q* step"]),
        }

    def replayed(batch: int) -> float:
        """Seconds of a pass of one token a row, 128 tokens in, as a CUDA graph over a cache of fixed size."""
        from transformers import StaticCache

        models = llamas(run.device, run.quick)
        ids = torch.randint(3, models.vocab_size, (batch, 128), device=run.device)
        cached = StaticCache(config=models.theta.config, max_cache_len=256)
        token, position = ids[:, :1].clone(), torch.tensor([128], device=run.device)
        with torch.inference_mode():
            models.theta(ids, past_key_values=cached, use_cache=True, logits_to_keep=1)

            def forward() -> Tensor:
                positions = {"position_ids": position.expand(batch, 1), "cache_position": position}
                return models.theta(token, past_key_values=cached, use_cache=True, **positions).logits

            replay = captured(forward)
            assert replay is not forward, "could not be captured"
            return min(clock(lambda: [replay() for _ in range(20)])[0] for _ in range(3)) / 20

    batches = (2,) if run.quick else (1, 16)
    for batch in batches:
        yield f"demo pair | {batch}", partial(times, demo_pair, batch)
    for batch in batches:
        yield f"two random Llamas | {batch}", partial(times, llamas, batch)
        if run.on_gpu:
            yield f"a Llama's forward pass as a CUDA graph | {batch}", partial(replayed, batch)
