"""The agent loop for verl, with verl's own classes where it is installed, by their protocol otherwise.

It wants another version of transformers than this package, so it is in no list of requirements here. Checked with verl
0.9.1: `pip install --no-deps verl==0.9.1` and what it imports.
"""

import asyncio
import importlib.util
import json
import sys
import threading
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import openai
import pytest
import torch

from qstar import Pair
from qstar.sample import DecodeOptions, Request
from qstar_kernels.types import FIELDS

HAS_VERL = importlib.util.find_spec("verl") is not None
ASKED = [{"role": "user", "content": "What is 2 + 3?"}]


def protocol() -> dict[str, ModuleType]:
    """What the loop uses of verl's module, as verl 0.9.1 has it."""

    @dataclass
    class AgentLoopOutput:
        prompt_ids: list[int]
        response_ids: list[int]
        response_mask: list[int]
        response_logprobs: list[float] | None = None
        num_turns: int = 0
        metrics: dict = field(default_factory=dict)
        extra_fields: dict = field(default_factory=dict)

        def as_dict(self) -> dict:
            found = asdict(self)
            return {
                "responses": torch.tensor(found["response_ids"]),
                "response_mask": torch.tensor(found["response_mask"]),
                "rollout_log_probs": torch.tensor(found["response_logprobs"]),
            }

    class AgentLoopBase:
        def __init__(self, trainer_config, server_manager, tokenizer, processor, dataset_cls, data_config, **kwargs):
            self.rollout_config = trainer_config.config.actor_rollout_ref.rollout
            self.tokenizer, self.processor = tokenizer, processor

        async def process_multi_modal_info(self, messages) -> dict:
            return {} if self.processor is None else {"images": [1]}

        async def ct_build_initial_tokens(self, messages) -> list[int]:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    module = ModuleType("verl.experimental.agent_loop.agent_loop")
    module.AgentLoopBase, module.AgentLoopOutput = AgentLoopBase, AgentLoopOutput
    module.register = lambda name: lambda kind: kind
    module.DictConfigWrap = SimpleNamespace
    names = ("verl", "verl.experimental", "verl.experimental.agent_loop")
    return {name: ModuleType(name) for name in names} | {module.__name__: module}


@pytest.fixture(scope="module")
def loops():
    """`qstar.integrations.verl`, and the module of verl's that it stands on."""
    theirs = "verl.experimental.agent_loop.agent_loop"
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_VERL:
            for name, module in protocol().items():
                patch.setitem(sys.modules, name, module)
        ours = importlib.import_module("qstar.integrations.verl")
        yield ours, sys.modules[theirs]
        sys.modules.pop("qstar.integrations.verl", None)


@pytest.fixture(scope="module")
def server(demo_pair: Pair):
    """A server that answers `/v1/completions` as `qstar.serve` does, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(said | {"authorization": self.headers["Authorization"]})
            settings = said["qstar"] | {name: said[name] for name in ("temperature", "top_p") if name in said}
            decoder = demo_pair.decoder(DecodeOptions.of(**settings))
            (sample,) = decoder.run([Request(0, said["prompt"], said["prompt"], 7, said["max_tokens"])])
            numbers = {"token_ids": sample.token_ids, **sample.fields, "weights_version": "3", "error": sample.error}
            choice = {"index": 0, "text": sample.text, "finish_reason": "stop", "qstar": numbers}
            body = json.dumps(
                {"id": "x", "object": "text_completion", "created": 0, "model": "qstar", "choices": [choice]}
            )
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked
    http.shutdown()


def loop_of(loops, tokenizer, **options):
    """An agent loop as verl's worker makes one, inside of a running event loop."""
    ours, theirs = loops
    rollout = {"prompt_length": 64, "response_length": 12}
    config = {"actor_rollout_ref": {"rollout": rollout}}
    if not HAS_VERL:
        config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(**rollout)))
        data = SimpleNamespace(config=SimpleNamespace())
    else:
        from omegaconf import OmegaConf

        config, data = OmegaConf.create(config), theirs.DictConfigWrap(OmegaConf.create({}))
    return ours.QStarAgentLoop(
        trainer_config=theirs.DictConfigWrap(config=config),
        server_manager=None,
        tokenizer=tokenizer,
        processor=options.pop("processor", None),
        dataset_cls=None,
        data_config=data,
        **options,
    )


PARAMS = {"temperature": 0.9, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}


def run(loops, tokenizer, params=PARAMS, **options):
    async def run():
        return await loop_of(loops, tokenizer, **options).run(dict(params), raw_prompt=ASKED, index=3)

    return asyncio.run(run())


def test_log_q_is_what_verl_gets(loops, server, demo_pair):
    url, asked = server
    tokenizer = demo_pair.tokenizer_theta
    output = run(loops, tokenizer, base_url=url, rule={"method": "fixed", "alpha": 0.3}, api_key="k")
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert output.prompt_ids == asked[-1]["prompt"] == ids
    assert asked[-1]["authorization"] == "Bearer k"
    assert (asked[-1]["temperature"], asked[-1]["top_k"], asked[-1]["max_tokens"]) == (0.9, -1, 12)
    decoder = demo_pair.decoder(DecodeOptions.of(method="fixed", alpha=0.3, temperature=0.9))
    (sample,) = decoder.run([Request(0, ids, ids, 7, 12)])
    assert output.response_ids == sample.token_ids
    assert output.response_logprobs == pytest.approx(sample.fields["logq"])
    assert output.response_mask == [1] * len(sample.token_ids)
    found = output.as_dict()
    torch.testing.assert_close(found["rollout_log_probs"], torch.tensor(sample.fields["logq"]))
    assert output.extra_fields["qstar_weights_version"] == "3"
    for name in set(FIELDS) - {"logq"}:
        assert output.extra_fields[f"qstar_{name}"] == pytest.approx(sample.fields[name])


if HAS_VERL:

    def test_verls_correction_weighs_by_log_q(loops, server, demo_pair):
        """π_old/q*, token by token: with another log q* the weights are others."""
        from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

        output = run(loops, demo_pair.tokenizer_theta, base_url=server[0])
        mask = torch.tensor([output.response_mask])
        logp, logq = torch.tensor([output.extra_fields["qstar_logp_theta"]]), torch.tensor([output.response_logprobs])
        weights = []
        for of_rollout in (logq, logq - 0.1):
            found = compute_rollout_correction_and_rejection_mask(
                old_log_prob=logp, rollout_log_prob=of_rollout, response_mask=mask, rollout_is="token",
                rollout_is_threshold=1e6,
            )  # fmt: skip
            weights.append(found[0].batch["rollout_is_weights"])
        torch.testing.assert_close(weights[0], (logp - logq).exp(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[1], (logp - logq + 0.1).exp(), rtol=1e-4, atol=1e-5)


def test_what_is_refused(loops, server, demo_pair):
    url, _ = server
    with pytest.raises(ValueError, match=r"repetition_penalty is 1\.2"):
        run(loops, demo_pair.tokenizer_theta, PARAMS | {"repetition_penalty": 1.2}, base_url=url)
    with pytest.raises(openai.OpenAIError):
        run(loops, demo_pair.tokenizer_theta, base_url="http://127.0.0.1:9/v1")
