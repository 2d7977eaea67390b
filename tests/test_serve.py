"""`python -m qstar.serve` with the official `openai` client: what it answers, refuses, and survives."""

import asyncio
import json
import math
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "vllm", reason="vLLM is not installed (pip install 'qstar[vllm]'); .ci/run tests it in its own environment"
)

import httpx
import psutil
from openai import AsyncOpenAI, BadRequestError, OpenAI, OpenAIError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from qstar import Pair
from qstar.demo import PROMPTS, THETA, T
from qstar.experiments.pairs import moved
from qstar.integrations.trl import QStarWeights
from qstar.prompting import PromptFormat
from qstar.serve import main
from qstar_kernels.types import FIELDS

QUESTIONS = [json.loads(line)["question"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
LONG = " ".join(QUESTIONS[:7])  # several steps of the server's 64 tokens
SIZES = ["--max-num-batched-tokens", "64", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(256 << 20)]
PREFIX, KEY = "/behind/a/proxy", "sesame"


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(folder, *options: str):
    """A server on the demo pair whose steps take 64 tokens: its URL and its process."""
    port = free_port()
    command = [sys.executable, "-m", "qstar.serve", "--host", "127.0.0.1", "--port", str(port), *SIZES, *options]
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
    options = ["--root-path", PREFIX, "--api-key", KEY, "--allowed-origins", '["*"]', "--enable-scale-out"]
    with serving(tmp_path_factory.mktemp("server"), *options) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url):
    return OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def http(url):
    """For what the official client does not send."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", "Origin": "http://a.page"}
    with httpx.Client(base_url=url.removesuffix("/v1"), headers=headers, timeout=120) as client:
        yield client


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
    assert answer.choices[0].token_ids is None


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


def test_prompts_of_tokens(client, demo_pair):
    expected = demo_pair.generate([QUESTIONS[2]], seed=7, max_new_tokens=12).samples
    answer = client.completions.create(
        model="qstar", prompt=expected[0].request.ids_theta, seed=7, max_tokens=12, extra_body={"top_k": -1}
    )
    check_choice(answer.choices[0], expected[0])


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
        client = AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120)
        return await asyncio.gather(
            *(
                client.chat.completions.create(model="qstar", messages=messages(q), seed=seed, max_tokens=12)
                for seed, q in enumerate(questions)
            )
        )

    for answer, sample in zip(asyncio.run(ask()), expected.samples, strict=True):
        check_choice(answer.choices[0], sample)


def weights_of(folder: Path, distances: Iterable[float]) -> dict[str, Path]:
    """Folders with π_θ moved towards π_t, by the versions that they get."""
    theta, t = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (THETA, T))
    folders = {}
    for i, distance in enumerate(distances):
        folders[f"step {i}"] = folder / str(i)
        moved(theta, t, distance).save_pretrained(folders[f"step {i}"])
        AutoTokenizer.from_pretrained(THETA).save_pretrained(folders[f"step {i}"])
    return folders


def test_new_weights_under_load(tmp_path):
    """64 requests in flight and 5 updates: every answer is that of the weights it names, old prefixes included."""
    folders = weights_of(tmp_path, (0.2, -0.2, 0.5, 0.9, 0.0))
    with serving(tmp_path, "--allow-weight-updates", "--api-key", KEY) as (url, _):
        answers, went_out = {}, count()

        async def ask(client: AsyncOpenAI, until: asyncio.Event) -> None:
            while not until.is_set():
                i = next(went_out)
                answers[i] = await client.chat.completions.create(
                    model="qstar", messages=messages(QUESTIONS[i % 8]), seed=i, max_tokens=12
                )

        async def some_of(version: str) -> None:
            while sum(x.choices[0].qstar["weights_version"] == version for x in list(answers.values())) < 8:
                await asyncio.sleep(0.05)

        async def update() -> None:
            done = asyncio.Event()
            headers = {"Authorization": f"Bearer {KEY}"}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as http:
                client = AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120)
                asking = [asyncio.create_task(ask(client, done)) for _ in range(64)]
                for before, (version, folder) in zip(["0", *folders], folders.items(), strict=False):
                    await some_of(before)
                    got = await http.post("/qstar/weights", json={"theta": str(folder), "version": version})
                    assert (got.status_code, got.json()) == (200, {"version": version})
                    assert (await http.get("/qstar/weights")).json() == {"version": version}
                await some_of(version)
                done.set()
                await asyncio.gather(*asking)

        asyncio.run(update())
        refused = httpx.post(f"{url}/qstar/weights", json={"theta": str(folders["step 0"])}, timeout=60)
        assert refused.status_code == 401
    by_version = {}
    for i, answer in answers.items():
        by_version.setdefault(answer.choices[0].qstar["weights_version"], []).append(i)
    assert by_version.keys() == {"0", *folders}
    for version, numbers in by_version.items():
        pair = Pair.from_pretrained(folders.get(version, THETA), T)
        expected = pair.generate([QUESTIONS[i % 8] for i in numbers], seeds=numbers, max_new_tokens=12).samples
        for i, sample in zip(numbers, expected, strict=True):
            check_choice(answers[i].choices[0], sample)


def test_trls_asynchronous_trainer_is_served(tmp_path, demo_pair):
    """Its worker's own request gets log q*, and new weights come by its `weight_transfer`."""
    (folder,) = weights_of(tmp_path, (0.5,)).values()
    tensors, updates = load_file(folder / "model.safetensors"), tmp_path / "updates"
    request = demo_pair.generate([QUESTIONS[1]], max_new_tokens=1).samples[0].request
    body = {  # as trl 1.16 sends it
        "model": "./policy", "prompt": request.ids_theta, "max_tokens": 12, "temperature": 1.0, "top_p": 1.0,
        "top_k": 0, "repetition_penalty": 1.0, "n": 1, "return_token_ids": True, "logprobs": 0, "seed": 2**62 + 7,
    }  # fmt: skip
    options = ["--allow-weight-updates", "--served-model-name", "./policy", "--api-key", KEY]
    with serving(tmp_path, *options) as (url, _):
        weights = QStarWeights(url.removesuffix("/v1"), updates, api_key=KEY)
        weights.init_weight_transfer()
        with pytest.raises(ValueError, match=r"answered 400: .*is not for theta"):
            weights.send_weights(iter(list(tensors.items())[1:]))
        with pytest.raises(ValueError, match="answered 401"):
            QStarWeights(url.removesuffix("/v1"), updates).init_weight_transfer()
        for name in (THETA, folder):
            if name == folder:
                weights.pause()
                weights.send_weights(iter(tensors.items()))
                weights.resume()
            expected = Pair.from_pretrained(name, T).generate(
                [QUESTIONS[1]], seed=2**62 + 7, max_new_tokens=12
            ).samples[0]  # fmt: skip
            answer = httpx.post(f"{url}/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
            (choice,) = answer.json()["choices"]
            assert choice["token_ids"] == expected.token_ids
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected.fields["logq"], abs=1e-4)
    assert not list(updates.iterdir())


def test_a_wrong_update_changes_nothing(tmp_path, demo_pair):
    """Refused with its reason, and answers go on as they were; by default there is no such route."""
    folders = weights_of(tmp_path, (0.5,))
    tensors = load_file(folders["step 0"] / "model.safetensors")
    name = next(iter(tensors))
    part, wide, torn = (tmp_path / x for x in ("part", "wide", "torn"))
    for folder in (part, wide, torn):
        folder.mkdir()
    save_file({k: v for k, v in tensors.items() if k != name}, part / "model.safetensors")
    save_file(tensors | {name: torch.zeros(3)}, wide / "model.safetensors")
    (torn / "model.safetensors").write_bytes((folders["step 0"] / "model.safetensors").read_bytes()[:-1000])
    wrong = [
        ({}, "new weights are for theta or t, not nothing"),
        ({"draft": str(part)}, "new weights are for theta or t, not 'draft'"),
        ({"theta": str(tmp_path / "none")}, "is no folder"),
        ({"theta": str(tmp_path)}, "has no weights in safetensors"),
        ({"theta": str(part)}, "is not for theta: 1 tensors differ"),
        ({"t": str(wide)}, "is not for t: 1 tensors differ"),
        ({"theta": str(torn)}, "cannot be read"),
        ({"theta": str(folders["step 0"]), "version": "0"}, "version '0' is the one that is loaded"),
        ({"theta": str(folders["step 0"]), "version": 3}, "new weights are an object such as"),
    ]
    with serving(tmp_path, "--allow-weight-updates") as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        for body, said in wrong:
            answer = http.post("/qstar/weights", json=body)
            assert answer.status_code == 400
            assert said in answer.json()["error"]["message"]
        assert http.get("/qstar/weights").json() == {"version": "0"}
        body = {"model": "qstar", "messages": messages(QUESTIONS[0]), "seed": 1, "max_tokens": 12}
        choice = SimpleNamespace(**http.post("/chat/completions", json=body).json()["choices"][0])
        check_choice(choice, demo_pair.generate([QUESTIONS[0]], seed=1, max_new_tokens=12).samples[0])
        assert choice.qstar["weights_version"] == "0"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1}, "temperature is -1.0; it must be 0 (greedy), or in [1e-06, 1e+06]"),
        ({"presence_penalty": 1.0}, "presence_penalty is set; a pair of models does not support it"),
        ({"response_format": {"type": "json_object"}}, "structured_outputs is set"),
        ({"max_tokens": 100_000}, "max_model_len=512"),
        ({"messages": []}, "empty conversation"),
        ({"messages": messages("x " * 2000)}, "512"),
        ({"extra_body": {"qstar": {"beta": 1}}}, "qstar_beta is unknown"),
        ({"extra_body": {"qstar": {"alpha": 0.3}}}, "alpha goes with method fixed, and it is kl_symmetry"),
        (
            {"extra_body": {"qstar": {"method": "fixed", "kl_budget": 1}}},
            "kl_budget goes with method kl_budget",
        ),
        ({"extra_body": {"qstar": {"alpha": 300}}}, "alpha is 300; it must be in [-100, 100]"),
        ({"extra_body": {"qstar": {"method": "best"}}}, "method is 'best'"),
        ({"extra_body": {"qstar": {"seed": 1}}, "n": 2}, "qstar_seed is that of one sample"),
        ({"n": "x"}, "unable to parse string as an integer"),
        ({"extra_body": {"qstar": {"key": "x"}}}, "qstar_key is unknown"),
        ({"extra_body": {"qstar": {"alpha": [0.3]}}}, "alpha is a list; it must be a single value"),
        ({"extra_body": {"qstar": {"top_k": 2.5}}}, "top_k is 2.5; it must be an integer"),
        ({"extra_body": {"alpha": 0.3}}, "alpha is set; it goes into the field qstar"),
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
def test_a_body_that_is_no_request_is_answered_by_vllm(http, body):
    assert http.post("/v1/chat/completions", content=body).status_code == 400


