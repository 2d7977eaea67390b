"""q* and its numbers in the answers of vLLM's OpenAI-compatible server.

A request may say in a field `qstar` which q* it wants (`params`); every choice of its answer gets a field `qstar` with
its tokens and their numbers, in a stream where the choice ends. This is done around the handlers that vLLM's routes
give their checked requests to: behind authentication and CORS, and whatever path has led there. What another handler
would draw without numbers, the engine refuses (`params.PairParams`).
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from itertools import chain
from typing import Any
from uuid import uuid4

from fastapi import Depends, FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from qstar.sample import Request as SampleRequest
from qstar.sample import Sample, finite
from qstar.vllm.engine import EnginePair
from qstar.vllm.params import (
    ELSEWHERE,
    FORCED,
    PREFIX,
    SETTINGS,
    PairParams,
    does_nothing,
    numbers_key,
    of_any_rank,
    own_fields,
    rule,
)
from qstar.vllm.weights import Versions, check_update
from qstar_kernels.types import FIELDS, check_read

HANDLERS = {  # by their place in the state of vLLM's application
    "openai_serving_chat": "create_chat_completion",
    "openai_serving_chat_batch": "create_batch_chat_completion",
    "openai_serving_completion": "create_completion",
}
# Fields that the engine never sees, and the values with which they do nothing
UNSUPPORTED = {name: (False,) for name in ("echo", "use_beam_search", "early_stopping")}
UNSUPPORTED |= {name: () for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")}
UNSUPPORTED["length_penalty"] = (1,)
SURROGATE = re.compile("[\ud800-\udfff]")
TOKENS = {"token_ids", "prompt_token_ids"}  # are asked of vLLM, for the client or not
DEPTH = 64  # of lists and objects in each other, in a request

AnyRequest = ChatCompletionRequest | BatchChatCompletionRequest | CompletionRequest


def with_numbers(app: FastAPI, updated: EnginePair | None = None) -> FastAPI:
    """vLLM's application, complete with its state, as one whose model is q*.

    `updated` is the pair, without its weights, if they may be replaced.
    """
    if updated is not None:
        updates = Updates(app.state.engine_client, updated)
        app.add_api_route("/v1/qstar/weights", updates.get, methods=["GET"])
        app.add_api_route(
            "/v1/qstar/weights", updates.post, methods=["POST"], dependencies=[Depends(validate_json_request)]
        )
    app.dependency_overrides[validate_json_request] = check_body
    for kind in (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError):
        app.add_exception_handler(kind, unreadable)
    app.middleware_stack = app.build_middleware_stack()  # it was built before
    for name, method in HANDLERS.items():
        serving = getattr(app.state, name)
        setattr(serving, method, partial(numbered, getattr(serving, method), app.state.engine_client))
    return app


async def check_body(raw_request: HTTPRequest) -> None:
    """In the place of vLLM's check of a body, on all its routes: what Python reads, vLLM's engine can be sent.

    Raises:
        ValueError: it is nested too deeply, or has a number or a text that cannot be encoded.
    """
    await validate_json_request(raw_request)
    too_deep = ValueError(f"the request's lists and objects are more than {DEPTH} deep")
    try:
        level = [await raw_request.json()]
    except RecursionError:
        raise too_deep from None
    except ValueError:
        return  # vLLM says what is wrong with it
    for _ in range(DEPTH + 1):
        for value in level:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(f"{value!r:.40} is in the request; whole numbers must fit in 64 bits")
            if isinstance(value, str) and not value.isascii() and SURROGATE.search(value):
                raise ValueError(f"{value!r:.40} is in the request; a text must not have half of a surrogate pair")
        level = [
            child
            for value in level
            if isinstance(value, list | dict)
            for child in (chain(value, value.values()) if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise too_deep


async def unreadable(raw_request: HTTPRequest, error: Exception) -> JSONResponse:
    """The answer to an error that vLLM does not expect: while it reads a request, it is the request's fault."""
    if not hasattr(raw_request.state, "request_metadata"):
        error = ValueError(" ".join(f"the request cannot be read: {error}".split()))
    return await exception_handler(raw_request, error)


async def numbered(handler: Callable, engine: Any, request: AnyRequest, raw_request: HTTPRequest | None = None) -> Any:
    """A handler's answer to a request, with the numbers in its choices.

    Raises:
        ValueError: the request wants what a pair does not do.
    """
    wants_tokens, key = request.return_token_ids, uuid4().hex
    ask(request, key, engine.model_config.hf_config.qstar)
    numbers = partial(numbers_of, engine, key, request.n or 1)
    answer = await handler(request, raw_request)
    if isinstance(answer, AsyncGenerator):
        return stream(answer, numbers, wants_tokens)
    if not isinstance(answer, ErrorResponse):
        of_choice = await numbers({choice.index: len(choice.token_ids) for choice in answer.choices})
        for choice in answer.choices:
            choice.qstar = of_choice[choice.index]
        for part in () if wants_tokens else (answer, *answer.choices):
            for name in TOKENS & type(part).model_fields.keys():
                setattr(part, name, None)
    return answer


