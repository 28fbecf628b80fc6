"""A real server over an engine process without a model: 1,000 adapters, names and answers that try to run scripts, and
requests that it sends to itself.

    python -m tests.console.fake_server PORT NUM_ADAPTERS NUM_SENDERS [inlaid serve FLAG …]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from inlaid.cli import run_loop
from inlaid.config import EngineConfig, SchedulerConfig, ServerConfig, TaskConfig
from inlaid.engine.engine import make_engine
from inlaid.engine.request import Batch, Sampled, StepResult
from inlaid.flags import add_config_arguments, config_from
from inlaid.server.serving import serve
from inlaid.text.tokenizer import Tokenizer
from inlaid.worker.adapters import Readers
from inlaid.worker.build import Loaded, install
from inlaid.worker.messages import AdapterInfo, ModelInfo
from tests.console import fake_tasks
from tests.server.live import DEMO, ROOT

HOSTILE = "<img src=x onerror=window.hacked=1>"
PROTO = "__proto__"
ANSWER = " Hello <script>window.hacked=2</script> <img src=x onerror=window.hacked=3> and good bye."
TENANTS = ("alpha", "beta", "<b onmouseover=window.hacked=4>tenant</b>")
STEP_SECONDS = 0.04


class _Runner:
    """Answers every request with the same text, at the pace of a device."""

    overlap = False

    def __init__(self, answer: list[int]) -> None:
        self._answer = answer

    def submit(self, batch: Batch) -> Batch:
        time.sleep(STEP_SECONDS)
        return batch

    def collect(self, batch: Batch) -> StepResult:
        made = [work.request for work in batch.works if work.samples]
        return StepResult([Sampled(self._answer[request.num_outputs % len(self._answer)]) for request in made])


class _Adapters:
    """Names without weights, on the device once a request has asked for them; the oldest make room."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._device: dict[str, None] = {}
        self._counts: dict[str, list[int]] = {}  # by name: loads, evictions, hits, requests that hold it
        self._pinned: set[str] = set()
        self._pins: dict[str, int] = {}

    # The scheduler's side.

    def resolve(self, name: str) -> str:
        counts = self._counts[name]
        counts[2] += name in self._device
        counts[3] += 1
        return name

    def release(self, identity: str) -> None:
        self._counts[identity][3] -= 1

    def ready(self, identity: str) -> bool:
        return identity in self._device

    def want(self, identity: str) -> None:
        if identity in self._device:
            return
        idle = [name for name in self._device if name not in self._pinned and not self._pins.get(name)]
        if len(self._device) >= self._slots and idle:
            del self._device[idle[0]]
            self._counts[idle[0]][1] += 1
        if len(self._device) < self._slots:
            self._device[identity] = None
            self._counts[identity][0] += 1

    def pin(self, identity: str, pinned: bool | None = None) -> Any:
        if pinned is not None:  # the server's question
            (self._pinned.add if pinned else self._pinned.discard)(identity)
            return self.describe(identity)
        self._pins[identity] = self._pins.get(identity, 0) + 1
        return None

    def load_seconds(self, identity: str) -> tuple[float, float]:
        return 0.0, 0.0

    def unpin(self, identity: str) -> None:
        self._pins[identity] -= 1

    def rank(self, identity: str) -> int:
        return 8

    # The server's side.

    def read(self, path: str) -> str:
        return path

    def is_slow(self, path: str) -> bool:
        return False

    def install(self, name: str, adapter: Any, in_place: bool, seconds: float, pinned: bool | None = None) -> None:
        self._counts.setdefault(name, [0, 0, 0, 0])

    def remove(self, name: str) -> int:
        self._device.pop(name, None)
        return self._counts.pop(name)[3]

    def leaving(self, identity: str) -> int:
        return 0

    def parts(self, name: str) -> dict[str, dict[str, Any]]:
        matched = {"layers": [0, 1], "ranks": [8, 8], "scales": [2.0, 2.0]}
        return {"q_proj": matched, "k_proj": {"layers": [], "ranks": [], "scales": []}}

    def describe(self, name: str) -> AdapterInfo:
        if name not in self._counts:
            raise ValueError(f"adapter {name!r} is not loaded")
        loads, evictions, hits, held = self._counts[name]
        tier = "device" if name in self._device else "host"
        return AdapterInfo(
            name=name, identity=f"{hash(name) & 0xFFFFFFFFFFFF:012x}", path=f"/secret/{name}", rank=8, bytes=1 << 20,
            tier=tier, requests=held, loads=loads, evictions=evictions, hits=hits, load_seconds=0.02,
            copy_seconds=0.001 if loads else 0.0, pinned=name in self._pinned,
        )  # fmt: skip

    def list(self) -> list[AdapterInfo]:
        return [self.describe(name) for name in self._counts]


