"""`python -m qstar.serve` with the official `openai` client: what it answers, refuses, and survives."""

import asyncio
import json
import math
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from urllib.error import HTTPError

import pytest
import torch

pytest.importorskip(
    "vllm", reason="vLLM is not installed (pip install 'qstar[vllm]'); .ci/run tests it in its own environment"
)

import httpx
import psutil
from openai import AsyncOpenAI, BadRequestError, OpenAI, OpenAIError

from qstar.decode import FIELDS
from qstar.demo import PROMPTS
from qstar.prompting import PromptFormat
from qstar.serve import main

QUESTIONS = [json.loads(line)["question"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
LONG = " ".join(QUESTIONS[:7])  # several steps of the server's 64 tokens


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@contextmanager
def serving(folder):
    """A server on the demo pair whose steps take 64 tokens: its URL and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qstar.serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-num-batched-tokens", "64", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(256 << 20)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.time() + 180
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.time() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url):
    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


def check_choice(choice, sample) -> None:
    """A choice of a response against the sample of the transformers backend with the same seed."""
    assert choice.qstar["token_ids"] == sample.token_ids
    assert choice.qstar["error"] is None
    assert choice.finish_reason == ("length" if sample.finish_reason == "length" else "stop")
    for name in FIELDS:
        torch.testing.assert_close(
            torch.tensor(choice.qstar[name]), torch.tensor(sample.fields[name]), rtol=1e-4, atol=1e-4
        )


def test_chat_with_many_choices_and_logprobs(client, demo_pair):
    """Choice j has the noise of sample j, and logprobs are those of q*."""
    answer = client.chat.completions.create(
        model="qstar", messages=messages(QUESTIONS[0]), n=4, seed=3, max_tokens=24, logprobs=True, top_logprobs=3
    )
    expected = demo_pair.generate([QUESTIONS[0]], samples_per_prompt=4, seed=3, max_new_tokens=24).samples
    for choice, sample in zip(answer.choices, expected, strict=True):
        check_choice(choice, sample)
        assert choice.message.content == sample.text
        given = choice.logprobs.content
        assert [x.logprob for x in given] == pytest.approx(choice.qstar["logq"], abs=1e-4)
        for x in given:
            top = [other.logprob for other in x.top_logprobs]
            assert len(top) == 3
            assert max(top) >= x.logprob
            assert sum(math.exp(value) for value in {x.logprob, *top}) < 1 + 1e-5
    assert answer.usage.completion_tokens == sum(len(sample.token_ids) for sample in expected)
    assert not hasattr(answer.choices[0], "token_ids")


def test_stream(client, demo_pair):
    """The same answer in pieces; the numbers come where a choice ends, the usage last."""
    expected = demo_pair.generate([QUESTIONS[1]], samples_per_prompt=2, seed=5, max_new_tokens=24).samples
    texts, ends, usage = ["", ""], {}, None
    for part in client.chat.completions.create(
        model="qstar", messages=messages(QUESTIONS[1]), n=2, seed=5, max_tokens=24, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        usage = part.usage
        for choice in part.choices:
            assert choice.index not in ends
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason is not None:
                ends[choice.index] = choice
    assert texts == [sample.text for sample in expected]
    for index, sample in enumerate(expected):
        check_choice(ends[index], sample)
    assert usage.completion_tokens == sum(len(sample.token_ids) for sample in expected)


def test_completions_of_several_prompts(client, demo_pair):
    prompts = [QUESTIONS[2], LONG]
    options = {"samples_per_prompt": 2, "max_new_tokens": 12, "format_theta": PromptFormat("none")}
    expected = demo_pair.generate(prompts, seed=7, format_t=PromptFormat("none"), **options).samples
    answer = client.completions.create(model="qstar", prompt=prompts, n=2, seed=7, max_tokens=12)
    for choice, sample in zip(answer.choices, expected, strict=True):
        check_choice(choice, sample)
        assert choice.text == sample.text
    stopped = client.completions.create(model="qstar", prompt=prompts, n=2, seed=7, max_tokens=12, stop=["e"])
    for choice, sample in zip(stopped.choices, expected, strict=True):
        tokens = choice.qstar["token_ids"]
        assert tokens == sample.token_ids[: len(tokens)]
        assert "e" not in choice.text
        assert len(choice.qstar["logq"]) == len(tokens)


def test_which_q(client, demo_pair):
    """`qstar` in a request is the rule for α; temperature and truncation are OpenAI's and vLLM's own."""
    for rule, settings in (
        ({"method": "fixed", "alpha": 0}, {"temperature": 0}),
        ({"method": "ess_balance"}, {"temperature": 0.7, "top_p": 0.9}),
        ({"alpha_min": 0.4, "alpha_max": 0.6, "target_top_k": 20, "force_t_special_tokens": True}, {}),
    ):
        answer = client.chat.completions.create(
            model="qstar", messages=messages(QUESTIONS[3]), seed=2, max_tokens=16, **settings,
            extra_body={"qstar": rule},
        )  # fmt: skip
        expected = demo_pair.generate([QUESTIONS[3]], seed=2, max_new_tokens=16, **settings, **rule).samples
        check_choice(answer.choices[0], expected[0])


def test_without_a_seed_answers_differ(client):
    """Of 8 draws of 12 tokens at temperature 2 no two are equal; false alarms: below 1 in 10⁶."""
    answer = client.chat.completions.create(
        model="qstar", messages=messages(QUESTIONS[0]), n=4, max_tokens=12, temperature=2
    )
    again = client.chat.completions.create(
        model="qstar", messages=messages(QUESTIONS[0]), n=4, max_tokens=12, temperature=2
    )
    texts = [choice.message.content for choice in (*answer.choices, *again.choices)]
    assert len(set(texts)) == 8


def test_many_at_once_do_not_disturb_each_other(url, demo_pair):
    """Forty requests in flight, some of several steps' length: each as if it were alone."""
    questions = [QUESTIONS[i] if i % 4 else f"{LONG} {i}" for i in range(40)]
    expected = demo_pair.generate(questions, seeds=list(range(40)), max_new_tokens=12)

    async def ask() -> list:
        client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        return await asyncio.gather(
            *(
                client.chat.completions.create(model="qstar", messages=messages(q), seed=seed, max_tokens=12)
                for seed, q in enumerate(questions)
            )
        )

    for answer, sample in zip(asyncio.run(ask()), expected.samples, strict=True):
        check_choice(answer.choices[0], sample)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1}, "temperature must be non-negative"),
        ({"presence_penalty": 1.0}, "presence_penalty is set; a pair of models does not support it"),
        ({"response_format": {"type": "json_object"}}, "structured_outputs is set"),
        ({"max_tokens": 100_000}, "max_model_len=512"),
        ({"messages": []}, "empty conversation"),
        ({"messages": messages("x " * 2000)}, "512"),
        ({"extra_body": {"qstar": {"beta": 1}}}, "qstar_beta is unknown"),
        ({"extra_body": {"qstar": {"alpha": 3}}}, "alpha is 3; it must be in [0, 1]"),
        ({"extra_body": {"qstar": {"method": "best"}}}, "method is 'best'"),
        ({"extra_body": {"qstar": {"seed": 1}}, "n": 2}, "qstar_seed is that of one sample"),
        ({"n": "4"}, "n is '4'; it must be a whole number"),
        ({"extra_body": {"stop_token_ids": 5}}, "stop_token_ids"),
        ({"extra_body": {"qstar": 3}}, "qstar is 3; it must be an object"),
        ({"extra_body": {"use_beam_search": True}}, "use_beam_search is set"),
    ],
    ids=lambda wrong: str(wrong)[:40],
)
def test_a_wrong_request_is_answered_with_its_reason(client, wrong, said):
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(**{"model": "qstar", "messages": messages("Hi.")} | wrong)
    assert refused.value.status_code == 400
    assert said in refused.value.body["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": "qstar", "messages": [], "vllm_xargs": 1}'])
