"""The decoding loop leaves its device alone: no step waits for it, and rows come and go without their neighbours."""

import copy
import random
from collections import Counter

import pytest
import torch
from rows import chosen_seed
from test_decode import CONFIGS, MIXED, QUESTIONS, random_model
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from qstar import Pair
from qstar.cache import Side
from qstar.decode import Decoder
from qstar.slots import Slots, closed_up
from qstar_kernels.types import FIELDS

FEW = MIXED[6:]  # one of them long

# What makes the host wait for a device, or copies from pageable memory to it
WAITS = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "unique_dim", "_unique2"}
TO_HOST = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
FROM_HOST = {"lift_fresh", "scalar_tensor"}


class Operators(TorchDispatchMode):
    """Counts waits of a step's operators, as they would be on a GPU."""

    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        masks = [x for x in torch.utils._pytree.tree_leaves(args[1:2]) if isinstance(x, torch.Tensor)]
        if name in WAITS | FROM_HOST or (name in ("index", "index_put_") and any(x.dtype == torch.bool for x in masks)):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Counts those of tensors' methods that no operator shows."""

    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = (resolve_name(function) or "").rsplit(".", 1)[-1]
        kwargs = kwargs or {}
        to_host = name == "to" and "cpu" in args[1:]  # by its name: here all devices are the CPU
        if name in TO_HOST or (to_host and not kwargs.get("non_blocking")):
            self.found[name] += 1
        elif to_host:
            self.found["sent"] += 1
        return function(*args, **kwargs)


def watched(monkeypatch) -> tuple[Counter, list]:
    """What is found in all rounds of a decoder, as if it did not wait: counts, and an entry a round."""
    found, calls, plain = Counter(), [], Decoder._round

    def watch(*args, **kwargs):
        calls.append(1)
        # what a rule brings to the device once is no part of a round
        args[0].rule._special(args[1].state.device)
        with Methods(found), Operators(found):
            return plain(*args, **kwargs)

    monkeypatch.setattr(Decoder, "waits", False)
    monkeypatch.setattr(Decoder, "_round", watch)
    return found, calls


def test_the_watch_sees_what_waits():
    x, found = torch.arange(4), Counter()
    with Methods(found), Operators(found):
        bool(x[0] > 0)
        x.tolist()
        x[x > 1].sum()
        x.nonzero()
        torch.tensor([1, 2])
        torch.equal(x, x)
        x.to("cpu")
        x.to("cpu", non_blocking=True)
    assert {"__bool__", "tolist", "index", "nonzero", "lift_fresh", "equal", "to", "sent"} <= found.keys()


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("name", ["demo", "hint", "forced", "gemma3-mixed"])
def test_a_step_does_not_wait(name, speculate, demo_pair, monkeypatch):
    """No step, whatever rows are in it, asks the device for anything: its numbers are sent in one piece, and read after
    the next step is on its way; with drafts they are read before it."""
    pair, options = demo_pair, {"speculate": speculate, "max_new_tokens": 12, "batch_size": 3}
    if name == "hint":
        pair = Pair(pair.theta, pair.theta, pair.tokenizer_theta, pair.tokenizer_theta)
        options |= {"t_hints": [f"{len(x)} letters" for x in FEW]}
    elif name == "forced":
        options |= {"force_t_first_token": True, "force_t_special_tokens": True}
    elif name != "demo":
        models = [random_model(copy.deepcopy(CONFIGS[name]), seed) for seed in (3, 4)]
        pair = Pair(*models, pair.tokenizer_theta, pair.tokenizer_theta)
    found, calls = watched(monkeypatch)
    pair.generate(FEW, **options)
    assert len(calls) > (5 if speculate else 12)
    # with drafts these too, and now and then how far the draft model is from q*
    assert len(calls) * (2 if speculate else 1) <= found.pop("sent") <= len(calls) * (3 if speculate else 1)
    assert found == {}


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 16, "temperature": 0.0},
        {"stop": [" eggs", "####"], "batch_size": 5},
        {"max_new_tokens": 2, "batch_size": 3},
        {"t_hints": ["Think of 12."] * len(MIXED), "force_t_first_token": True, "force_t_special_tokens": True},
        {"speculate": 3},
    ],
)
def test_ends_that_are_seen_late_change_nothing(demo_pair, options, monkeypatch):
    """Each sample, its numbers and its end, and no more than one pass over what lies behind an end."""
    options = {"max_new_tokens": 20, "batch_size": 4, "seed": 3} | options
    read, forward = [], demo_pair.theta.forward

    def counting(**inputs):
        read.append(inputs["input_ids"].shape[0])
        return forward(**inputs)

    monkeypatch.setattr(demo_pair.theta, "forward", counting)
    at_once = demo_pair.generate(MIXED, **options)
    rows, _ = sum(read), read.clear()
    monkeypatch.setattr(Decoder, "waits", False)
    late = demo_pair.generate(MIXED, **options)
    assert late.token_ids == at_once.token_ids
    assert late.texts == at_once.texts
    assert late.finish_reasons == at_once.finish_reasons
    for a, b in zip(late.samples, at_once.samples, strict=True):
        for field in FIELDS:
            assert a.fields[field] == pytest.approx(b.fields[field], abs=1e-3, rel=1e-3)
    if "speculate" not in options:
        ended = sum(reason in ("eos", "stop") for reason in late.finish_reasons)
        assert rows <= sum(read) <= rows + ended