def build(config: EngineConfig, adapters: Mapping[str, str], *, strict: bool = True) -> Loaded:
    """Make the insides of the engine process."""
    directory = _Adapters(config.adapters.max_loras)
    answer = Tokenizer(config.model).encode(ANSWER, False)
    runner = _Runner(answer)
    made = make_engine(config, runner, time.monotonic, num_blocks=2000, max_model_len=1024, adapters=directory)
    model = ModelInfo(
        folder=config.model, vocab_size=4096, max_model_len=1024, num_blocks=2000, block_size=config.cache.block_size,
        max_loras=config.adapters.max_loras, base_version="fake", device="cpu", dtype="none",
    )  # fmt: skip
    bases: Any = fake_tasks.Bases(runner)
    loaded = Loaded(made, model, directory, compile_grammar=lambda grammar: None, bases=bases)
    with Readers(adapters, directory.read) as readers:
        install(loaded, readers, strict)
    return loaded


async def _send(address: str, names: list[str], seed: int, key: str) -> None:
    """Ask without end, as one client."""
    draw = random.Random(seed)
    async with aiohttp.ClientSession() as session:
        while True:
            name = draw.choice(names[:60]) if draw.random() < 0.9 else draw.choice(names)
            body = {
                "model": name,
                "prompt": [5] * draw.randint(4, 60),
                "max_tokens": draw.randint(4, 40),
                "deadline": 2,
            }
            headers = {"X-Tenant": draw.choice(TENANTS), "Authorization": f"Bearer {key}"}
            async with session.post(f"{address}/v1/completions", json=body, headers=headers) as answer:
                await answer.read()


def main() -> int:
    """Serve until told to stop."""
    port, num_adapters, num_senders, *flags = sys.argv[1:]
    parser = argparse.ArgumentParser()
    for each in (ServerConfig, TaskConfig):
        add_config_arguments(parser, each)
    args = parser.parse_args(["--port", port, *flags])
    config = config_from(args, ServerConfig, tasks=config_from(args, TaskConfig))
    model = DEMO / "base"
    if config.tasks.online_tasks:
        model = fake_tasks.quantized(Path(config.tasks.online_tasks).parent / "demo" / "base", fake_tasks.LOSSES)
    names = [HOSTILE, PROTO, *(f"adapter-{number:04}" for number in range(int(num_adapters) - 2))]
    sending: list[asyncio.Task[None]] = []

    def announce(service: Any, address: str) -> None:
        if service.online is not None:
            service.online._run_process = fake_tasks.run_process
        print(f"at: {address}", flush=True)
        key = config.admin_key or ""
        sending.extend(asyncio.ensure_future(_send(address, names, seed, key)) for seed in range(int(num_senders)))

    engine = EngineConfig(model=str(model), scheduler=SchedulerConfig(tenant="header", max_num_seqs=2))
    folder = str(DEMO / "adapters" / "code")
    return run_loop(
        serve(
            config, engine, dict.fromkeys(names, folder), announce,
            factory="tests.console.fake_server:build", environment={"PYTHONPATH": str(ROOT)},
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