CHAT = {"model": "qstar", "messages": messages(QUESTIONS[0]), "max_tokens": 4, "seed": 1}
COMPLETION = {"model": "qstar", "prompt": QUESTIONS[0], "max_tokens": 4, "seed": 1}
BATCH = CHAT | {"messages": [messages(QUESTIONS[0]), messages(QUESTIONS[1])]}
WITH_NUMBERS = (
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions/batch", BATCH),
    ("/v1/completions", COMPLETION),
    ("/invocations", CHAT),
    ("/invocations", COMPLETION),
)
WITHOUT = {  # that draw tokens, too
    "/v1/responses": {"model": "qstar", "input": "Hi.", "max_output_tokens": 4},
    "/v1/messages": {"model": "qstar", "messages": messages("Hi."), "max_tokens": 4},
    "/inference/v1/generate": {"model": "qstar", "token_ids": [5, 6], "sampling_params": {"max_tokens": 4}},
    "/generative_scoring": {"model": "qstar", "query": "Hi", "items": ["a"], "label_token_ids": [5, 6]},
}
RENDERS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
NO_TOKENS = {f"{path}/render" for path in RENDERS} | {f"{path}/derender" for path in RENDERS[:2]}
NO_TOKENS |= {"/ping", "/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/responses/{response_id}/cancel"}
NO_TOKENS |= {"/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/abort_requests"}
NO_TOKENS |= {"/v1/systemone"}  # it has a list of architectures


