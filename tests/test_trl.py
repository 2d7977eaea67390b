"""q* in trl's trainers: what is drawn, by which weights, and that the loss depends on log q*."""

import inspect
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from qstar import Pair
from qstar.demo import PROMPTS, THETA, T
from qstar.integrations.trl import QStarDistillation, QStarGRPO, QStarRollout, QStarWeights, annealed
from qstar.sample import DecodeOptions
from qstar_kernels import qstar_logprobs

CONFIG = {
    "per_device_train_batch_size": 8,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
}
QUESTIONS = [json.loads(line)["question"] for line in PROMPTS.read_text().splitlines()[:8]]
DATA = Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in QUESTIONS])


class GRPO(QStarGRPO, GRPOTrainer):
    pass


class Distillation(QStarDistillation, DistillationTrainer):
    pass


def model(folder=THETA) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def length(completions, **_) -> list[float]:
    return [float(len(c[0]["content"])) for c in completions]


def grpo(tmp_path, rollout, kind=GRPO, steps=1, reward=length, of=None, **config) -> GRPOTrainer:
    args = GRPOConfig(
        str(tmp_path), **CONFIG | {"max_steps": steps, "num_generations": 4, "gradient_checkpointing": False} | config
    )
    return kind(of or model(), reward, args=args, train_dataset=DATA, rollout_func=rollout, processing_class=TOKENIZER)


TOKENIZER = AutoTokenizer.from_pretrained(THETA)


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Shifted(QStarRollout):
    """log q* with an error."""

    shift = 0.1

    def __call__(self, prompts, trainer):
        found = super().__call__(prompts, trainer)
        return found | {"logprobs": [[x + self.shift for x in row] for row in found["logprobs"]]}


@pytest.mark.parametrize(("kind", "depends"), [(GRPO, True), (GRPOTrainer, False)])
def test_loss_and_gradient_depend_on_log_q(tmp_path, kind, depends):
    """As they do not in trl alone, which drops what the rollout returned."""
    found = []
    for rollout in (QStarRollout, Shifted):
        trainer = grpo(tmp_path, rollout(str(T)), kind)
        trainer.train()
        found.append([logged(trainer, name)[0] for name in ("loss", "grad_norm")])
    (loss, gradient), (other_loss, other_gradient) = found
    if depends:
        assert abs(loss - other_loss) > 1e-3
        assert abs(gradient - other_gradient) > 1e-3 * gradient
    else:
        assert found[0] == found[1]


def test_the_gradient_is_that_of_the_weighted_tokens(tmp_path):
    """Of π_θ/q* times the advantage, token by token, where nothing is clipped."""
    options = {"epsilon": 1e6, "loss_type": "dapo", "scale_rewards": "none", "num_iterations": 1}
    trainer = grpo(tmp_path, QStarRollout(str(T)), **options)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    other = model().train()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = other(ids, attention_mask=mask, position_ids=position_ids).logits[
        :, -inputs["completion_ids"].shape[1] - 1 : -1
    ]
    logp = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    kept = inputs["completion_mask"]
    ratio = (logp - inputs["sampling_per_token_logps"]).exp()
    wanted = -(ratio * inputs["advantages"][:, None] * kept).sum() / kept.sum()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    for p, x in zip(trainer.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, x.grad, rtol=1e-3, atol=1e-4)


