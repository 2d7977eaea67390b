"""Tokens a second of whole decoding loops, and where ours spends its time."""

import json
import time
from pathlib import Path

import pytest
import torch

from bench.loops import own_loop, padded, plain_loop, split_times
from bench.timing import side_by_side
from qstar import Pair, PromptFormat
from qstar.demo import PROMPTS, THETA, T
from qstar.sample import Request
from qstar_kernels.types import Settings

NEW_TOKENS = {"demo": 32, "given": 16}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "which" in metafunc.fixturenames:
        given = metafunc.config.getoption("--pair")
        metafunc.parametrize("which", ["demo", "given"] if given else ["demo"], scope="module")


@pytest.fixture(scope="module")
def pair(request, device, which) -> Pair:
    names = (THETA, T) if which == "demo" else request.config.getoption("--pair")
    return Pair.from_pretrained(*names, device=str(device))


def first_requests(pair: Pair, count: int, new_tokens: int) -> list[Request]:
    questions = [json.loads(line)["question"] for line in PROMPTS.read_text().splitlines()[:count]]
    plain = PromptFormat()
    return [
        pair.request(i, [{"role": "user", "content": question}], i, new_tokens, plain, plain)
        for i, question in enumerate(questions)
    ]


@pytest.mark.parametrize("batch", [1, 16])
def test_decode(benchmark, request, device, pair, which, batch):
    new_tokens = NEW_TOKENS[which]
    requests = first_requests(pair, batch, new_tokens)
    if pair.theta.dtype == torch.float32:  # in half precision rounding moves a token now and then
        greedy = plain_loop(pair, requests, cached=True, greedy=True).tolist()
        assert [s.token_ids for s in own_loop(pair, requests, True, settings=Settings(temperature=0.0))] == greedy

    def generate(model, prompts):
        ids, mask = padded(prompts, device)
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        return lambda: model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, pad_token_id=0, **length)

    split, passes = {}, []

    def ours() -> None:
        with split_times(pair) as times:
            start = time.perf_counter()
            own_loop(pair, requests, True)
            passes.append((time.perf_counter() - start, {k: sum(s for _, s in v) for k, v in times.items() if v}))

    functions = {
        "qstar": ours,
        "cached loop, 20 bisections": lambda: plain_loop(pair, requests, cached=True),
        "generate, theta alone": generate(pair.theta, [r.ids_theta for r in requests]),
        "generate, t alone": generate(pair.t, [r.ids_t for r in requests]),
    }
    if which == "demo":  # hours with a large model
        functions["loop without cache, 20 bisections"] = lambda: plain_loop(pair, requests, cached=False)
    side_by_side(benchmark, functions, torch.device("cpu"))  # whole loops: by the clock on the wall
    for name in passes[0][1]:
        split[name] = [parts[name] for _, parts in passes]
    split["everything else"] = [total - sum(parts.values()) for total, parts in passes]
    names = ["demo theta", "demo t"]
    if which == "given":
        names = [Path(name).name for name in request.config.getoption("--pair")]
    benchmark.extra_info.update(
        kind="decode", batch=batch, tokens=batch * new_tokens, pair=names, vocab_size=pair.vocab_size, split=split
    )


def test_generation(benchmark, device):
    """A whole data set to its samples' ends: tokens up to EOS a second, where finished rows make room for others. On
    the demo pair, whose samples end."""
    pair, batch, new_tokens = Pair.from_pretrained(THETA, T, device=str(device)), 16, 64
    requests = first_requests(pair, 4 * batch, new_tokens)
    counts: dict[str, list[int]] = {"qstar": [], "qstar, 4 drafts": [], "cached loop, 20 bisections": []}

    def ours(name: str, **options) -> None:
        samples = own_loop(pair, requests, False, batch_size=batch, **options)
        counts[name].append(sum(len(s.token_ids) for s in samples))

    def plain() -> None:
        eos, total = torch.tensor(sorted(pair.eos_ids)), 0
        for start in range(0, len(requests), batch):
            tokens = plain_loop(pair, requests[start : start + batch], cached=True, to_the_limit=False).cpu()
            ended = torch.isin(tokens, eos)
            total += int((ended.cumsum(1) - ended.long() == 0).sum())
        counts["cached loop, 20 bisections"].append(total)

    functions = {
        "qstar": lambda: ours("qstar"),
        "qstar, 4 drafts": lambda: ours("qstar, 4 drafts", speculate=4),
        "cached loop, 20 bisections": plain,
    }
    side_by_side(benchmark, functions, torch.device("cpu"))
    tokens = {name: sum(values) / len(values) for name, values in counts.items()}
    benchmark.extra_info.update(kind="generation", batch=batch, samples=len(requests), tokens=tokens)
