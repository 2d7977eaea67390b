"""The numbers of q* in the responses of vLLM's OpenAI-compatible server.

`Numbers` is one of vLLM's middlewares. A request may say in a field `qstar` which q* it wants (`params`); every choice
of its response gets a field `qstar` with its tokens and their numbers, in a stream where the choice ends.
"""

import json
from typing import Any
from uuid import uuid4

from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse

from qstar.decode import FIELDS, Request, Sample
from qstar.formats import finite
from qstar.vllm.params import PREFIX, numbers_key, of_any_rank

PATHS = ("/v1/chat/completions", "/v1/completions")


class Numbers:
    """ASGI middleware around vLLM's application.

    Errors: HTTP 400 in the form of OpenAI's for what a pair does not do; what vLLM refuses is answered by vLLM.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            return await self.app(scope, receive, send)
        body = await HTTPRequest(scope, receive).body()
        try:
            asked = json.loads(body)
        except ValueError:
            asked = None
        if not isinstance(asked, dict) or not isinstance(asked.get("vllm_xargs") or {}, dict):
            return await self.app(scope, replay(body, receive), send)  # vLLM says what is wrong with it
        engine, wants_tokens = scope["app"].state.engine_client, asked.get("return_token_ids")
        pair, key = engine.model_config.hf_config.qstar, uuid4().hex
        try:
            body = json.dumps(with_numbers(asked, key, pair["eos_ids"])).encode()
        except ValueError as error:
            refusal = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
            return await JSONResponse({"error": refusal}, 400)(scope, receive, send)
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        answer = Answer(send, engine, key, asked.get("n") or 1, bool(wants_tokens))
        await self.app(scope, replay(body, receive), answer.send)


def with_numbers(asked: dict[str, Any], key: str, eos_ids: list[int]) -> dict[str, Any]:
    """A request's body as vLLM is to have it: its numbers are kept, and it ends at either model's EOS.

    Raises:
        ValueError: it wants what a pair does not do.
    """
    for name in ("echo", "use_beam_search"):
        if asked.get(name):
            raise ValueError(f"{name} is set; a pair of models does not support it")
    if not isinstance(asked.get("n") or 1, int):
        raise ValueError(f"n is {asked['n']!r}; it must be a whole number")
    rule = asked.get("qstar") or {}
    if not isinstance(rule, dict):
        raise ValueError(f"qstar is {rule!r}; it must be an object such as {{'method': 'fixed', 'alpha': 0.3}}")
    extra = {PREFIX + name: value for name, value in rule.items()}
    changed = {"vllm_xargs": (asked.get("vllm_xargs") or {}) | extra | {"qstar_key": key}, "return_token_ids": True}
    own = asked.get("stop_token_ids") or []
    if not asked.get("ignore_eos") and isinstance(own, list):  # vLLM knows π_θ's only
        changed["stop_token_ids"] = [*own, *eos_ids]
    return {name: value for name, value in asked.items() if name != "qstar"} | changed


class Answer:
    """Passes a response on, with the numbers in its choices.

    Args:
        send: ASGI's, to the client.
        engine: vLLM's engine client.
        key: what the numbers are kept under.
        n: choices of each prompt.
        wants_tokens: whether the client has asked vLLM for token ids too.
    """

    def __init__(self, send, engine, key: str, n: int, wants_tokens: bool):
        self.to_client, self.engine, self.key, self.n, self.wants_tokens = send, engine, key, n, wants_tokens
        self.start, self.streams, self.rest = None, False, b""
        self.lengths: dict[int, int] = {}  # tokens of each choice so far

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.streams = kind.startswith(b"text/event-stream")
            if self.streams:
                await self.to_client(message)
            return
        self.rest += message.get("body", b"")
        if self.streams:
            *events, self.rest = self.rest.split(b"\n\n")
            for event in events:
                await self.event(event)
            if not message.get("more_body"):
                await self.to_client({"type": "http.response.body", "body": self.rest})
        elif not message.get("more_body"):
            body = self.rest
            if self.start["status"] == 200:
                body = await self.filled(body)
            headers = [(name, value) for name, value in self.start["headers"] if name != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self.to_client({**self.start, "headers": headers})
            await self.to_client({"type": "http.response.body", "body": body})

    async def event(self, event: bytes) -> None:
        """Pass an event of a stream on."""
        name, _, data = event.partition(b": ")
        if name == b"data" and data != b"[DONE]":
            event = b"data: " + await self.filled(data)
        await self.to_client({"type": "http.response.body", "body": event + b"\n\n", "more_body": True})

    async def filled(self, body: bytes) -> bytes:
        """A response, or a part of one, with the numbers of the choices that end in it."""
        answer = json.loads(body)
        choices = answer.get("choices") or ()
        for choice in choices:
            index = choice["index"]
            self.lengths[index] = self.lengths.get(index, 0) + len(choice.get("token_ids") or ())
        ended = {numbers_key(self.key, *divmod(c["index"], self.n)): c for c in choices if c.get("finish_reason")}
        if ended:
            numbers = of_any_rank(await self.engine.collective_rpc("pop_numbers", args=(list(ended),)))
            for key, choice in ended.items():
                choice["qstar"] = numbers_of_choice(numbers.get(key, []), self.lengths[choice["index"]])
        if not self.wants_tokens:
            for part in (answer, *choices):
                part.pop("token_ids", None)
                part.pop("prompt_token_ids", None)
        return json.dumps(answer, ensure_ascii=False).encode()


def numbers_of_choice(rows: list[list[float]], length: int) -> dict[str, Any]:
    """The field `qstar` of a choice of so many tokens.

    `token_ids`, one number a token for each of `FIELDS` (nats; null for −inf), and `error`: why the next token has no
    distribution, if that is what has ended it.
    """
    sample = Sample(Request(None, [], [], 0, length))
    for token, status, *values in rows[:length]:  # the engine may have gone on past a stop string
        if not sample.draw(token, status, values):
            break
    numbers = {name: [finite(value) for value in sample.fields[name]] for name in FIELDS}
    return {"token_ids": sample.token_ids, **numbers, "error": sample.error}


def replay(body: bytes, receive):
    """ASGI's `receive` for a body that has been read; then the client's own, which says when it is gone."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def first_the_body() -> dict[str, Any]:
        return messages.pop() if messages else await receive()

    return first_the_body
