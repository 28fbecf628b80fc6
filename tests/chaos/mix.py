"""The mix: ordinary traffic whose every answer is compared, beside mutated requests, hostile requests, and adapters
that are loaded, swapped and unloaded. `test_mix.py` runs it for seconds, `python -m tests.chaos.run mix` for an hour.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.attackers import ADMIN, Rates, Tally, attack
from tests.chaos.ordinary import PROMPTS, Question, Refused, Seen, answer, ask_on, probe, questions, references, summary
from tests.server.live import ADMIN_KEY, DEMO, Live

ORDINARY = ("maths", "to_velar", "code")
_NEUTRAL = {"policy": "fcfs", "weights": {}, "limits": {}, "max_num_waiting": 4096}
_POLICIES = ("fcfs", "vtc", "drr", "lcf", "srtf", "inlaid", "priority")


def flags(root: Path, *more: str) -> list[str]:
    """Return the arguments of a server that the mix can be run against; `root` gets the adapters to load."""
    for name in ORDINARY:
        shutil.copytree(DEMO / "adapters" / name, root / name)
    adapters = [f"{name}={DEMO / 'adapters' / name}" for name in ORDINARY]
    served = [str(DEMO / "base"), "--served-model-name", "demo", "--adapter", *adapters, "--tenant", "header"]
    bounds = ["--max-model-len", "256", "--num-blocks", "200", "--max-prompts", "8", "--body-timeout", "5"]
    runtime = ["--allow-runtime-lora", "--admin-key", ADMIN_KEY, "--lora-root", str(root), "--log-level", "error"]
    return [*served, *bounds, *runtime, *more]


class Mix:
    """A run of the mix against one server."""

    def __init__(self, server: Live, root: Path, seed: int, rates: Rates) -> None:
        self.server, self.root, self.seed, self.rates = server, root, seed, rates
        self.seen, self.tally = Seen(), Tally()
        self.changes: Counter[str] = Counter()
        self.memory: list[dict[str, float]] = []

    async def run(self, seconds: float, most_mutants: int = 0) -> dict[str, Any]:
        """Run for so many seconds, or until so many mutated requests were answered, and return what happened."""
        began = time.monotonic()
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(self.server.url, connector=connector, timeout=timeout) as session:
            expected = await references(session, questions(["demo", *ORDINARY]))
            before = await self._held(session)
            await self._beside(session, expected, seconds, most_mutants)
            await session.put("/v1/scheduler", json=_NEUTRAL, headers=ADMIN)
            await self._tidy(session)
            after = await self._held(session)
        return {
            "seconds": round(time.monotonic() - began),
            "ordinary answers": self.seen.answers,
            "ordinary requests refused and asked again": self.seen.refused,
            "ordinary requests broken off": self.seen.broken,
            "wrong answers": self.seen.wrong[:20],
            "mutated requests": self.tally.num_mutants,
            "statuses": {str(status): count for status, count in sorted(self.tally.statuses.items())},
            "answers of 500 and more that are not stated": self.tally.faults[:50],
            "hostile requests": dict(self.tally.attacks),
            "changes of adapters": dict(self.changes),
            "between tokens": summary(self.seen.gaps),
            "health": summary(self.seen.health),
            "this process late by": summary(self.seen.control),
            "slowest requests": [f"{seconds:.2f} s {what}" for seconds, what in self.tally.slowest],
            "held before": before,
            "held after": after,
            "memory": self.memory,
        }

    async def _beside(
        self, session: aiohttp.ClientSession, expected: dict[Question, list[int]], seconds: float, most_mutants: int
    ) -> None:
        rates, server = self.rates, self.server
        jobs = [ask_on(session, expected, self.seen, self.seed + n, 0.05) for n in range(rates.askers)]
        jobs += [probe(session, self.seen), self._watch_memory(), self._reset(session)]
        if rates.change_pause:
            jobs.append(self._change(session, expected))
        tasks = [asyncio.create_task(job) for job in jobs]
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            attacked = pool.submit(
                attack, server.url, server.address, self.root, self.seed, rates, seconds, most_mutants
            )
            await asyncio.wait({*tasks, asyncio.wrap_future(attacked)}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome
            hostile = attacked.result()
        hostile.statuses += self.tally.statuses
        hostile.faults += self.tally.faults
        self.tally = hostile

    async def _change(self, session: aiohttp.ClientSession, expected: dict[Question, list[int]]) -> None:
        """Load, swap, ask and unload adapters under names of their own, at random."""
        draw, names, now = random.Random(self.seed), [f"changing-{n}" for n in range(4)], dict[str, str]()
        while True:
            name = draw.choice(names)
            if name in now and draw.random() < 0.4:
                await self._post(session, "unload", {"lora_name": name})
                del now[name]
            elif name in now and draw.random() < 0.5:
                question = Question(now[name], draw.choice(PROMPTS))
                try:
                    tokens = await answer(session, Question(name, question.prompt), self.seen)
                except Refused:
                    continue
                self.changes["asked"] += 1
                if tokens != expected[question]:
                    self.seen.wrong.append(f"{name} is {now[name]}: {tokens} instead of {expected[question]}")
            else:
                now[name] = draw.choice(ORDINARY)
                body = {"lora_name": name, "lora_path": now[name], "load_inplace": True}
                await self._post(session, "load", body)
            await asyncio.sleep(self.rates.change_pause)

    async def _post(self, session: aiohttp.ClientSession, what: str, body: dict[str, Any]) -> None:
        async with session.post(f"/v1/{what}_lora_adapter", json=body, headers=ADMIN) as response:
            self.tally.note(response.status, f"{what} {body}: {await response.text()}")
            self.changes[what] += 1

    async def _reset(self, session: aiohttp.ClientSession) -> None:
        """Put another policy in force, as mutated changes may have left one that refuses everybody."""
        draw = random.Random(self.seed)
        while True:
            settings = {**_NEUTRAL, "policy": draw.choice(_POLICIES)}
            async with session.put("/v1/scheduler", json=settings, headers=ADMIN) as response:
                self.tally.note(response.status, f"PUT {settings}")
            await asyncio.sleep(0.5)

    async def _watch_memory(self) -> None:
        began = time.monotonic()
        while True:
            pids = {"server": self.server.process.pid, "engine": next(iter(self.server.children()), 0)}
            mib = {f"{name} MiB": _resident_mib(pid) for name, pid in pids.items() if pid}
            self.memory.append({"at": round(time.monotonic() - began), **mib})
            print(self.memory[-1], self.seen.answers, len(self.seen.wrong), file=sys.stderr, flush=True)
            if len(self.memory) > 240:
                del self.memory[1::2]
            await asyncio.sleep(15.0 if self.memory[-1]["at"] > 60 else 3.0)

    async def _tidy(self, session: aiohttp.ClientSession) -> None:
        """Unload what was loaded, and wait until nothing runs."""
        async with session.get("/v1/adapters", headers=ADMIN) as response:
            cards = (await response.json())["adapters"]
        for card in cards:
            if card["name"] not in ORDINARY:
                await self._post(session, "unload", {"lora_name": card["name"]})
        while (await self._held(session))["running"]:
            await asyncio.sleep(0.05)

    async def _held(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """Return what the engine holds: adapters with their bytes, blocks in use, requests."""
        async with session.get("/v1/adapters", headers=ADMIN) as response:
            cards = (await response.json())["adapters"]
        async with session.get("/get_server_info", headers=ADMIN) as response:
            stats = (await response.json())["internal_states"][0]
        async with session.get("/health", headers=ADMIN) as response:
            restarts = (await response.json())["restarts"]
        return {
            "adapters": {card["name"]: card["bytes"] for card in cards},
            "kv blocks used": stats["kv_blocks_used"],
            "running": stats["running"] + stats["waiting"],
            "engine restarts": restarts,
            "failed steps": stats["failures"],
        }


def _resident_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return round(next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0), 1)
