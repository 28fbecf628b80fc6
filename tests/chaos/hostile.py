"""Hostile requests: one function for each kind that once stopped, slowed or filled a server. Each sends its requests
and returns the statuses; `mix.py` runs them beside ordinary traffic.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import random
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.folders import spoil


@dataclass
class Attack:
    """Whom to attack, and with what."""

    session: aiohttp.ClientSession
    address: tuple[str, int]
    admin: dict[str, str]
    root: Path  # a folder that adapters may be loaded from
    draw: random.Random
    limit: int  # bytes that a body may have

    async def post(self, path: str, body: Any = None, method: str = "POST", **more: Any) -> int:
        """Send a request, read its whole answer, and return its status."""
        headers = {"X-Tenant": "hostile", **more.pop("headers", {})}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
        async with self.session.request(method, path, headers=headers, data=io.BytesIO(data), **more) as response:
            await response.read()
            return response.status


def _text(attack: Attack) -> str:
    return attack.draw.choice(("a", " ", "é", "0", "ab ", "\n")) * (attack.limit // 4)


async def long_text(attack: Attack) -> list[int]:
    """Send text as long as a body may be, to every route that reads text."""
    text = _text(attack)
    tools = [{"type": "function", "function": {"name": "f", "description": text}}]
    call = [{"id": "a", "function": {"name": "f", "arguments": text}}]
    chat = {"messages": [{"role": "user", "content": "a"}]}
    bodies = (
        ("/tokenize", {"prompt": text}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {**chat, "tools": tools}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "", "tool_calls": call}]}),
        ("/v1/completions", {"prompt": "a", "bad_words": [text[:99]] * (attack.limit // 400)}),
        ("/v1/completions", {"prompt": "a", "stop": text}),
        ("/v1/completions", {"prompt": "a", "guided_regex": text}),
        ("/generate", {"text": text}),
    )
    path, body = attack.draw.choice(bodies)
    return [await attack.post(path, body)]


async def long_lists(attack: Attack) -> list[int]:
    """Send lists as long as a body may be."""
    ids = [attack.draw.randrange(1024)] * (attack.limit // 6)
    messages = [{"role": "user", "content": "a"}] * min(65_536, attack.limit // 40)
    bodies = (
        ("/detokenize", {"tokens": ids}),
        ("/v1/completions", {"prompt": ids, "n": 8}),
        ("/v1/completions", {"prompt": "a", "allowed_token_ids": ids}),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": ids}),
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/completions", {"prompt": ["a"] * (attack.limit // 8)}),
        ("/v1/completions", {"prompt": "a", "guided_choice": [str(n) for n in range(attack.limit // 16)]}),
    )
    path, body = attack.draw.choice(bodies)
    return [await attack.post(path, body)]


async def many_answers(attack: Attack) -> list[int]:
    """Ask for as many answers, log probabilities and seats as a request may have."""
    body = {"prompt": "a", "n": 8, "best_of": 8, "max_tokens": 40, "logprobs": 20, "echo": True, "ignore_eos": True}
    return [await attack.post("/v1/completions", body)]


async def unread_stream(attack: Attack) -> list[int]:
    """Ask for a stream, never read it, and leave after a while."""
    data = json.dumps({"prompt": "a", "stream": True, "n": 8, "max_tokens": 60, "logprobs": 20, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    loop = asyncio.get_running_loop()
    with socket.socket() as raw:
        raw.setblocking(False)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        await loop.sock_connect(raw, attack.address)
        await loop.sock_sendall(raw, f"{head}\r\n\r\n{data}".encode())
        await asyncio.sleep(2.0)
    return []


async def strange_numbers(attack: Attack) -> list[int]:
    """Send weights, limits and options at and beyond every bound."""
    bad: tuple[dict[str, Any], ...] = (
        {"weights": {"hostile": 5e-324}}, {"weights": {"hostile": 1e308}}, {"max_num_waiting": 10**30},
        {"limits": {"hostile": {"requests_per_minute": 10**30}}}, {"policy": "drr", "options": {"quantum": 5e-324}},
        {"policy": "inlaid", "options": {"beta": 0}}, {"weights": {"hostile": -1}}, {"options": {"x": [[[]]]}},
    )  # fmt: skip
    return [await attack.post("/v1/scheduler", attack.draw.choice(bad), "PUT", headers=attack.admin)]


async def strange_bytes(attack: Attack) -> list[int]:
    """Send headers and bodies that are not what they say."""
    bomb = gzip.compress(b"[" + b" " * (64 << 20))
    return [
        await attack.post("/tokenize", b"not gzip", headers={"Content-Encoding": "gzip"}),
        await attack.post("/tokenize", bomb, headers={"Content-Encoding": "gzip"}),
        await attack.post("/v1/completions", b"[" * 100_000),
        await attack.post("/v1/chat/completions", {"messages": [], "chat_template_kwargs": {"self": 1}}),
    ]


async def grammars(attack: Attack) -> list[int]:
    """Send constraints that take long, many at once, and leave some of them."""
    deep: Any = {"type": "string"}
    for _ in range(30):
        deep = {"type": "object", "properties": {"a": deep, "b": deep if attack.draw.random() < 0.1 else {}}}
    kinds = ({"guided_regex": "(a|b|c|d){1,900}x"}, {"guided_json": deep}, {"guided_regex": "((a*)*)*b"},
             {"guided_grammar": "root ::= root root | \"a\""}, {"guided_choice": ["a" * 999] * 99})  # fmt: skip

    async def one(kind: dict[str, Any]) -> list[int]:
        body = {"prompt": attack.draw.choice("abc"), "max_tokens": 2, **kind}
        try:
            return [
                await attack.post("/v1/completions", body, timeout=aiohttp.ClientTimeout(attack.draw.uniform(0.1, 9)))
            ]
        except asyncio.TimeoutError:
            return []

    statuses = await asyncio.gather(*(one(attack.draw.choice(kinds)) for _ in range(6)))
    return [status for each in statuses for status in each]


async def idle_connections(attack: Attack) -> list[int]:
    """Open connections that send nothing, or half of a header."""
    opened = []
    for _ in range(50):
        _, writer = await asyncio.open_connection(*attack.address)
        writer.write(attack.draw.choice((b"", b"GET /health HTTP/1.1\r\nX-Half: ")))
        opened.append(writer)
    await asyncio.sleep(1.0)
    for writer in opened:
        writer.transport.abort()
    return []


async def spoilt_folders(attack: Attack) -> list[int]:
    """Load adapter folders that must be refused, or are harmless."""
    name = f"spoilt-{attack.draw.randrange(10**9)}"
    await asyncio.to_thread(spoil, attack.root / "maths", attack.root / name, attack.draw)
    load = {"lora_name": name, "lora_path": name}
    status = await attack.post("/v1/load_lora_adapter", load, headers=attack.admin)
    if status == 200:
        await attack.post("/v1/unload_lora_adapter", {"lora_name": name}, headers=attack.admin)
    await asyncio.to_thread(os.system, f"rm -rf '{attack.root / name}'")
    return [status]


async def leavers(attack: Attack) -> list[int]:
    """Leave in the middle of a header or a body."""
    for body in (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{",
        b"GET / HTTP/1.1\r\n",
        b"\x16",
    ):
        _, writer = await asyncio.open_connection(*attack.address)
        writer.write(body)
        await writer.drain()
        writer.transport.abort()
    return []


ATTACKS: tuple[Callable[[Attack], Awaitable[list[int]]], ...] = (
    *(long_text, long_lists, many_answers, unread_stream, strange_numbers, strange_bytes, grammars, idle_connections),
    *(spoilt_folders, leavers),
)
