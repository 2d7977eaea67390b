"""Steps that are recorded and played: the CPU plays operators over the memory that they had, as a GPU plays kernels."""

import copy
import logging

import pytest
import torch
from test_decode import CONFIGS, MIXED, random_model
from test_loop import FROM_HOST, WAITS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from qstar import Pair, graphs
from qstar.decode import Decoder
from qstar.demo import THETA, T
from qstar_kernels import dispatch

OPTIONS = {"max_new_tokens": 24, "batch_size": 5, "seed": 3}


def places(tree) -> set[int]:
    """Where tensors have their memory."""
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


class Recorder(TorchDispatchMode):
    """The operators of a step, each with its own tensors: what a graph would launch again."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name in WAITS | FROM_HOST:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        out = function(*args, **(kwargs or {}))
        writes = any(x.alias_info is not None and x.alias_info.is_write for x in function._schema.returns)
        if writes or not places(out) & places((args, kwargs)):  # a view stays one
            self.made.append((function, args, kwargs or {}, out, writes))
        return out

    def play(self) -> None:
        for function, args, kwargs, out, in_place in self.made:
            again = function(*args, **kwargs)
            if not in_place:
                pairs = zip(*(tree_leaves(x) for x in (out, again)), strict=True)
                for old, new in pairs:
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)

    def of_kernels(self, plain):
        """A step of the sampler, whose kernels no operator shows."""

        def step(*args, **kwargs):
            def run():
                found, log_q = plain(*args, **kwargs)
                return [*vars(found).values(), log_q]

            with _disable_current_modes():
                found, log_q = plain(*args, **kwargs)
            self.made.append((run, (), {}, [*vars(found).values(), log_q], False))
            return found, log_q

        return step


@pytest.fixture(autouse=True)
def nothing_said():
    """What keeps steps from being recorded is said once in a process: here, once in a test."""
    graphs.say.cache_clear()
    yield
    graphs.say.cache_clear()


def play(monkeypatch) -> list[int]:
    """Have steps recorded, on this CPU and in windows of 32 columns: how often each was played."""
    counts = []

    def record(step, device, kept):
        recorder, plain = Recorder(), dispatch.step
        dispatch.step = recorder.of_kernels(plain)
        try:
            with recorder:
                numbers = step()
        finally:
            dispatch.step = plain
        counts.append(0)
        mine = len(counts) - 1

        def again():
            counts[mine] += 1
            recorder.play()

        return again, numbers

    plain = graphs.Graphs
    monkeypatch.setattr("qstar.decode.Graphs", lambda sides, draw: plain(sides, draw, record))
    monkeypatch.setattr(graphs, "COLUMNS", 32)
    monkeypatch.setattr(Decoder, "records", True)
    monkeypatch.setattr(Decoder, "waits", False)
    return counts


@pytest.fixture
def played(monkeypatch):
    return play(monkeypatch)


def close(found, wanted) -> None:
    """Same tokens and reasons, numbers up to rounding: the window's columns change the order of sums."""
    for mine, theirs in zip(found.samples, wanted.samples, strict=True):
        assert (mine.token_ids, mine.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        for name, values in mine.fields.items():
            torch.testing.assert_close(torch.tensor(values), torch.tensor(theirs.fields[name]), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 1},
        {"batch_size": 16, "max_new_tokens": 90},
        {"method": "kl_budget", "kl_budget": 0.02, "top_p": 0.9, "temperature": 0.8},
        {"force_t_first_token": True, "force_t_special_tokens": True, "stop": [" eggs"]},
        {"t_hints": ["Think of 12."] * len(MIXED)},
    ],
    ids=["plain", "one row", "many", "rule", "forced", "hints"],
)
def test_played_steps_draw_the_same(options, demo_pair, monkeypatch, played):
    options = OPTIONS | options
    found = demo_pair.generate(MIXED, **options)
    assert len(played) > 1
    assert sum(played) > 5 * len(played)
    monkeypatch.setattr(Decoder, "records", False)
    close(found, demo_pair.generate(MIXED, **options))


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(name, demo_pair, monkeypatch, played):
    """Those that transformers can compile whole are played, the others run as ever, and are said to."""
    model, other = (random_model(copy.deepcopy(CONFIGS[x]), seed) for x, seed in ((name, 3), ("llama", 4)))
    pair = Pair(model, other, demo_pair.tokenizer_theta, demo_pair.tokenizer_theta)
    found = pair.generate(MIXED, **OPTIONS)
    assert bool(played) == model._can_compile_fullgraph
    monkeypatch.setattr(Decoder, "records", False)
    close(found, pair.generate(MIXED, **OPTIONS))


def test_eager_attention(monkeypatch, played):
    pair = Pair.from_pretrained(THETA, T, attn_implementation="eager")
    found = pair.generate(MIXED, **OPTIONS)
    assert len(played) > 1
    monkeypatch.setattr(Decoder, "records", False)
    close(found, pair.generate(MIXED, **OPTIONS))


def test_adapters_in_one_pass_are_not_recorded(demo_pair, monkeypatch, played, caplog):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    model = peft.get_peft_model(copy.deepcopy(demo_pair.theta), peft.LoraConfig(init_lora_weights=False))
    pair = Pair.with_adapter(model.eval(), demo_pair.tokenizer_theta)
    found = pair.generate(MIXED, **OPTIONS)
    assert not played
    assert "on the host" in caplog.text
    monkeypatch.setattr(Decoder, "records", False)
    assert found.token_ids == pair.generate(MIXED, **OPTIONS).token_ids


def failing(step, device, kept):
    step()
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")


def wrong(step, device, kept):
    numbers = step()
    return lambda: None, numbers + 1


@pytest.mark.parametrize(("record", "said"), [(failing, "not permitted"), (wrong, "gives other numbers")])
def test_what_cannot_be_played_is_not(record, said, demo_pair, monkeypatch, caplog):
    """One line says so, and nothing is lost or drawn twice."""
    plain = graphs.Graphs
    monkeypatch.setattr("qstar.decode.Graphs", lambda sides, draw: plain(sides, draw, record))
    wanted = demo_pair.generate(MIXED, **OPTIONS)
    monkeypatch.setattr(Decoder, "records", True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            close(demo_pair.generate(MIXED, **OPTIONS), wanted)
    assert len(caplog.records) == 1
    assert said in caplog.text
    assert "\nand" not in caplog.text


def test_sizes_are_few():
    assert [graphs.in_sizes(n, 20) for n in (1, 2, 3, 5, 8, 9, 16, 17, 20)] == [1, 2, 4, 8, 8, 16, 16, 20, 20]


def test_only_auto_and_off(demo_pair):
    with pytest.raises(ValueError, match="'auto' or 'off'"):
        demo_pair.generate(MIXED[:1], cuda_graphs="on")
