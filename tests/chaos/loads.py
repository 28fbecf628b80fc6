"""Adapters loaded, swapped, unloaded and asked at random, in an engine of this process: no wrong token, and not a byte
left at the end.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from inlaid.config import AdapterConfig, CacheConfig, EngineConfig
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.worker.build import Loaded, build_engine
from tests.server.live import DEMO

_PROMPTS = ([5, 6, 7], [9] * 20, list(range(30, 60)))
_NAMES, _SLOTS = 16, 3  # fewer slots than names, so that adapters are evicted too
_LAYERS = (0, 1)  # those that the adapters keep: reading all takes five times longer
_ASKED = 0.01  # share of changes before a question


class Loads:
    """One engine, and what each name stands for."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._draw = random.Random(seed)
        sources = sorted(path for path in (DEMO / "adapters").iterdir() if path.is_dir())[:6]
        self._folders = [_cut(source, folder / source.name) for source in sources]
        config = EngineConfig(
            model=str(DEMO / "base"), device="cpu", max_model_len=128,
            cache=CacheConfig(num_blocks=60), adapters=AdapterConfig(max_loras=_SLOTS),
        )  # fmt: skip
        self._loaded: Loaded = build_engine(config, {})
        self._names: dict[str, Path] = {}
        self._number = 0
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._expected = self._answers_alone()
        answers = {tuple(self._expected[path, number]) for path, number in self._expected}
        assert len(answers) > 2 * len(_PROMPTS), "the adapters' answers are too much alike to tell them apart"
        self._resident = resident_mib()

    def run(self, changes: int, seconds: float) -> dict[str, Any]:
        """Change so many times, or for so many seconds; unload all, and return what was found."""
        ends = time.monotonic() + seconds
        while self.counts["changes"] < changes and time.monotonic() < ends:
            self._change()
            if self._draw.random() < _ASKED:
                self._ask()
        for name in list(self._names):
            self._unload(name)
        self._loaded.engine.scheduler.pool.clear()
        held = self._loaded.adapters.list()
        stats = self._loaded.engine.stats()
        store: Any = self._loaded.adapters._model.adapters  # type: ignore[attr-defined]
        store.check()
        left = {"device bytes": store.used_bytes, "host bytes": store.host_bytes, "names": len(held),
                "kv blocks": stats["kv_blocks_used"] + stats["kv_blocks_cached"]}  # fmt: skip
        if any(left.values()):
            self.faults.append(f"left: {left}")
        return {
            **self.counts,
            "left": left,
            "MiB more": round(resident_mib() - self._resident, 1),
            "faults": self.faults,
        }

    def _change(self) -> None:
        name = f"n{self._draw.randrange(_NAMES)}"
        kind = self._draw.random()
        if name in self._names and kind < 0.4:
            self._unload(name)
            return
        path = self._draw.choice(self._folders)
        adapters = self._loaded.adapters
        adapters.install(name, adapters.read(str(path)), True, 0.0)
        self.counts["swapped" if name in self._names else "loaded"] += 1
        self.counts["changes"] += 1
        self._names[name] = path

    def _unload(self, name: str) -> None:
        self._loaded.adapters.remove(name)
        del self._names[name]
        self.counts["unloaded"] += 1
        self.counts["changes"] += 1

    def _ask(self) -> None:
        """Ask several adapters at once, and change some meanwhile: an answer is by the weights it began with."""
        asked = {name: path for name, path in self._names.items() if self._draw.random() < 0.6}
        requests = {self._add(name, number): (path, number) for number, (name, path) in enumerate(asked.items())}
        answers: dict[str, list[int]] = {request: [] for request in requests}
        running = set(requests)
        while running:
            for output in self._loaded.engine.step():
                answers[output.id] += output.tokens
                if output.finish_reason is not None:
                    running.discard(output.id)
            if self._draw.random() < 0.3:
                self._change()
        for request, (path, number) in requests.items():
            self.counts["answers"] += 1
            expected = self._expected[path, number % len(_PROMPTS)]
            if answers[request] != expected:
                self.faults.append(f"{path.name}, prompt {number}: {answers[request]} instead of {expected}")

    def _add(self, name: str | None, number: int) -> str:
        self._number += 1
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        prompt = _PROMPTS[number % len(_PROMPTS)]
        self._loaded.engine.add(NewRequest(id=str(self._number), prompt=list(prompt), params=params, adapter=name))
        return str(self._number)

    def _answers_alone(self) -> dict[tuple[Path, int], list[int]]:
        """Ask each adapter each prompt, with nothing beside it."""
        found: dict[tuple[Path, int], list[int]] = {}
        for path in self._folders:
            self._loaded.adapters.install("alone", self._loaded.adapters.read(str(path)), True, 0.0)
            for number in range(len(_PROMPTS)):
                request, tokens, ended = self._add("alone", number), list[int](), False
                while not ended:
                    for output in self._loaded.engine.step():
                        assert output.id == request
                        tokens += output.tokens
                        ended = output.finish_reason is not None
                found[path, number] = tokens
        self._loaded.adapters.remove("alone")
        return found


def _cut(source: Path, folder: Path) -> Path:
    """Write the adapter with a few layers alone, and a scale by which they matter."""
    folder.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"layers_to_transform": list(_LAYERS), "lora_alpha": 8 * config["lora_alpha"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(source / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if any(f".layers.{n}." in name for n in _LAYERS)}
    save_file(kept, folder / "adapter_model.safetensors")
    return folder


def resident_mib() -> float:
    """Return the memory of this process that is resident now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
