"""Adapters loaded, swapped, unloaded and evicted while requests come, run and are aborted, in any order, in every mode,
with memory apart or unified: whoever gets an answer gets the tokens of the weights that his adapter's name stood for
when he asked, and at the end nothing is held."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from inlaid.adapters.adapter import Adapter
from inlaid.adapters.loader import StreamLoader
from inlaid.adapters.modes import CACHED, MODES, PIPELINED
from inlaid.adapters.peft import read_adapter
from inlaid.adapters.store import AdapterStore
from inlaid.checkpoint import Checkpoint
from inlaid.config import CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.request import FinishReason
from inlaid.kernels.arriving import Arriving
from inlaid.kernels.cpu import cpu_kernels
from inlaid.model.kv import KVLayout
from inlaid.model.spec import read_spec
from inlaid.model.weights import load
from inlaid.runner.model_runner import ModelRunner
from inlaid.runner.unified import unify
from tests.adapters.fake_lane import FakeLane
from tests.examples import examples
from tests.oracle.oracle import adapter_settings, ask, family_config, prompts, save_adapter, save_model, serve

CPU = torch.device("cpu")
BLOCK, KV_BLOCKS, MAX_LEN = 4, 24, 32
PROMPTS = prompts(5, seed=3, longest=20)


class World:
    """A tiny model, four adapters, and what each answers alone."""

    def __init__(self, root: Path) -> None:
        self.model = root / "model"
        config = family_config("llama")
        config.num_hidden_layers = 4
        save_model(self.model, config)
        self.spec = read_spec(self.model)
        folders = [root / f"v{number}" for number in range(4)]
        for number, folder in enumerate(folders):
            save_adapter(folder, self.model, seed=number, **adapter_settings(number % 3))
        self.adapters: list[Adapter] = [read_adapter(folder, self.spec, torch.float32) for folder in folders]
        self.largest = max(adapter.flat.numel() for adapter in self.adapters)
        self._alone: dict[tuple[str | None, int], list[int]] = {}

    def engine(self, store: AdapterStore, unified: bool = False, arriving: Arriving | None = None) -> Engine:
        kernels = cpu_kernels(store.pages)
        model = load(Checkpoint(self.model), self.spec, kernels, CPU, torch.float32, MAX_LEN, progress=False)
        config = EngineConfig(
            cache=CacheConfig(block_size=BLOCK, num_blocks=KV_BLOCKS, unified_memory=unified),
            scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
        )
        layout = KVLayout.of(self.spec, config.cache, torch.float32)
        shared = unify(layout, config.cache, KV_BLOCKS, MAX_LEN, store, CPU) if unified else None
        runner = ModelRunner(model, KV_BLOCKS, BLOCK, CPU, torch.float32, store, unified=shared, arriving=arriving)
        return make_engine(
            config, runner, lambda: 0.0, num_blocks=KV_BLOCKS, max_model_len=MAX_LEN, adapters=store, pool=runner.pool
        )

    def alone(self, identity: str | None, prompt: int) -> list[int]:
        """Return the answer of an engine with this adapter only."""
        key = (identity, prompt)
        if key not in self._alone:
            store = AdapterStore(self.spec, 1, self.largest, CPU, torch.float32)
            if identity is not None:
                store.add("only", next(a for a in self.adapters if a.identity == identity))
            request = ask("r", PROMPTS[prompt], None if identity is None else "only", 6)
            self._alone[key] = serve(self.engine(store), [request])["r"].tokens
        return self._alone[key]


def machine(world: World) -> type[RuleBasedStateMachine]:
    class Lifecycle(RuleBasedStateMachine):
        @initialize(mode=st.sampled_from(MODES), unified=st.booleans())
        def begin(self, mode: str, unified: bool) -> None:
            self.lane = FakeLane()
            places = 4 if mode == CACHED else 2
            block = KVLayout(world.spec, BLOCK, torch.float32).shared_elements
            elements = (5 if mode == CACHED else 1) * world.largest + block
            self.store = AdapterStore(
                world.spec, places, elements, CPU, torch.float32, mode=mode, loader=StreamLoader(self.lane),
                shared=unified,
            )  # fmt: skip
            arriving = Arriving(self.store, world.spec.num_layers) if mode == PIPELINED else None
            self.engine = world.engine(self.store, unified, arriving)
            self.asked: dict[str, tuple[str | None, int]] = {}
            self.tokens: dict[str, list[int]] = {}
            self.numbers = itertools.count()

        @rule(name=st.sampled_from("abc"), number=st.integers(0, 3))
        def load_or_swap(self, name: str, number: int) -> None:
            self.store.replace(name, world.adapters[number])

        @precondition(lambda self: self.store.names())
        @rule(data=st.data())
        def unload(self, data: st.DataObject) -> None:
            self.store.remove(data.draw(st.sampled_from(self.store.names())))

        @rule(data=st.data(), prompt=st.integers(0, len(PROMPTS) - 1))
        def request(self, data: st.DataObject, prompt: int) -> None:
            name = data.draw(st.sampled_from([None, *self.store.names()]))
            request_id = f"r{next(self.numbers)}"
            self.asked[request_id] = (None if name is None else self.store.identity(name), prompt)
            self.tokens[request_id] = []
            self.engine.add(ask(request_id, PROMPTS[prompt], name, 6))

        @precondition(lambda self: self.asked)
        @rule(data=st.data())
        def abort(self, data: st.DataObject) -> None:
            self.engine.abort(data.draw(st.sampled_from(sorted(self.asked))))

        @rule(marks=st.integers(0, 3), steps=st.integers(1, 4))
        def go_on(self, marks: int, steps: int) -> None:
            for _ in range(marks):
                self.lane.advance()
            for _ in range(steps):
                self.step()

        def step(self) -> None:
            for output in self.engine.step():
                self.tokens[output.id] += output.tokens
                if output.finish_reason is None:
                    continue
                asked, tokens = self.asked.pop(output.id), self.tokens.pop(output.id)
                expected = world.alone(*asked)
                assert output.finish_reason in (FinishReason.LENGTH, FinishReason.ABORT), output.refusal
                assert tokens == (expected if output.finish_reason is FinishReason.LENGTH else expected[: len(tokens)])
            self.engine.scheduler.check_whole()
            self.store.check()

        def teardown(self) -> None:
            if not hasattr(self, "store"):
                return
            for _ in range(3000):
                if not self.engine.has_work:
                    break
                self.lane.advance()
                self.step()
            assert not self.asked, "somebody was never answered"
            for name in self.store.names():
                self.store.remove(name)
            assert (self.store.used_bytes, self.store.host_bytes) == (0, 0)
            self.store.check()
            pool: Any = self.engine.scheduler.pool
            pool.want(KV_BLOCKS - 1, 0, None)
            assert (pool.num_available, pool.num_lent) == (KV_BLOCKS - 1, 0)

    return Lifecycle


def test_any_order_of_everything(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = World(tmp_path_factory.mktemp("world"))
    run_state_machine_as_test(machine(world), settings=examples(60, stateful_step_count=30))