def test_every_route_is_known(http):
    """A route that a new vLLM brings is to be looked at: does it draw tokens?"""
    paths = http.get("/openapi.json").json()["paths"]
    assert {path for path in paths if "post" in paths[path]} == {
        p for p, _ in WITH_NUMBERS
    } | WITHOUT.keys() | NO_TOKENS


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(("path", "body"), WITH_NUMBERS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_numbers_come_whatever_path_leads_to_them(http, demo_pair, prefix, path, body):
    rule = {"method": "fixed", "alpha": 0.2}
    answer = http.post(prefix + path, json=body | {"qstar": rule, "temperature": 0.5}).json()
    options = {"format_theta": PromptFormat("none"), "format_t": PromptFormat("none")} if "prompt" in body else {}
    expected = demo_pair.generate(
        QUESTIONS[: 2 if path.endswith("batch") else 1], seed=1, max_new_tokens=4, temperature=0.5, **rule, **options
    )
    for choice, sample in zip(answer["choices"], expected.samples, strict=True):
        check_choice(SimpleNamespace(**choice), sample)
    refused = http.post(prefix + path, json=body | {"qstar": {"method": "best"}})
    assert refused.status_code == 400
    assert "method is 'best'" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", WITHOUT)
def test_a_route_that_would_draw_without_numbers_is_refused(http, path):
    answer = http.post(path, json=WITHOUT[path] | {"qstar": {"method": "fixed"}})
    assert answer.status_code == 400
    assert "this route has no place for the numbers of q*" in answer.text


APART = QUESTIONS[2]  # the two models' first tokens of an answer differ


@pytest.mark.parametrize("temperature", [1e-6, 0.002, 3, 1e6])
@pytest.mark.parametrize(
    ("path", "body", "prompt"),
    [
        ("/v1/chat/completions", {"messages": messages(APART)}, APART),
        ("/v1/chat/completions/batch", {"messages": [messages(APART)] * 2}, APART),
        ("/v1/completions", {"prompt": "The answer is"}, "The answer is"),
    ],
    ids=["chat", "batch", "completions"],
)
def test_the_temperature_is_the_requests_own(http, demo_pair, path, body, prompt, temperature):
    """KL(π_t‖π_θ) of the first token grows as 1/T."""
    options = {"format_theta": PromptFormat("none"), "format_t": PromptFormat("none")} if "prompt" in body else {}
    rule = {"method": "fixed", "alpha": 0}
    expected = demo_pair.generate(
        [prompt], seed=1, max_new_tokens=4, temperature=temperature, **rule, **options
    ).samples[0]
    said = {"model": "qstar", "max_tokens": 4, "seed": 1, "temperature": temperature, "qstar": rule}
    numbers = http.post(path, json=said | body).json()["choices"][0]["qstar"]
    assert numbers["token_ids"] == expected.token_ids
    kl = expected.fields["kl_theta"]
    assert numbers["kl_theta"] == pytest.approx(kl, rel=1e-2, abs=1e-3 / temperature)
    assert temperature > 1 or kl[0] > 0.5 / temperature


@pytest.mark.parametrize("temperature", [-1, 1e-7, 2e6, math.nan, math.inf])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_temperature_out_of_its_range_is_refused(http, temperature, streamed):
    body = json.dumps(CHAT | {"temperature": temperature, "stream": streamed})
    answer = http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"temperature is {float(temperature)}; it must be 0 (greedy)")