def test_a_late_row_without_a_distribution_fails_alone(demo_pair, monkeypatch):
    monkeypatch.setattr(Decoder, "waits", False)
    broken = copy.deepcopy(demo_pair.t)
    word = demo_pair.tokenizer_theta.encode(" has", add_special_tokens=False)[0]
    weight = broken.get_input_embeddings().weight.detach().clone()
    weight[word] = torch.nan
    broken.set_output_embeddings(torch.nn.Linear(128, 2048, bias=False).eval())
    broken.get_output_embeddings().weight.data = demo_pair.t.get_output_embeddings().weight.data
    broken.get_input_embeddings().weight = torch.nn.Parameter(weight)
    pair = Pair(demo_pair.theta, broken, demo_pair.tokenizer_theta, demo_pair.tokenizer_t)
    # those whose prompts have the word fail at once, others where they draw it; newcomers take their slots
    options = {"max_new_tokens": 16, "batch_size": 3, "seed": 1}
    out, good = pair.generate(QUESTIONS[:12], **options), demo_pair.generate(QUESTIONS[:12], **options)
    assert {"error"} < set(out.finish_reasons)
    for a, b in zip(out.samples, good.samples, strict=True):
        assert a.token_ids == b.token_ids[: len(a.token_ids)]
        if a.finish_reason != "error":
            assert a.token_ids == b.token_ids


def test_closed_up():
    chosen = random.Random(chosen_seed())
    for _ in range(200):
        count = chosen.randrange(1, 20)
        leaving = set(chosen.sample(range(count), chosen.randrange(count + 1)))
        rows = closed_up(count, leaving)
        assert sorted(rows) == [row for row in range(count) if row not in leaving]
        assert all(row == i or (i in leaving and row > i) for i, row in enumerate(rows))


@torch.inference_mode()
def test_slots_are_taken_whatever_was_in_them(demo_pair):
    """Rows that come and go at random, shorter and longer ones, into slots that hold NaN: each reads on as if alone."""
    chosen = random.Random(chosen_seed())
    side, texts = Side(demo_pair.theta, 0, ("theta",)), []
    side.expects = 8
    for _ in range(40):
        if len(texts) < 6 and chosen.random() < 0.5:
            new = [
                chosen.choices(range(5, 2000), k=chosen.choice((1, 3, 20, 90))) for _ in range(chosen.randrange(1, 3))
            ]
            for x in side.slots.memory.values():  # what no row has
                if x.is_floating_point():
                    x[len(texts) :] = torch.nan
            side.prefill(new)
            texts += new
        if texts and chosen.random() < 0.4:
            rows = closed_up(len(texts), set(chosen.sample(range(len(texts)), chosen.randrange(len(texts)))))
            side.keep(rows)
            texts = [texts[row] for row in rows]
        if texts:
            tokens = torch.randint(5, 2000, (len(texts), chosen.choice((1, 1, 4))))
            (logits,) = side.advance(tokens)
            texts = [text + new.tolist() for text, new in zip(texts, tokens, strict=True)]
            for row, text in enumerate(texts):
                plain = demo_pair.theta(torch.tensor([text]), use_cache=False).logits[0, -1]
                torch.testing.assert_close(logits[row, -1], plain, rtol=0, atol=2e-4)
            if tokens.shape[1] > 1:
                counts = [chosen.randrange(4) for _ in texts]
                side.forget(counts)
                texts = [text[: len(text) - n] for text, n in zip(texts, counts, strict=True)]


def test_memory_is_one_cache_and_stays_where_it_is(demo_pair, monkeypatch):
    """No row's leaving moves more than one row, and no prompt's coming any: the keys of a batch are made room for once,
    and a quarter of it again as long as rows outgrow it."""
    moved, made, sides, put, move = [], [], [], Slots.put, Slots.move
    monkeypatch.setattr(Slots, "put", lambda self, *args: moved.append(1) or put(self, *args))
    monkeypatch.setattr(Slots, "move", lambda self, *args: made.append(self) or move(self, *args))
    plain = Decoder.sides
    monkeypatch.setattr(Decoder, "sides", lambda self, **kwargs: sides.append(plain(self, **kwargs)) or sides[-1])
    prompts = QUESTIONS[:24]
    out = demo_pair.generate(prompts, max_new_tokens=40, batch_size=8)
    (of_run,) = sides
    assert len(moved) <= 2 * len(prompts)
    assert len(made) <= 2 * 3
    longest = max(len(s.request.ids_t) + len(s.token_ids) for s in out.samples)
    for side in of_run:
        slots, columns = side.slots.size
        assert slots == 8
        assert columns <= longest + longest // 8 + 64
        assert {x.shape[0] for x in side.slots.memory.values()} == {slots}
        held = sum(x.numel() for x in side.slots.memory.values() if x.is_floating_point())
        config = side.model.config
        assert held == 2 * config.num_hidden_layers * slots * columns * config.num_key_value_heads * config.head_dim
