"""The attackers of the mix: connections that send mutated requests, and a client that sends hostile ones. They run in a
process of their own, so that the work of making large bodies delays no measured time.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.chaos.hostile import ATTACKS, Attack
from tests.chaos.mutate import Mutator
from tests.chaos.wire import Wire
from tests.server.live import ADMIN_KEY

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
STATED = frozenset({503})  # an adapter that has not come in time, or an engine that is being started again
_BODY = 2 << 20  # bytes that the server accepts


@dataclass(frozen=True)
class Rates:
    """The hostile part of the mix; 0: nothing of it."""

    askers: int = 3  # ordinary clients
    mutants: int = 2  # connections that send mutated requests
    mutants_per_second: float = 0.0  # of each; 0: as many as are answered
    attack_pause: float = 0.2  # seconds between two hostile requests
    change_pause: float = 0.1  # seconds between two changes of adapters


@dataclass
class Tally:
    """Counts and findings."""

    num_mutants: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)  # answers of 500 and more that are not stated
    slowest: list[tuple[float, str]] = field(default_factory=list)
    attacks: Counter[str] = field(default_factory=Counter)

    def note(self, status: int, what: str, seconds: float = 0.0) -> None:
        """Record an answer."""
        self.statuses[status] += 1
        if status >= 500 and status not in STATED:
            self.faults.append(f"{status} {what}")
        if len(self.slowest) < 10 or seconds > self.slowest[-1][0]:
            self.slowest.append((seconds, what[:200]))
            self.slowest.sort(reverse=True)
            del self.slowest[10:]


def attack(url: str, address: tuple[str, int], root: Path, seed: int, rates: Rates, seconds: float, most: int) -> Tally:
    """Attack a server for so many seconds, or until so many mutated requests (0: any) were answered."""
    return asyncio.run(_Attackers(url, address, root, seed, rates, most).run(seconds))


class _Attackers:
    def __init__(self, url: str, address: tuple[str, int], root: Path, seed: int, rates: Rates, most: int) -> None:
        self.url, self.address, self.root, self.seed, self.rates, self.most = url, address, root, seed, rates, most
        self.tally = Tally()

    async def run(self, seconds: float) -> Tally:
        jobs = [self._mutate(self.seed * 1000 + n) for n in range(self.rates.mutants)]
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(self.url, timeout=timeout) as session:
            if self.rates.attack_pause:
                jobs.append(self._attack(session))
            tasks = [asyncio.create_task(job) for job in jobs]
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome
        return self.tally

    async def _mutate(self, seed: int) -> None:
        mutator, wire = Mutator(seed, ADMIN_KEY, 3 << 20), Wire(self.address)
        pause = 1 / self.rates.mutants_per_second if self.rates.mutants_per_second else 0.0
        while not self.most or self.tally.num_mutants < self.most:
            sent = mutator.next()
            try:
                reply = await wire.ask(sent)
            except asyncio.TimeoutError:
                self.tally.faults.append(f"no answer: {sent.raw[:2000]!r}")
                wire.close()
                continue
            except OSError:  # the server is being started again
                await asyncio.sleep(0.1)
                continue
            self.tally.num_mutants += 1
            if self.tally.num_mutants % 10_000 == 0:
                print(f"{self.tally.num_mutants} mutated requests, {self.tally.faults}", file=sys.stderr, flush=True)
            self.tally.note(reply.status, f"{sent.raw[:2000]!r}: {reply.body[:300]!r}", reply.seconds)
            await asyncio.sleep(pause)

    async def _attack(self, session: aiohttp.ClientSession) -> None:
        draw = random.Random(self.seed)
        victim = Attack(session, self.address, ADMIN, self.root, draw, _BODY)
        while True:
            kind = draw.choice(ATTACKS)
            started = time.monotonic()
            try:
                statuses = await kind(victim)
            except (aiohttp.ClientError, ConnectionError):
                statuses = []  # the server has closed the connection, as it may
            for status in statuses:
                self.tally.note(status, kind.__name__, time.monotonic() - started)
            self.tally.attacks[kind.__name__] += 1
            await asyncio.sleep(self.rates.attack_pause)