def test_greedy_choices_are_many_if_asked_for(client):
    answer = client.chat.completions.create(model="qstar", messages=messages("Hi."), n=2, temperature=0, max_tokens=4)
    assert answer.choices[0].message == answer.choices[1].message


NEUTRAL = [
    {"logit_bias": {}},
    {"logit_bias": {"5": 0}},
    {"logit_bias": None},
    {"presence_penalty": 0, "frequency_penalty": -0.0, "repetition_penalty": 1},
    {"presence_penalty": None, "frequency_penalty": None, "repetition_penalty": None},
    {"bad_words": [], "allowed_token_ids": None, "logprob_token_ids": [], "prompt_logprobs": None, "min_tokens": 0},
    {"structured_outputs": None, "response_format": {"type": "text"}},
    {"thinking_token_budget": -1, "watermarking": False},
    {"echo": False, "use_beam_search": False, "length_penalty": 1, "early_stopping": False},
    {"best_of": 2, "n": 2},
    {"guided_json": None, "guided_choice": []},
    {"top_k": -1, "top_p": 1, "min_p": 0},
    {"qstar": {}},
    {"qstar": None},
]
UNSUPPORTED = [
    {"logit_bias": {"5": 1}},
    {"presence_penalty": 0.1},
    {"frequency_penalty": -0.1},
    {"repetition_penalty": 1.1},
    {"bad_words": ["x"]},
    {"allowed_token_ids": [5]},
    {"logprob_token_ids": [5], "logprobs": True},
    {"prompt_logprobs": 0},
    {"min_tokens": 1},
    {"structured_outputs": {"choice": ["a"]}},
    {"thinking_token_budget": 3},
    {"watermarking": True},
    {"echo": True},
    {"use_beam_search": True},
    {"length_penalty": 2},
    {"early_stopping": True},
    {"best_of": 2},
    {"guided_choice": ["a"]},
]