def test_on_policy_it_is_trls_own_step(tmp_path):
    """With α = 1 q* is π_θ, and the ratio 1 but for rounding."""
    found = []
    for kind in (GRPO, GRPOTrainer):
        trainer = grpo(tmp_path, QStarRollout(str(T), method="fixed", alpha=1.0), kind)
        trainer.train()
        found.append([logged(trainer, name)[0] for name in ("loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)


def check_rows(outputs: list[dict], theta, t, temperature: float = 1.0) -> None:
    """log q* of each token is what both models' plain forward passes give."""
    for prompt, answer, logq in zip(
        *(outputs[0][n] for n in ("prompt_ids", "completion_ids", "logprobs")), strict=True
    ):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            rows = [m(ids).logits[0, len(prompt) - 1 : -1] for m in (theta, t)]
        wanted, _ = qstar_logprobs(*rows, temperature=temperature)
        wanted = wanted.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logq), wanted.float(), atol=1e-4, rtol=1e-4)


class Noted(QStarRollout):
    """Notes what it returned, and another model with the weights that π_θ had."""

    def __call__(self, prompts, trainer):
        found, theta = super().__call__(prompts, trainer), model().eval()
        theta.load_state_dict(trainer.model.state_dict())
        self.noted = [*getattr(self, "noted", []), (found, theta)]
        return found


def test_completions_are_drawn_by_the_weights_of_their_step(tmp_path):
    rollout = Noted(str(T))
    trainer = grpo(tmp_path, rollout, steps=2, temperature=0.8)
    trainer.train()
    assert rollout.pair.theta is trainer.model
    teacher = model(T).eval()
    for output, theta in rollout.noted:
        check_rows([output], theta, teacher, temperature=0.8)
    first, second = (torch.nn.utils.parameters_to_vector(m.parameters()) for _, m in rollout.noted)
    assert not torch.equal(first, second)
    # rows of one prompt have noise of their own, and so have steps
    assert len({tuple(ids) for output, _ in rollout.noted for ids in output["completion_ids"]}) > 8


def test_a_run_again_draws_the_same(tmp_path):
    found = []
    for _ in range(2):
        rollout = Noted(str(T))
        grpo(tmp_path, rollout, steps=2).train()
        found.append([output["completion_ids"] for output, _ in rollout.noted])
    assert found[0] == found[1]


def test_the_base_of_the_trainers_adapter_is_the_target(tmp_path):
    """One set of weights; with dropout, gradient checkpointing and a reference model of trl's own."""
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, task_type="CAUSAL_LM")
    rollout = QStarRollout()
    args = GRPOConfig(
        str(tmp_path), **CONFIG | {"max_steps": 3, "num_generations": 4, "beta": 0.1, "learning_rate": 0.05}
    )
    assert args.gradient_checkpointing
    trainer = GRPO(
        model(),
        length,
        args=args,
        train_dataset=DATA,
        rollout_func=rollout,
        peft_config=lora,
        processing_class=TOKENIZER,
    )
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    kl = logged(trainer, "qstar/kl_theta")
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 1e-4  # π_θ has moved away from its base
    assert rollout.pair.theta.peft is rollout.pair.t.peft is trainer.model
    assert rollout.pair.in_one_pass is not None
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


def test_schedules_follow_the_trainers_step(tmp_path):
    rollout = QStarRollout(str(T), method="fixed", schedule={"alpha": annealed(0.2, 1.0, 2)})
    trainer = grpo(tmp_path, rollout, steps=4)
    trainer.train()
    assert logged(trainer, "qstar/alpha") == pytest.approx([0.2, 0.6, 1.0, 1.0])


def test_numbers_reach_rewards_and_evaluation_is_on_policy(tmp_path):
    seen = []

    def reward(completion_ids, qstar_alpha, qstar_kl_theta, qstar_ess_t, **_):
        seen.append(qstar_alpha)
        assert [len(x) for x in completion_ids] == [len(x) for x in qstar_kl_theta] == [len(x) for x in qstar_ess_t]
        return [-sum(x) / len(x) for x in qstar_kl_theta]

    trainer = grpo(tmp_path, QStarRollout(str(T)), reward=reward, per_device_eval_batch_size=8)
    trainer.train()
    assert 0 < min(min(x) for x in seen[0]) < 1
    assert -logged(trainer, "reward")[0] == pytest.approx(logged(trainer, "qstar/kl_theta")[0], rel=0.3)
    metrics = trainer.evaluate(DATA)
    assert {x for row in seen[-1] for x in row} == {1.0}
    assert "eval_loss" in metrics


def test_what_the_teacher_sees(tmp_path):
    def hinted(prompt):
        return [{"role": "user", "content": prompt[0]["content"] + " Answer in words."}]

    rollout = Noted(str(T), prompt_t=hinted)
    grpo(tmp_path, rollout).train()
    (output, theta), teacher = rollout.noted[0], model(T).eval()
    prompt, answer = output["prompt_ids"][0], output["completion_ids"][0]
    text = TOKENIZER.decode(prompt).split("<|user|>\n")[1].split("<|end|>")[0]
    seen = TOKENIZER.apply_chat_template(
        hinted([{"content": text}]), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    with torch.inference_mode():
        logits = [
            m(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]
            for m, ids in ((theta, prompt), (teacher, seen))
        ]
    logp_t = logits[1].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(output["qstar_logp_t"][0]), logp_t, atol=1e-4, rtol=1e-4)


