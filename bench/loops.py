"""Two-model decoding as people write it, and the clock that ours is taken apart with."""

import copy
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.competitors import research_step
from qstar.decode import Decoder
from qstar.pair import Pair
from qstar.rule import Rule
from qstar.sample import DecodeOptions, Request, Sample


def padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, int64 [B, L]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


@torch.inference_mode()
def plain_loop(
    pair: Pair, requests: list[Request], cached: bool, greedy: bool = False, to_the_limit: bool = True
) -> Tensor:
    """Sample each next token of one batch from q* by 20 bisections, with or without KV caches; until all rows have
    ended unless `to_the_limit`.

    Returns:
        tokens, int64 [B, new].
    """
    models = pair.theta, pair.t
    inputs = [
        padded([r.ids_theta for r in requests], pair.theta.device),
        padded([r.ids_t for r in requests], pair.t.device),
    ]
    caches, tokens = [None, None], []
    eos = torch.tensor(sorted(pair.eos_ids))
    ended = torch.zeros(len(requests), dtype=torch.bool)
    for step in range(requests[0].max_new_tokens):
        logits = []
        for i, model in enumerate(models):
            ids, mask = inputs[i]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            if cached and step:
                ids, positions = ids[:, -1:], positions[:, -1:]
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=caches[i], use_cache=cached
            )
            caches[i] = out.past_key_values if cached else None
            logits.append(out.logits[:, -1, : pair.vocab_size])
        logits[1] = logits[1].to(logits[0].device)
        if greedy:
            alpha = research_step(*logits)["alpha"][:, None]
            token = (alpha * logits[0].log_softmax(-1) + (1 - alpha) * logits[1].log_softmax(-1)).argmax(-1)
        else:
            token = research_step(*logits)["token"]
        tokens.append(token)
        ended |= torch.isin(token.cpu(), eos)
        if ended.all() and not to_the_limit:
            break
        inputs = [
            (torch.cat([ids, token[:, None].to(ids.device)], 1), torch.nn.functional.pad(mask, (0, 1), value=1))
            for ids, mask in inputs
        ]
    return torch.stack(tokens, 1)


def own_loop(pair: Pair, requests: list[Request], to_the_limit: bool, **options) -> list[Sample]:
    """Ours, in one batch unless `batch_size` says otherwise; `to_the_limit` draws all tokens asked for, past EOS."""
    if to_the_limit:
        pair = copy.copy(pair)
        pair.eos_ids = set()
    decoder = pair.decoder(DecodeOptions(**{"batch_size": len(requests)} | options))
    return sorted(decoder.run(requests), key=lambda s: s.request.key)


@contextmanager
def split_times(pair: Pair) -> Iterator[dict[str, list[tuple[int, float]]]]:
    """While open, gathers (tokens a row, seconds) of every forward pass, as `theta` and `t`, of every `q* step`, and of
    every draw of a `draft`."""
    times: dict[str, list[tuple[int, float]]] = {"theta": [], "t": [], "q* step": [], "draft": []}

    def timed(name: str, function: Callable, size: Callable[..., int]) -> Callable:
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            synchronise(pair)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronise(pair)
            times[name].append((size(*args, **kwargs), time.perf_counter() - start))
            return result

        return wrapper

    draft, step = Decoder._draft, Rule.step
    Decoder._draft = timed("draft", draft, lambda *args, **kwargs: 1)
    Rule.step = timed("q* step", step, lambda rule, logits, *args, seeds, **kwargs: len(logits) // len(seeds.unique()))
    for name in ("theta", "t"):
        model = getattr(pair, name)
        model.forward = timed(name, model.forward, lambda input_ids, **kwargs: input_ids.shape[1])
    try:
        yield times
    finally:
        Decoder._draft, Rule.step = draft, step
        for model in (pair.theta, pair.t):
            del model.forward  # the class's own again


def synchronise(pair: Pair) -> None:
    if pair.theta.device.type == "cuda":
        torch.cuda.synchronize()
