"""A scripted server: made-up tokens, at given times and with given faults, on the real wire.

`python -m perf.fake_server --port P` for the harness' own tests and dry runs; tests also use `FakeServer` in process.
It speaks OpenAI's streams, S-LoRA's `/generate_stream`, `/v1/models`, `/v1/scheduler`, `/tokenize` and `/health`. It
records when it sent each token, which is the independent count that the generator is checked against. A token is a
word; token ids are accepted as they are.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from aiohttp import web

from inlaid.flags import Parser

Fault = Literal["", "http-500", "http-429", "hang", "cut", "reset", "garbage", "error-event", "slora-reject"]


class Behaviour(msgspec.Struct, frozen=True):
    """Timing of one answer: first token after `ttft_s`, then a gap of `itl_s` before each further one.

    `gaps_s` overrides the gaps one by one. A fault strikes after `fault_after` tokens.
    """

    ttft_s: float = 0.02
    itl_s: float = 0.005
    gaps_s: tuple[float, ...] = ()
    fault: Fault = ""
    fault_after: int = 0

    def gap(self, token: int) -> float:
        if token == 0:
            return self.ttft_s
        return self.gaps_s[token - 1] if token <= len(self.gaps_s) else self.itl_s


class Sent(msgspec.Struct):
    """The server's log of one request, on its own clock; `tokens` is stamped just before each write."""

    request_id: str
    model: str
    received: float
    prompt_tokens: int
    tokens: list[float]
    finished: float | None = None