def test_distillation_on_completions_of_q(tmp_path):
    config = DistillationConfig(
        str(tmp_path), **CONFIG | {"max_steps": 2, "beta": 1.0, "gradient_checkpointing": False}
    )
    trainer = Distillation(model(), model(T), args=config, train_dataset=DATA, processing_class=TOKENIZER)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2
    assert all(0 < alpha < 1 for alpha in logged(trainer, "qstar/alpha"))
    assert trainer.rollout.pair.theta is trainer.model
    assert trainer.rollout.pair.t is trainer.teacher_model
    # what is drawn is what the pair's own loop draws
    trainer.model.train()
    ids = [TOKENIZER("What is 2 + 3?")["input_ids"]]
    (sample,) = trainer.rollout.draw(trainer, ids)
    assert trainer.model.training
    theta = model().eval()
    theta.load_state_dict(trainer.model.state_dict())
    other = Pair(theta, model(T).eval(), TOKENIZER, TOKENIZER)
    decoder = other.decoder(DecodeOptions())
    (wanted,) = decoder.run([sample.request])
    assert wanted.token_ids == sample.token_ids


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temprature": 1.0}, "temprature"),
        ({"top_p": -1.0}, "top_p"),
        ({"schedule": {"beta": annealed(0, 1, 2)}}, "schedule has 'beta'"),
        ({"schedule": {"alpha": annealed(0, 1, 2)}}, "alpha goes with method fixed, and it is kl_symmetry"),
        ({"schedule": {"kl_budget": annealed(1, 0, 2)}}, "with method kl_budget or kl_budget_t"),
        ({"schedule": {"temperature": annealed(-1.0, 1, 2)}}, "temperature"),
        ({"teacher": "x", "adapter_t": "y"}, "both given"),
    ],
)
def test_rollouts_that_are_refused(options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        QStarRollout(**options)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path):
    """The tokenizer is looked up where the teacher was loaded from."""
    model(T).save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    other = json.loads(path.read_text())
    vocab = other["model"]["vocab"]
    vocab["the"], vocab["fi"] = vocab["fi"], vocab["the"]
    path.write_text(json.dumps(other))
    for teacher in (str(tmp_path / "teacher"), model(tmp_path / "teacher")):
        with pytest.raises(ValueError, match="the tokenizers differ"):
            grpo(tmp_path, QStarRollout(teacher)).train()


def test_trainers_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher is missing"):
        grpo(tmp_path, QStarRollout()).train()
    with pytest.raises(ValueError, match=r"repetition_penalty is 1\.1"):
        grpo(tmp_path, QStarRollout(str(T)), repetition_penalty=1.1).train()
    with pytest.raises(ValueError, match="generation_kwargs has typical_p"):
        grpo(tmp_path, QStarRollout(str(T)), generation_kwargs={"typical_p": 0.5}).train()
    with pytest.raises(ValueError, match="without log-probabilities"):
        grpo(tmp_path, None).train()
    with pytest.raises(ValueError, match="steps is 0"):
        annealed(0.0, 1.0, 0)


OF_A_RANK = """
import hashlib, json, sys
from pathlib import Path

import grpo

from qstar.integrations.trl import QStarRollout

seeds, draw = [], QStarRollout.draw

def recorded(self, *args):
    samples = draw(self, *args)
    seeds.extend(s.request.seed for s in samples)
    return samples

QStarRollout.draw = recorded
trainer = grpo.main([sys.argv[1], "--steps", "2"])
weights = b"".join(p.detach().numpy().tobytes() for p in trainer.accelerator.unwrap_model(trainer.model).parameters())
found = {"processes": trainer.accelerator.num_processes, "seeds": seeds, "weights": hashlib.sha256(weights).hexdigest()}
Path(sys.argv[1], f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow  # two processes that each import torch and trl
def test_two_processes_draw_by_their_own_noise_and_end_with_the_same_weights(tmp_path):
    script, root = tmp_path / "of_a_rank.py", Path(__file__).parents[1]
    script.write_text(OF_A_RANK)
    paths = os.pathsep.join(map(str, (root, root / "examples")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*command, script, tmp_path / "out"],
        check=True,
        timeout=300,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    one, other = (json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one["processes"] == other["processes"] == 2
    assert one["weights"] == other["weights"]
    assert len({*one["seeds"], *other["seeds"]}) == len(one["seeds"] + other["seeds"]) == 128


def test_weights_for_the_asynchronous_trainer():
    """They fit trl's protocol; a server that does not answer, or takes no weights, is said to (tests/test_serve.py has
    one that does)."""
    from trl.experimental.async_grpo.async_grpo_trainer import WeightTransferProtocol

    wanted = {name: x for name, x in vars(WeightTransferProtocol).items() if not name.startswith("_")}
    assert len(wanted) == 5
    for name, method in wanted.items():
        assert [*inspect.signature(getattr(QStarWeights, name)).parameters] == [*inspect.signature(method).parameters]


class Deaf(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_a_server_without_weights_is_told_from_none(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Deaf)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(ValueError, match="--allow-weight-updates"):
        QStarWeights(url, tmp_path).init_weight_transfer()
    server.shutdown()
    server.server_close()
    with pytest.raises(TimeoutError, match=r"no answer from .* in 0.1 s"):
        QStarWeights(url, tmp_path, timeout=0.1).init_weight_transfer()