def ask(request: AnyRequest, key: str, pair: dict[str, Any]) -> None:
    """Make a request one of vLLM's: which q* is in `vllm_xargs`, its numbers are kept, it ends at either model's EOS.

    `pair` is what the engine knows of it (`engine.engine_options`).

    Raises:
        ValueError: it wants what a pair does not do.
    """
    said = vars(request) | request.model_extra
    for name, neutral in {**UNSUPPORTED, "best_of": (request.n or 1,)}.items():
        if not does_nothing(said.get(name), neutral):
            raise ValueError(f"{name} is set; a pair of models does not support it")
    for name in SETTINGS + FORCED:
        if name in request.model_extra:
            raise ValueError(f"{name} is set; it goes into the field qstar, as in {{'qstar': {{'alpha': 0.3}}}}")
    wanted = request.model_extra.pop("qstar", None) or {}
    if not isinstance(wanted, dict):
        raise ValueError(f"qstar is {wanted!r:.40}; it must be an object such as {{'method': 'fixed', 'alpha': 0.3}}")
    own = {name: said[name] for name in ELSEWHERE if said[name] is not None}
    if own.get("top_k") == -1:
        own["top_k"] = 0
    for name, (neutral, *_) in ELSEWHERE.items():
        setattr(request, name, neutral)
    extra = {PREFIX + name: value for name, value in own.items()} | (said.get("vllm_xargs") or {})
    batch = isinstance(request, BatchChatCompletionRequest)
    extra |= {PREFIX + name: value for name, value in wanted.items()} | {
        "numbers_key": key,
        "numbers_batch": int(batch),
    }
    request.vllm_xargs, request.return_token_ids = extra, True
    if not said.get("ignore_eos"):  # vLLM knows π_θ's only
        request.stop_token_ids = [*(said.get("stop_token_ids") or ()), *pair["eos_ids"]]
    single = request.to_chat_completion_request(request.messages[0]) if batch else request
    params = single.to_sampling_params(None, {})
    # the engine would refuse it too, but when a stream has begun, with status 200, or not knowing its own options
    PairParams.validate_params(params)
    check_read(own_fields(params), rule(params, pair).settings.method)


async def numbers_of(engine: Any, key: str, n: int, lengths: dict[int, int]) -> dict[int, dict[str, Any]]:
    """The field `qstar` of choices that have ended with so many tokens, by their indices.

    Args:
        engine: vLLM's engine client.
        key: what the numbers are kept under.
        n: choices of each prompt.
    """
    keys = {index: numbers_key(key, *divmod(index, n)) for index in lengths}
    kept = of_any_rank(await engine.collective_rpc("pop_numbers", args=(list(keys.values()),)))
    return {index: numbers_of_choice(*kept.get(keys[index], ([], [])), length) for index, length in lengths.items()}


async def stream(events: AsyncGenerator[str], numbers: Callable, wants_tokens: bool) -> AsyncGenerator[str]:
    """The events of a stream, with the numbers of the choices that end in them."""
    lengths = Counter()
    async with aclosing(events):
        async for event in events:
            if event.startswith("data: {"):
                chunk = json.loads(event.removeprefix("data: "))
                choices = chunk.get("choices") or ()
                for choice in choices:
                    lengths[choice["index"]] += len(choice.get("token_ids") or ())
                ended = {c["index"]: c for c in choices if c.get("finish_reason")}
                if ended:
                    of_choice = await numbers({index: lengths[index] for index in ended})
                    for index, choice in ended.items():
                        choice["qstar"] = of_choice[index]
                for part in () if wants_tokens else (chunk, *choices):
                    for name in TOKENS:
                        part.pop(name, None)
                event = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            yield event


def numbers_of_choice(rows: list[list[float]], versions: list[str | None], length: int) -> dict[str, Any]:
    """The field `qstar` of a choice of so many tokens, drawn by weights of these versions.

    `token_ids`, one number a token for each of `FIELDS` (nats; null for −inf), `weights_version` (null where nobody has
    named the weights), and `error`: why the next token has no distribution, if that is what has ended it, or that the
    weights have changed under it, so that no model would give these numbers again.
    """
    sample = Sample(SampleRequest(None, [], [], 0, length))
    for token, status, *values in rows[:length]:  # the engine may have gone on past a stop string
        if not sample.draw(token, status, values):
            break
    numbers = {name: [finite(value) for value in sample.fields[name]] for name in FIELDS}
    error = sample.error
    if len(versions) > 1:
        error = f"the weights changed while it was drawn, from {' to '.join(map(repr, versions))}"
    version = versions[-1] if versions else None
    return {"token_ids": sample.token_ids, **numbers, "weights_version": version, "error": error}


class Updates:
    """`GET` and `POST /v1/qstar/weights`: which weights answer, and new ones from folders that this machine can read.

    Requests that are running end with the weights that they began with, those that come meanwhile wait for the new
    ones, and prefixes that the old ones have cached are dropped.

    Args:
        engine: vLLM's engine client.
        pair: the engine's, without weights.
    """

    def __init__(self, engine: Any, pair: EnginePair):
        self.engine, self.pair = engine, pair
        self.versions, self.one_at_a_time = Versions(), asyncio.Lock()

    async def get(self) -> dict[str, Any]:
        return {"version": self.versions.now}

    async def post(self, raw_request: HTTPRequest) -> dict[str, Any]:
        """The body is an object with `theta`, `t` or both, and maybe `version`; the answer is that of `get`."""
        body = await raw_request.json()
        if not isinstance(body, dict) or not all(isinstance(x, str) for x in body.values()):
            raise ValueError("new weights are an object such as {'theta': '/folder', 'version': 'step 12'}")
        async with self.one_at_a_time:
            folders = {key: value for key, value in body.items() if key != "version"}
            await asyncio.to_thread(check_update, self.pair, folders)
            version = self.versions.next(body.get("version"))
            await self.engine.pause_generation(mode="wait", clear_cache=True)
            with self.versions.loading(version):
                await self.engine.collective_rpc("load_pair", args=(folders, version))
            await self.engine.update_weight_version(version)
            await self.engine.resume_generation()
        return {"version": version}
