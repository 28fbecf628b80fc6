"""Another base for an engine that runs: by every way and rule, the tokens are those of an engine made for that base."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inlaid.checkpoint import Checkpoint
from inlaid.config import AdapterConfig, CacheConfig, EngineConfig
from inlaid.engine.refusal import Refused
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.kernels.decode import DecodeKernel
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid
from inlaid.quant.quantize import quantize
from inlaid.quant.settings import Gate, Settings, TaskSource
from inlaid.runner.base_weights import exchange_contents, tensors_of
from inlaid.worker import messages
from inlaid.worker.bases import BaseError
from inlaid.worker.build import Loaded, build_engine
from inlaid.worker.switch import Switch
from tests.quant.tiny import write_adapter, write_base, write_data

PROMPTS = ([5, 9, 12, 40, 7, 7, 30, 31], [50, 61, 8], [9, 10, 11, 12, 13, 14])


@dataclass
class World:
    """Two quantized bases of one model, and an adapter."""

    one: Path
    two: Path
    adapter: Path
    base: Path  # both were made of it


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("bases")
    base = write_base(root / "base")
    adapter = write_adapter(root / "adapter", base, 0)
    settings = Settings(Grid(2, 32, refine=0, clip=False), CalibrationSettings(), "mean")
    for seed, name in enumerate(("one", "two")):
        source = TaskSource("t", Path("none"), write_data(root / f"{name}.jsonl", seed, 6))
        quantize(base, [source], settings, root / name, gate=Gate(force=True))
    return World(root / "one", root / "two", adapter, base)


class NowThreads:
    """Threads that do their work at once."""

    def stage(self, work: Any, then: Any) -> None:
        done: Future[Any] = Future()
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 - the caller hears it
            done.set_exception(error)
        then(done)


class Bench:
    """An engine with requests in flight, and its switch."""

    def __init__(self, folder: Path, adapter: Path, device: str = "cpu", **adapters: Any) -> None:
        config = EngineConfig(
            model=str(folder),
            device=device,
            cache=CacheConfig(block_size=4, num_blocks=200),
            adapters=AdapterConfig(max_loras=4, **adapters),
        )
        self.loaded: Loaded = build_engine(config, {"t": str(adapter)})
        self.engine = self.loaded.engine
        assert self.loaded.bases is not None
        self.answers: dict[int, Any] = {}
        self.switch = Switch(self.engine, self.loaded.bases, NowThreads(), self._answer)  # type: ignore[arg-type]
        self.tokens: dict[str, list[int]] = {}

    def _answer(self, call: messages.Call, ask: Any) -> None:
        try:
            self.answers[call.call] = ask()
        except (Refused, ValueError) as error:
            self.answers[call.call] = error

    def call(self, name: str, **arguments: Any) -> Any:
        number = len(self.answers) + 1
        self.switch.receive(messages.Call(call=number, name=name, arguments=arguments))
        return self.answers.get(number)

    def stage(self, folder: Path, where: str = "device", version: str | None = None, **adapters: str) -> Any:
        version = version or Checkpoint(folder).fingerprint()
        return self.call("stage_base", folder=str(folder), version=version, where=where, adapters=adapters, rest=0.0)

    def begin(self, prefix: str) -> None:
        for i, prompt in enumerate(PROMPTS):
            self.add(f"{prefix}{i}", prompt, "t" if i % 2 else None)

    def add(self, name: str, prompt: list[int], adapter: str | None) -> None:
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        self.engine.add(NewRequest(id=name, prompt=prompt, params=params, adapter=adapter))
        self.tokens[name] = []

    def step(self, times: int = 10**6) -> None:
        while self.engine.has_work and times:
            for output in self.engine.step():
                assert output.refusal is None, output.refusal
                self.tokens[output.id] += output.tokens
            self.switch.between_steps()
            times -= 1

    def all(self, prefix: str) -> list[list[int]]:
        return [self.tokens[f"{prefix}{i}"] for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def plain(world: World) -> dict[str, list[list[int]]]:
    """Return the tokens of each base, from an engine that never served another."""
    found = {}
    for name in ("one", "two"):
        bench = Bench(getattr(world, name), world.adapter)
        bench.begin("x")
        bench.step()
        found[name] = bench.all("x")
    assert all(one != two for one, two in zip(found["one"], found["two"], strict=True))
    return found


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("by_address", [False, True])
def test_requests_finish_on_the_base_that_they_began_on(
    world: World, plain: dict[str, list[list[int]]], where: str, by_address: bool
) -> None:
    if where == "host" and by_address:
        pytest.skip("in host memory there is one way")
    bench = Bench(world.one, world.adapter)
    if by_address:  # as where captured graphs hold the addresses
        bench.loaded.bases._model.runner.graphs = [1]  # type: ignore[union-attr]
    addresses = [t.data_ptr() for block in bench.engine.runner.model.blocks for t in tensors_of(block)]  # type: ignore[attr-defined]
    bench.begin("old")
    bench.step(4)
    assert bench.stage(world.two, where)["where"] == where
    bench.call("switch_base", version=Checkpoint(world.two).fingerprint(), rule="finish")
    bench.begin("new")
    bench.step()
    assert bench.all("old") == plain["one"]
    assert bench.all("new") == plain["two"]
    outcome = bench.answers[2]
    assert outcome["staying"] == (len(PROMPTS) if where == "device" else 0)
    assert outcome["pause"] <= outcome["seconds"]
    bench.begin("again")  # with the blocks of "new" in the prefix cache, and none of "old"
    bench.step()
    assert bench.all("again") == plain["two"]
    bench.engine.scheduler.check_whole()
    runner: Any = bench.engine.runner
    now = [t.data_ptr() for block in runner.model.blocks for t in tensors_of(block)]
    assert (now == addresses) == (by_address or where == "host")
    bench.stage(world.one, where)
    bench.call("switch_base", version=Checkpoint(world.one).fingerprint(), rule="finish")
    bench.begin("back")
    bench.step()
    assert bench.all("back") == plain["one"]


@pytest.mark.parametrize("where", ["device", "host"])
def test_recomputed_requests_keep_their_tokens_and_go_on_with_the_new_base(
    world: World, plain: dict[str, list[list[int]]], where: str
) -> None:
    bench = Bench(world.one, world.adapter)
    bench.begin("old")
    bench.step(4)
    begun = [list(tokens) for tokens in bench.all("old")]
    bench.stage(world.two, where)
    assert bench.call("switch_base", version=Checkpoint(world.two).fingerprint(), rule="recompute")["staying"] == 0
    bench.step()
    fresh = Bench(world.two, world.adapter)
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, begun, strict=True)):
        assert 0 < len(tokens) < 12
        fresh.add(f"f{i}", prompt + tokens, "t" if i % 2 else None)
    fresh.step()
    for i, tokens in enumerate(begun):
        assert bench.tokens[f"old{i}"] == (tokens + fresh.tokens[f"f{i}"])[:12]
    bench.engine.scheduler.check_whole()


def test_a_base_that_is_not_whole_or_not_ours_is_refused_and_the_old_one_serves(
    world: World, plain: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    bench = Bench(world.one, world.adapter)
    version = Checkpoint(world.two).fingerprint()
    changed = tmp_path / "changed"
    shutil.copytree(world.two, changed)
    block = changed / "model-block-001.safetensors"
    data = bytearray(block.read_bytes())
    data[-3] ^= 1
    block.write_bytes(data)
    assert "its files have changed" in str(bench.stage(changed, version=version))
    block.write_bytes(data[:-20])
    assert "bytes" in str(bench.stage(changed, version=version))

    rest = changed / "model-rest.safetensors"
    shutil.copyfile(world.two / block.name, block)
    save_file({name: tensor + 1 for name, tensor in load_file(rest).items()}, rest)
    assert "only the linears" in str(bench.stage(changed))
    assert "the adapter of task new cannot be served" in str(bench.stage(world.two, new=str(tmp_path / "gone")))
    assert "is not staged" in str(bench.call("switch_base", version=version, rule="finish"))
    assert bench.stage(world.two)["where"] == "device"
    assert bench.call("unstage_base") is None
    assert "is not staged" in str(bench.call("switch_base", version=version, rule="finish"))
    bench.begin("x")
    bench.step()
    assert bench.all("x") == plain["one"]


def test_a_kernel_with_a_copy_of_the_weights_keeps_the_base_from_being_changed(world: World) -> None:
    bench = Bench(world.one, world.adapter)
    model = bench.engine.runner.model
    model.kernels = replace(model.kernels, decode=DecodeKernel.__new__(DecodeKernel))
    with pytest.raises(BaseError, match="start with --decode-kernel layers"):
        bench.loaded.bases.stage(str(world.two), Checkpoint(world.two).fingerprint(), "device", {}, 0.0)


@pytest.mark.parametrize("where", ["device", "host"])
def test_an_adapter_computed_for_the_old_base_keeps_it_from_being_changed(
    world: World, tmp_path: Path, where: str
) -> None:
    dora = write_adapter(tmp_path / "dora", world.base, 1, use_dora=True)
    bench = Bench(world.one, world.adapter)
    version = Checkpoint(world.two).fingerprint()
    assert "dora (DoRA) would be computed" in str(bench.stage(world.two, where, dora=str(dora)))
    assert bench.stage(world.two, where)["where"] == where
    adapters = bench.loaded.adapters
    adapters.install("late", adapters.read(str(dora)), False, 0.0)
    assert "late (DoRA) are computed for the base" in str(bench.call("switch_base", version=version, rule="finish"))
    assert bench.loaded.bases is not None
    assert bench.loaded.bases.version != version
    assert bench.engine.scheduler.admitting
    adapters.remove("late")
    assert not isinstance(bench.call("switch_base", version=version, rule="finish"), Exception)
    assert bench.loaded.bases.version == version


def test_adapters_without_a_record_for_the_new_base_keep_it_from_being_served(world: World, tmp_path: Path) -> None:
    bench = Bench(world.one, world.adapter)
    identity = bench.loaded.adapters.describe("t").identity
    record = {"base_version": bench.loaded.model.base_version, "adapter_identity": identity, "adapter": "t",
              "task": "t", "metric": "m", "score": 1.0, "reference": 1.0, "drop": 0.0}  # fmt: skip
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"records": [record]}))
    gated = Bench(world.one, world.adapter, require_eval=str(report))
    refused = str(gated.stage(world.two))
    assert "1 adapters have no passing record for the new base" in refused
    assert "recorded there only for other bases" in refused
    passing = record | {"base_version": Checkpoint(world.two).fingerprint()}
    report.write_text(json.dumps({"records": [record, passing]}))
    assert gated.stage(world.two)["where"] == "device"
    gated.call("switch_base", version=Checkpoint(world.two).fingerprint(), rule="finish")
    report.write_text(json.dumps({"records": [record]}))
    with pytest.raises(ValueError, match="only for other bases"):
        gated.loaded.adapters.install("u", gated.loaded.adapters.read_ungated(str(world.adapter)), False, 0.0)  # type: ignore[attr-defined]


def test_contents_are_exchanged_and_addresses_kept(world: World) -> None:
    first, second = (Bench(folder, world.adapter).engine.runner for folder in (world.one, world.two))
    blocks: Any = [runner.model.blocks[0] for runner in (first, second)]  # type: ignore[attr-defined]
    before = [[tensor.clone() for tensor in tensors_of(block)] for block in blocks]
    exchange_contents(*blocks)
    for block, held in zip(blocks, reversed(before), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(block), held, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("rule", ["finish", "recompute"])
def test_captured_graphs_compute_with_the_new_base(world: World, where: str, rule: str) -> None:
    fresh = {}
    for folder in (world.one, world.two):
        alone = Bench(folder, world.adapter, "cuda")
        alone.begin("x")
        alone.step()
        fresh[folder] = alone.all("x")
    assert fresh[world.one] != fresh[world.two]
    bench = Bench(world.one, world.adapter, "cuda")
    runner: Any = bench.engine.runner
    assert len(runner.graphs) > 0
    addresses = [t.data_ptr() for block in runner.model.blocks for t in tensors_of(block)]
    for number, folder in enumerate((world.two, world.one)):
        bench.begin(f"during{number}-")
        bench.step(4)
        assert bench.stage(folder, where)["where"] == where
        bench.call("switch_base", version=Checkpoint(folder).fingerprint(), rule=rule)
        bench.step()
        assert bench.engine.runner is runner
        eager = runner.num_eager_steps
        bench.begin(f"after{number}-")
        bench.step()
        assert bench.all(f"after{number}-") == fresh[folder]
        assert runner.num_eager_steps == eager  # all of them were replayed
    assert [t.data_ptr() for block in runner.model.blocks for t in tensors_of(block)] == addresses
    bench.engine.scheduler.check_whole()