def test_a_body_that_is_no_request_is_answered_by_vllm(url, body):
    request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 400


def begun_until_the_kill(parts, begun: list[str], process) -> None:
    """Collects the parts of an answer and kills the server after ten of them."""
    for text in parts:
        begun.append(text)
        if len(begun) == 10:
            process.kill()


def test_a_kill_loses_nothing_that_was_answered(tmp_path):
    """What came before the kill is the beginning of what a new server answers; the old one leaves no process."""

    def parts(client):
        for part in client.chat.completions.create(
            model="qstar", messages=messages(LONG), seed=11, max_tokens=300, stream=True, temperature=2,
            extra_body={"ignore_eos": True},
        ):  # fmt: skip
            yield part.choices[0].delta.content or ""

    def whole(client):
        return client.chat.completions.create(model="qstar", messages=messages(QUESTIONS[0]), seed=1, max_tokens=24)

    with serving(tmp_path) as (url, process):
        client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        answered, begun = whole(client), []
        with pytest.raises((OpenAIError, httpx.HTTPError)):
            begun_until_the_kill(parts(client), begun, process)
        deadline = time.time() + 30
        while any(psutil.pid_exists(pid) for pid in family[1:]) and time.time() < deadline:
            time.sleep(0.1)
        assert not any(psutil.pid_exists(pid) for pid in family[1:])
    assert 10 <= len(begun) < 300
    with serving(tmp_path) as (url, _):
        client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        again = whole(client).choices[0]
        assert (again.message.content, again.qstar) == (answered.choices[0].message.content, answered.choices[0].qstar)
        assert "".join(parts(client)).startswith("".join(begun))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--alpha", "2"], "alpha is 2.0; it must be in [0, 1]"),
        (["--port", "x"], "argument --port"),
        (["--no-such-option"], "--no-such-option"),
        (["--model-theta", "./nothing", "--model-t", "./nothing"], "nothing does not exist"),
        (["--hf-overrides", "{}"], "--hf-overrides is not to be chosen"),
        (["--worker-cls", "x.Y"], "--worker-cls is not to be chosen"),
    ],
)
def test_a_wrong_command_line_is_met_by_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
