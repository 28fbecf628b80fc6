"""An engine process's insides without a model: the real scheduler over FakeRunner, with prompts that misbehave on
request. `FACTORY` names it to EngineClient, `ENVIRONMENT` lets the process find it."""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from inlaid.config import EngineConfig
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.request import Batch, Grammar, NewRequest, Request
from inlaid.worker.adapters import Readers
from inlaid.worker.build import Loaded, install
from inlaid.worker.messages import AdapterInfo, ModelInfo
from tests.engine.fake_runner import EOS, VOCABULARY, FakeAdapters, FakeRunner

FACTORY = "tests.worker.fake_engine:build"
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[2])}
FAULTY = [40]  # this prompt makes add raise what nobody expects
FAULTY_WINDOW = 41.5  # this window makes fairness answer what cannot be sent
STUCK = [42]  # this prompt holds the interpreter's lock for ever in the middle of a step
FAILING = [43]  # this prompt makes the step fail that it is in
BROKEN = [44]  # and this one all steps from then on
DEADLY = [41]  # this prompt ends the process in the middle of a step
BLOCKS = 64


class _Runner(FakeRunner):
    broken = False

    def submit(self, batch: Batch) -> Any:
        if any(work.request.prompt == STUCK for work in batch.works):
            ctypes.PyDLL(None).pause()
        if any(work.request.prompt == DEADLY for work in batch.works):
            os._exit(7)
        self.broken = self.broken or any(work.request.prompt == BROKEN for work in batch.works)
        if self.broken or any(work.request.prompt == FAILING for work in batch.works):
            raise IndexError("a fault")
        return super().submit(batch)


class _Adapters:
    """Folders are only looked for; installing makes the name known to the scheduler. Reading one takes as long as a
    file `slow` lies in it."""

    def __init__(self, directory: FakeAdapters) -> None:
        self._directory = directory
        self._paths: dict[str, str] = {}

    def read(self, path: str) -> str:
        if not Path(path).is_dir():
            raise ValueError(f"adapter {path}: no such folder")
        if (refusal := Path(path) / "refusal.json").exists():
            raise ValueError(json.loads(refusal.read_text()))
        while (Path(path) / "slow").exists():
            time.sleep(0.01)
        return path

    def is_slow(self, path: str) -> bool:
        if (Path(path) / "odd").exists():
            raise RecursionError("nobody expects this of a folder")
        return (Path(path) / "slow").exists()

    def install(self, name: str, adapter: Any, in_place: bool, seconds: float, pinned: bool | None = None) -> None:
        if name in self._paths and not in_place:
            raise ValueError(f"adapter {name!r} is already loaded")
        self._paths[name] = adapter
        self._directory.names = tuple(self._paths)

    def remove(self, name: str) -> int:
        self.describe(name)
        del self._paths[name]
        self._directory.names = tuple(self._paths)
        return 0

    def leaving(self, identity: str) -> int:
        return 0

    def on_device(self) -> tuple[str, ...]:
        return tuple(self._paths)

    def list(self) -> list[AdapterInfo]:
        return [self.describe(name) for name in self._paths]

    def describe(self, name: str) -> AdapterInfo:
        if name not in self._paths:
            raise ValueError(f"adapter {name!r} is not loaded")
        return AdapterInfo(name=name, identity=name, path=self._paths[name], rank=8, bytes=1, tier="host")


def _compile(grammar: Grammar) -> None:
    """Slow until a file appears: the regex is its path; other constraints are bad ones."""
    if grammar.regex is None:
        raise ValueError("the constraint is not valid")
    while not Path(grammar.regex).exists():
        time.sleep(0.01)


class _Engine(Engine):
    def add(self, new: NewRequest) -> Request:
        if new.prompt == FAULTY:
            raise KeyError("a defect")
        return super().add(new)

    def fairness(self, window: float = 60.0) -> dict[str, Any]:
        return {"service": 10**30} if window == FAULTY_WINDOW else super().fairness(window)


def build(config: EngineConfig, adapters: Mapping[str, str], *, strict: bool = True) -> Loaded:
    if config.model == "broken":
        raise ValueError("the model is broken; mend it")
    if config.model == "huge":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nand a trace")
    directory = FakeAdapters()
    runner = _Runner(config.cache.block_size)
    made = make_engine(
        config, runner, time.monotonic, num_blocks=BLOCKS, max_model_len=900, adapters=directory, eos_ids={EOS}
    )
    engine = _Engine(made.scheduler, runner, time.monotonic, make_grammar=lambda grammar: None)
    model = ModelInfo(
        folder=config.model,
        vocab_size=VOCABULARY,
        max_model_len=900,
        num_blocks=BLOCKS,
        block_size=config.cache.block_size,
        max_loras=100,
        base_version="fake",
        device="cpu",
        dtype="none",
    )
    loaded = Loaded(engine, model, _Adapters(directory), compile_grammar=_compile)
    with Readers(adapters, loaded.adapters.read) as readers:
        install(loaded, readers, strict)
    return loaded


def build_other(config: EngineConfig, adapters: Mapping[str, str], *, strict: bool = True) -> Loaded:
    """Build an engine that serves another base."""
    loaded = build(config, adapters, strict=strict)
    return replace(loaded, model=msgspec.structs.replace(loaded.model, base_version="other"))
