"""A live OpenAI-compatible server as a backend: token ids in, the adapter's name as the model. Ours, or any that
supports `echo` with `logprobs`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import aiohttp

from eval.backend import Ask, BackendError, Graded, check_full
from inlaid.kv_format import AUTO

BATCH = 32  # prompts in one request
AT_ONCE = 8  # requests in flight
TIMEOUT = 600.0


class ServerBackend:
    """A Backend that asks a server."""

    drafts = False  # it returns text, and the tokens that it stands for are not known for sure

    def __init__(self, url: str, base: Path, adapters: Mapping[str, Path], kv: str = AUTO.name) -> None:
        check_full(kv, "server")  # a server has the form that it was started with
        self.url = url.rstrip("/").removesuffix("/v1")
        listed = asyncio.run(_get(f"{self.url}/v1/models"))["data"]
        names = {entry["id"] for entry in listed}
        bases = [entry["id"] for entry in listed if not entry.get("parent")]
        if not bases:
            raise BackendError(f"{self.url} lists no base model")
        self.base_name = str(bases[0])
        self.refused = {name: f"{self.url} does not list it" for name in adapters if name not in names}

    def generate(self, asks: Sequence[Ask]) -> list[list[int] | str]:
        bodies = [
            {
                "prompt": list(ask.prompt),
                "max_tokens": ask.max_tokens,
                "stop": list(ask.stop),
                "model": self._model(ask),
            }
            for ask in asks
        ]
        return [choice["text"] for choice in asyncio.run(self._complete(bodies))]

    def grade(self, asks: Sequence[Ask], continuations: Sequence[Sequence[int]]) -> list[Graded]:
        bodies = [
            {"prompt": [*ask.prompt, *more], "max_tokens": 1, "echo": True, "logprobs": 1, "model": self._model(ask)}
            for ask, more in zip(asks, continuations)
        ]
        choices = asyncio.run(self._complete(bodies))
        return [
            _graded(choice["logprobs"], len(ask.prompt), len(more))
            for choice, ask, more in zip(choices, asks, continuations)
        ]

    def close(self) -> None: ...

    def _model(self, ask: Ask) -> str:
        return self.base_name if ask.adapter is None else ask.adapter

    async def _complete(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One choice for each body. Bodies that differ only in their prompt share a request."""
        groups: dict[str, list[int]] = {}
        for index, body in enumerate(bodies):
            groups.setdefault(json.dumps({**body, "prompt": None}, sort_keys=True), []).append(index)
        batches = [rows[start : start + BATCH] for rows in groups.values() for start in range(0, len(rows), BATCH)]
        choices: list[dict[str, Any]] = [{} for _ in bodies]
        in_flight = asyncio.Semaphore(AT_ONCE)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as session:

            async def ask(rows: list[int]) -> None:
                body = {**bodies[rows[0]], "prompt": [bodies[row]["prompt"] for row in rows], "temperature": 0}
                async with in_flight:
                    reply = await _post(session, f"{self.url}/v1/completions", body)
                for choice in reply["choices"]:
                    choices[rows[choice["index"]]] = choice

            await asyncio.gather(*map(ask, batches))
        return choices


def setting(url: str) -> str:
    """Return the address and the time: a server may run something else tomorrow, so that runs are kept apart."""
    return f"server at {url}, {datetime.now(timezone.utc).isoformat(timespec='seconds')}"


def _graded(logprobs: Mapping[str, Any], start: int, count: int) -> Graded:
    values = logprobs["token_logprobs"][start : start + count]
    best = [max(top.values()) for top in logprobs["top_logprobs"][start : start + count]]
    return Graded(tuple(values), tuple(value >= top - 1e-6 for value, top in zip(values, best)))


async def _get(url: str) -> Any:
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session, session.get(url) as reply:
            reply.raise_for_status()
            return await reply.json()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise BackendError(f"{url} does not answer as an OpenAI server: {error}") from error


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Any:
    try:
        async with session.post(url, json=body) as reply:
            if reply.status != 200:
                raise BackendError(f"{url} answered {reply.status}: {(await reply.text())[:300]}")
            return await reply.json()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise BackendError(f"{url} failed: {error}") from error