@pytest.mark.parametrize("said", NEUTRAL, ids=str)
def test_what_does_nothing_is_accepted(http, said):
    plain, answer = (http.post("/v1/chat/completions", json=CHAT | more) for more in ({}, said))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["qstar"] == plain.json()["choices"][0]["qstar"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("said", UNSUPPORTED, ids=str)
def test_what_a_pair_does_not_do_is_refused_by_name(http, said, streamed):
    answer = http.post("/v1/chat/completions", json=CHAT | said | {"stream": streamed})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"{next(iter(said))} is set; a pair of models does not support it"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


MALFORMED = {
    "nested": [f'"x": {nested(depth)}' for depth in (65, 500, 900, 100_000)]
    + [f'"qstar": {{"alpha": {nested(depth)}}}' for depth in (65, 500, 900)],
    "large": [f'"top_k": {2**70}', f'"x": [{{"y": {-(2**63) - 1}}}]', f'"qstar": {{"seed": {2**63}}}'],
    "surrogate": [f'"{name}": "\\ud800"' for name in ("stop", "request_id", "user", "\\ud800")],
    "surrogate in qstar": ['"qstar": {"\\ud800": 1}', '"qstar": {"method": "\\ud800"}'],
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize(("path", "body"), WITH_NUMBERS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_malformed_body_is_refused_in_one_line(http, path, body, kind):
    for field in MALFORMED[kind]:
        answer = http.post(path, content=f"{json.dumps(body)[:-1]}, {field}}}")
        assert answer.status_code == 400, field[:80]
        said = answer.json()
        said = said["detail"] if "detail" in said else said["error"]["message"]
        assert said
        assert "\n" not in said


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_no_value_of_any_field_is_the_servers_fault(http, kind):
    """What no field expects, in each of them: some are accepted, no answer is a 5xx, and the engine goes on."""
    model, path, body = ChatCompletionRequest, "/v1/chat/completions", CHAT | {"max_tokens": 1}
    if kind == "completions":
        model, path, body = CompletionRequest, "/v1/completions", COMPLETION | {"max_tokens": 1}
    values = [str(10**30), '"\\ud800"', nested(300), "[]", "{}", '"a\\nb_7-c"', "-1", "NaN", "true", "null", "[1e400]"]
    for field in [*model.model_fields, "qstar"]:
        for value in values:
            content = json.dumps({k: v for k, v in body.items() if k != field})[:-1] + f', "{field}": {value}}}'
            answer = http.post(path, content=content)
            assert answer.status_code < 500, (content[-200:], answer.text)
    assert http.post(path, json=body).json()["choices"][0]["qstar"]["error"] is None


def test_only_who_has_the_key_may_send_a_body(url):
    """Who has not is answered before the first byte of it."""
    host, port = url.split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {150 << 20}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_page_of_another_origin_may_read_refusals(http):
    for wrong in ({"echo": True}, {"top_k": 2**70}, {"qstar": {"alpha": 300}}):
        answer = http.post("/v1/chat/completions", json=CHAT | wrong)
        assert answer.status_code == 400
        assert answer.headers["access-control-allow-origin"] == "*"


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


INTERRUPTED = """
import os, signal, sys
import qstar.vllm.engine
from vllm.entrypoints.launchers.api_server import entry
from qstar.serve import main

def build_app(*args, build_app=entry.build_app):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:  # as the core of pydantic does, while it makes the routes
        pass
    return build_app(*args)

entry.build_app = build_app
sys.exit(main(sys.argv[1:]))
"""


def test_sigterm_late_in_the_start_is_heard():
    """When the engine is there already and the server is not: both are gone soon."""
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, "--port", str(free_port()), *SIZES])
    family, deadline = set(), time.time() + 240
    try:
        while process.poll() is None and time.time() < deadline:
            family |= set(psutil.Process(process.pid).children(recursive=True))
            time.sleep(0.1)
        assert process.poll() == -signal.SIGTERM
        assert family
        assert not psutil.wait_procs(family, timeout=30)[1]
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--alpha", "101"], "alpha is 101.0; it must be in [-100, 100]"),
        (["--port", "x"], "argument --port"),
        (["--no-such-option"], "--no-such-option"),
        (["--model-theta", "./nothing", "--model-t", "./nothing"], "nothing does not exist"),
        (["--hf-overrides", "{}"], "--hf-overrides is not to be chosen"),
        (["--worker-cls", "x.Y"], "--worker-cls is not to be chosen"),
        (["--override-generation-config", '{"temperature": 0.3}'], "its default is --temperature"),
    ],
)
def test_a_wrong_command_line_is_met_by_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
