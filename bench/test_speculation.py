"""Speculative decoding: tokens a second for several numbers of drafts, beside what the cost model predicts."""

import copy
import statistics

import pytest
import torch

from bench.loops import own_loop, split_times
from bench.test_decode import first_requests
from bench.timing import side_by_side
from qstar import Pair
from qstar.demo import THETA, T
from qstar.experiments.pairs import enlarged

DRAFTS = (1, 2, 4, 8)


def predicted(acceptance: float, drafts: int, seconds: dict[tuple[str, int], float]) -> float:
    """Tokens a second over plain decoding's: theory/speculative.md, «What it gains». `seconds[what, n]` are those of a
    pass, or of a draw, for n tokens a row."""
    tokens = sum(acceptance**i for i in range(drafts + 1))
    plain = seconds["theta", 1] + seconds["t", 1] + seconds["q* step", 1]
    drafting = (drafts + 1) * seconds["theta", 1] + drafts * seconds["draft", 1]
    return tokens * plain / (drafting + seconds["t", drafts + 1] + seconds["q* step", drafts + 1])


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("times", [1, 8])
def test_speculation(benchmark, device, times, batch):
    pair = Pair.from_pretrained(THETA, T, device=str(device))
    pair = Pair(pair.theta, enlarged(pair.t, times), pair.tokenizer_theta, pair.tokenizer_t)
    requests = first_requests(pair, 2 * batch, 64)
    groups = [requests[:batch], requests[batch:]]

    def run(drafts):
        return [sample for group in groups for sample in own_loop(pair, group, False, speculate=drafts)]

    plain = run(0)
    tokens = sum(len(s.token_ids) for s in plain)
    tallies, medians = {}, {}
    for drafts in (0, *DRAFTS, "auto"):
        with split_times(pair) as times_of:
            samples = run(drafts)
        assert [s.token_ids for s in samples] == [s.token_ids for s in plain]
        tallies[drafts] = [s.tally for s in samples]
        for name, passes in times_of.items():
            for size in {size for size, _ in passes}:
                medians[name, size] = statistics.median(s for n, s in passes if n == size)
    predictions, acceptances = {}, {}
    for drafts in DRAFTS:
        drafted = sum(sum(t.drafted) for t in tallies[drafts])
        acceptances[str(drafts)] = sum(sum(t.accepted) for t in tallies[drafts]) / max(1, drafted)
        predictions[str(drafts)] = predicted(acceptances[str(drafts)], drafts, medians)
    functions = {f"{drafts} drafts": lambda k=drafts: run(k) for drafts in (0, *DRAFTS, "auto")}
    side_by_side(benchmark, functions, torch.device("cpu"))
    benchmark.extra_info.update(
        kind="speculation", batch=batch, times=times, tokens=tokens, predicted=predictions, acceptance=acceptances
    )


@pytest.mark.parametrize("batch", [1, 8, 16])
def test_twin(benchmark, device, batch):
    """One model with two prompts: both sides in one pass, against two copies of it in a pass each."""
    pair = Pair.from_pretrained(THETA, T, device=str(device))
    theta, tokenizer = pair.theta, pair.tokenizer_theta
    pairs = {"one pass": Pair(theta, theta, tokenizer, tokenizer)}
    pairs["two passes"] = Pair(theta, copy.deepcopy(theta), tokenizer, tokenizer)
    requests = first_requests(pair, batch, 32)
    texts = [[s.token_ids for s in own_loop(p, requests, True)] for p in pairs.values()]
    assert texts[0] == texts[1]
    functions = {name: lambda p=p: own_loop(p, requests, True) for name, p in pairs.items()}
    side_by_side(benchmark, functions, torch.device("cpu"), kind="twin", batch=batch, tokens=32 * batch)
