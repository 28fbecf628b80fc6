"""Ordinary traffic: streamed greedy answers of several adapters, each compared with the one that was given undisturbed,
and the time between their tokens.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_BEHIND = 0.05  # seconds between two looks of the probes


@dataclass(frozen=True)
class Question:
    model: str
    prompt: str
    max_tokens: int = 16

    @property
    def body(self) -> dict[str, Any]:
        """The request for a streamed greedy answer with its tokens."""
        asked = {"model": self.model, "messages": [{"role": "user", "content": self.prompt}]}
        return {**asked, "max_tokens": self.max_tokens, "temperature": 0, "stream": True, "return_token_ids": True}


PROMPTS = ("What is 12 + 7?", "Translate: the cat sat.", "A long story about a river", "Why?")


def questions(models: list[str]) -> list[Question]:
    """Return every prompt for every model."""
    return [Question(model, prompt) for model in models for prompt in PROMPTS]


@dataclass
class Seen:
    """The outcome of ordinary traffic and of the probes."""

    answers: int = 0
    refused: int = 0  # 429 and 503 that were asked again
    broken: int = 0  # ended by a killed engine or server, and asked again
    wrong: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # seconds between two events of a stream
    health: list[float] = field(default_factory=list)  # seconds until /health answered
    control: list[float] = field(default_factory=list)  # seconds that this process itself was late at the same times


class Refused(Exception):
    """The server did not take the request."""


async def answer(session: aiohttp.ClientSession, question: Question, seen: Seen) -> list[int]:
    """Return the tokens of an answer. Refused: 429 or 503, or the stream ended with an error."""
    tokens: list[int] = []
    async with session.post("/v1/chat/completions", json=question.body, headers={"X-Tenant": "ordinary"}) as response:
        if response.status in (429, 503):
            raise Refused(await response.text())
        if response.status != 200:
            raise AssertionError(f"{response.status}: {await response.text()}")
        last = None
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise Refused(str(event["error"]))
            now = time.monotonic()
            new = [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
            if new and last is not None:
                seen.gaps.append(now - last)
            last = now if new else last
            tokens += new
    return tokens


async def references(session: aiohttp.ClientSession, asked: list[Question]) -> dict[Question, list[int]]:
    """Ask each question alone."""
    nobody = Seen()
    return {question: await answer(session, question, nobody) for question in asked}


async def ask_on(
    session: aiohttp.ClientSession, expected: dict[Question, list[int]], seen: Seen, seed: int, pause: float
) -> None:
    """Ask for ever, and compare."""
    draw = random.Random(seed)
    while True:
        question = draw.choice(list(expected))
        try:
            tokens = await answer(session, question, seen)
        except Refused:
            seen.refused += 1
        except (aiohttp.ClientError, ConnectionError):
            seen.broken += 1
        else:
            seen.answers += 1
            if tokens != expected[question]:
                seen.wrong.append(f"{question}: {tokens} instead of {expected[question]}")
        await asyncio.sleep(pause)


async def probe(session: aiohttp.ClientSession, seen: Seen) -> None:
    """Ask for /health again and again. How late this process wakes up shows what the machine adds to every time."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(_BEHIND)
        now = time.monotonic()
        seen.control.append(now - before - _BEHIND)
        try:
            async with session.get("/health") as response:
                await response.read()
        except (aiohttp.ClientError, ConnectionError):
            seen.broken += 1
        else:
            seen.health.append(time.monotonic() - now)


def summary(values: list[float]) -> dict[str, float]:
    """Return count, median, 99th percentile and maximum, in milliseconds."""
    if not values:
        return {"count": 0}
    ordered = sorted(values)
    at = lambda share: round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)  # noqa: E731
    return {"count": len(ordered), "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1.0)}
