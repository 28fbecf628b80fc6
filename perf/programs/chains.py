"""The load of versus.py: chains of draft, verdict and revision, one for each input, as a program and as HTTP calls.

A draft is made by the input's adapter, its verdict by the judge's, and some verdicts let the first adapter revise its
draft. Each role's prompt begins with the same instructions.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from inlaid.program import Condition, Program

DRAFT, VERDICT, REVISION = 16, 4, 16  # tokens
KINDS = ("distinct", "uniform", "identical")
REPEATED = 8  # inputs that are there a second time
WORDS = tuple("mother counts rings tower painter happy basket lazy feathers quiet pilot wooden stones Oslo bed".split())


Words = Callable[[random.Random, int], str]


@dataclass(frozen=True)
class Chains:
    """One load: an adapter and a text for each input, and the instructions of the roles."""

    adapters: tuple[str, ...]
    judge: str
    texts: tuple[str, ...]
    drafting: str
    judging: str
    revising: str
    revised_if: str  # stands in the verdict
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "ignore_eos": True})

    def program(self) -> Program:
        """Return all chains as one program."""
        program = Program([f"shown{number}" for number in range(len(self.texts))])
        for number, adapter in enumerate(self.adapters):
            text, draft, verdict, revised = (f"{part}{number}" for part in ("text", "draft", "verdict", "revised"))
            program.input(text)
            program.generate(draft, f"{self.drafting} {{{text}}}", adapter, max_tokens=DRAFT, **self.sampling)
            program.generate(verdict, f"{self.judging} {{{draft}}}", self.judge, max_tokens=VERDICT, **self.sampling)
            program.generate(revised, self.revising, adapter, continues=draft, max_tokens=REVISION, **self.sampling)
            when = Condition(value=verdict, test="contains", against=self.revised_if)
            program.branch(f"shown{number}", when, revised, draft)
        return program

    def body(self) -> dict[str, Any]:
        """Return the body of POST /v1/programs."""
        return {**json.loads(self.program().to_json()), "inputs": self.inputs()}

    def inputs(self) -> dict[str, str]:
        """Return the program's inputs."""
        return {f"text{number}": text for number, text in enumerate(self.texts)}


def make_chains(adapters: Sequence[str], judge: str, kind: str, count: int, words: Words, revised_if: str) -> Chains:
    """Draw a load: each input's adapter by `kind`, and texts of 12 words behind instructions of 120."""
    generator, few = random.Random(0), min(len(adapters), math.ceil(math.sqrt(count)))
    chosen = {
        "distinct": [adapters[number % len(adapters)] for number in range(count)],
        "identical": [adapters[0]] * count,
        "uniform": [adapters[generator.randrange(few)] for _ in range(count)],
    }[kind]
    texts = [words(generator, 12) for _ in range(count)]
    for number in range(REPEATED):
        texts[-1 - number], chosen[-1 - number] = texts[number], chosen[number]
    return Chains(
        adapters=tuple(chosen),
        judge=judge,
        texts=tuple(texts),
        drafting=words(generator, 120),
        judging=words(generator, 120),
        revising=" " + words(generator, 2),
        revised_if=revised_if,
    )


def plain_words(generator: random.Random, count: int) -> str:
    """Return English words."""
    return " ".join(generator.choice(WORDS) for _ in range(count))


class Client:
    """Calls of one thread after another over one connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=600)

    def post(self, path: str, body: Any) -> Any:
        data = json.dumps(body)
        self._connection.request("POST", path, data, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}: {text[:500]!r}")
        return text if path == "/flush_cache" else json.loads(text)

    def complete(self, model: str, prompt: str, max_tokens: int, sampling: dict[str, Any]) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, **sampling}
        return str(self.post("/v1/completions", body)["choices"][0]["text"])


def chain_by_http(client: Client, chains: Chains, number: int) -> str:
    """Run one chain call by call."""
    adapter, prompt = chains.adapters[number], f"{chains.drafting} {chains.texts[number]}"
    draft = client.complete(adapter, prompt, DRAFT, chains.sampling)
    verdict = client.complete(chains.judge, f"{chains.judging} {draft}", VERDICT, chains.sampling)
    if chains.revised_if not in verdict:
        return draft
    return client.complete(adapter, prompt + draft + chains.revising, REVISION, chains.sampling)


def in_sequence(url: str, chains: Chains, count: int) -> tuple[float, list[str]]:
    """Run the first chains one after another; return seconds and answers."""
    client = Client(url)
    client.post("/flush_cache", {})
    begun = time.perf_counter()
    answers = [chain_by_http(client, chains, number) for number in range(count)]
    return time.perf_counter() - begun, answers


def by_pool(url: str, chains: Chains, threads: int) -> tuple[float, list[str]]:
    """Run each chain on a thread of a pool."""
    Client(url).post("/flush_cache", {})
    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(lambda number: chain_by_http(Client(url), chains, number), range(len(chains.texts))))
    return time.perf_counter() - begun, answers


def as_program_by_http(url: str, chains: Chains) -> tuple[float, list[str]]:
    """Run all chains as one program on the server."""
    client = Client(url)
    client.post("/flush_cache", {})
    begun = time.perf_counter()
    found = client.post("/v1/programs", chains.body())
    seconds = time.perf_counter() - begun
    return seconds, [found["results"][f"shown{number}"]["value"] for number in range(len(chains.texts))]