class FakeServer:
    """Owner of the script, the log of what was sent, and the bound on requests answered at a time."""

    def __init__(
        self,
        behaviour: Callable[[int], Behaviour],
        adapters: Sequence[str] = (),
        slots: int = 1_000_000,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.behaviour, self.adapters, self.clock = behaviour, list(adapters), clock
        self.slots = asyncio.Semaphore(slots)
        self.log: list[Sent] = []
        self.count = 0
        self.scheduler: dict[str, object] = {}  # as the last PUT /v1/scheduler said

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/health", self.health)
        app.router.add_get("/ready", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_put("/v1/scheduler", self.put_scheduler)
        app.router.add_get("/v1/scheduler", self.get_scheduler)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/generate_stream", self.slora)
        return app

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def models(self, _: web.Request) -> web.Response:
        cards = [{"id": "fake", "parent": None}] + [{"id": name, "parent": "fake"} for name in self.adapters]
        return web.json_response({"object": "list", "data": cards})

    async def put_scheduler(self, request: web.Request) -> web.Response:
        self.scheduler |= await request.json()
        return web.json_response(self.scheduler)

    async def get_scheduler(self, _: web.Request) -> web.Response:
        return web.json_response(self.scheduler)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        tokens = [1 + hash_word(word) for word in body["prompt"].split()]
        tokens = [0, *tokens] if body.get("add_special_tokens", True) else tokens
        return web.json_response({"tokens": tokens, "count": len(tokens)})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["prompt"]
        size = len(prompt.split()) + 1 if isinstance(prompt, str) else len(prompt)
        return await self._answer(request, body["model"], size, body["max_tokens"], _completion_event, True)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        size = sum(len(message["content"].split()) for message in body["messages"])
        return await self._answer(request, body["model"], size, body["max_tokens"], _chat_event, True)

    async def slora(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        limit = body["parameters"]["max_new_tokens"]
        return await self._answer(
            request, body["lora_dir"], len(body["inputs"].split()) + 1, limit, _slora_event, False
        )

    async def _answer(
        self, request: web.Request, model: str, prompt_tokens: int, limit: int,
        event: Callable[[int, int, int], bytes], openai: bool,
    ) -> web.StreamResponse:  # fmt: skip
        behaviour = self.behaviour(self.count)
        self.count += 1
        sent = Sent(request.headers.get("X-Request-Id", ""), model, self.clock(), prompt_tokens, [])
        self.log.append(sent)
        if behaviour.fault.startswith("http-"):
            return web.json_response({"error": {"message": "scripted"}}, status=int(behaviour.fault[5:]))
        async with self.slots:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            try:
                for token in range(limit):
                    if behaviour.fault and token == behaviour.fault_after:
                        return await self._fault(behaviour.fault, request, response)
                    await asyncio.sleep(behaviour.gap(token))
                    sent.tokens.append(self.clock())
                    await response.write(event(token, limit, prompt_tokens))
                if openai:
                    await response.write(_usage_event(prompt_tokens, limit) + b"data: [DONE]\n\n")
                sent.finished = self.clock()
            except ConnectionResetError:
                pass  # the client has gone: `finished` stays None
        return response

    async def _fault(self, fault: Fault, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        if fault == "hang":
            await asyncio.sleep(3600)
        elif fault == "reset":
            assert request.transport is not None
            request.transport.abort()
        elif fault == "garbage":
            await response.write(b"data: {not json\n\n")
        elif fault == "error-event":
            await response.write(b'data: {"error": {"message": "scripted"}}\n\n')
        elif fault == "slora-reject":
            await response.write(b'data: {"token": null, "finished": -1}\n\n')
        return response


def hash_word(word: str) -> int:
    """Return a small stable id for a word."""
    return sum((i + 1) * ord(letter) for i, letter in enumerate(word)) % 30_000


def _completion_event(token: int, limit: int, _: int) -> bytes:
    finish = b'"length"' if token == limit - 1 else b"null"
    return b'data: {"choices":[{"index":0,"text":" w%d","finish_reason":%s}]}\n\n' % (token, finish)


def _chat_event(token: int, limit: int, _: int) -> bytes:
    role = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n' if token == 0 else b""
    finish = b'"length"' if token == limit - 1 else b"null"
    delta = b'data: {"choices":[{"index":0,"delta":{"content":" w%d"},"finish_reason":%s}]}\n\n' % (token, finish)
    return role + delta


def _slora_event(token: int, limit: int, _: int) -> bytes:
    body = {
        "token": {"id": token, "text": f" w{token}", "logprob": 0.0, "special": False},
        "finished": token == limit - 1,
    }
    return b"data:" + json.dumps(body).encode() + b"\n\n"


def _usage_event(prompt_tokens: int, completion_tokens: int) -> bytes:
    return b'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}\n\n' % (
        prompt_tokens,
        completion_tokens,
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="perf.fake_server", description="Scripted delays on the real wire.")
    parser.add_argument("model", nargs="?", default="fake", help="accepted and ignored")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--ttft-ms", type=float, default=20.0)
    parser.add_argument("--itl-ms", type=float, default=5.0)
    parser.add_argument("--slots", type=int, default=1_000_000, help="requests answered at a time; others wait")
    parser.add_argument("--start-delay-s", type=float, default=0.0, help="before the port opens, as a model loads")
    parser.add_argument("--fail-every", type=int, default=0, help="every n-th request gets a 500")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--policy", default="fcfs", help="accepted and ignored")
    parser.add_argument("--log", help="on exit, write what was sent to this JSONL file")
    arguments = parser.parse_args(argv)
    regular = Behaviour(arguments.ttft_ms / 1000, arguments.itl_ms / 1000)
    failing = Behaviour(fault="http-500")
    every = arguments.fail_every
    names = [name.partition("=")[0] for name in arguments.adapter]
    server = FakeServer(lambda i: failing if every and i % every == every - 1 else regular, names, arguments.slots)
    time.sleep(arguments.start_delay_s)
    web.run_app(server.app(), host=arguments.host, port=arguments.port, print=None, access_log=None)
    if arguments.log:
        Path(arguments.log).write_bytes(b"".join(msgspec.json.encode(sent) + b"\n" for sent in server.log))
    return 0


if __name__ == "__main__":
    sys.exit(main())
