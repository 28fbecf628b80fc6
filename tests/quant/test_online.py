"""The quantizing process's own parts: its pace, its bounds, its report, and the shortcuts that it may take."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from inlaid.checkpoint import Checkpoint
from inlaid.quant import online
from inlaid.quant.bank import bank_path
from inlaid.quant.blocks import BlockModel
from inlaid.quant.calibration import CalibrationSettings, Sequence
from inlaid.quant.gate import GateTask, quantized_losses
from inlaid.quant.grid import Grid
from inlaid.quant.online_jobs import Jobs, Order, Report
from inlaid.quant.pace import Pace
from inlaid.quant.quantize import Into, add_task, quantize, remove_task
from inlaid.quant.record import Record
from inlaid.quant.settings import Gate, QuantizeError, Settings, Shortcuts, TaskSource
from inlaid.quant.solver import improve, reconstruction_error, solve
from tests.quant.tiny import write_adapter, write_base, write_data

ANYWAY = Gate(force=True)
SETTINGS = Settings(Grid(4, 32, refine=1, clip=False), CalibrationSettings(), "mean")
CPU = torch.device("cpu")


@dataclass
class World:
    root: Path
    base: Path
    tasks: list[TaskSource]

    @property
    def out(self) -> Path:
        return self.root / "out"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("shortcuts")
    base = write_base(root / "base")
    sources = [
        TaskSource(name, write_adapter(root / name, base, i), write_data(root / f"{name}.jsonl", i, 8))
        for i, name in enumerate("ab")
    ]
    quantize(base, sources[:1], SETTINGS, root / "out", gate=ANYWAY)
    return World(root, base, sources)


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    """Return a copy that a test may change."""
    shutil.copytree(made.root, tmp_path / "world")
    tasks = [
        TaskSource(task.name, tmp_path / "world" / task.name, tmp_path / "world" / task.data.name)
        for task in made.tasks
    ]
    return World(tmp_path / "world", tmp_path / "world" / "base", tasks)


class Clock:
    """A clock of time and of work: work takes time, and so do sleeping and waiting for a core."""

    def __init__(self) -> None:
        self.now = self.worked = self.slept = 0.0

    def work(self, seconds: float, waiting: float = 0.0) -> None:
        self.worked += seconds
        self.now += seconds + waiting

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds

    def pace(self, share: float) -> Pace:
        return Pace(share, CPU, lambda: self.now, lambda: self.worked, self.sleep)


def test_the_pace_keeps_the_share_and_gathers_short_pieces() -> None:
    clock = Clock()
    pace = clock.pace(0.1)
    clock.work(100.0)
    pace()  # what came before the first call is not rested for
    assert clock.slept == 0
    for seconds in (1.0, 0.5, 0.001, 0.001, 0.01):
        clock.work(seconds)
        pace()
    assert clock.slept == pytest.approx(9 * 1.512)
    clock.work(1.0, waiting=7.0)  # others had the core
    pace()
    assert clock.slept == pytest.approx(9 * 1.512 + 2)
    clock.work(1.0, waiting=70.0)
    pace()
    assert clock.slept == pytest.approx(9 * 1.512 + 2)
    whole = clock.pace(1.0)
    for _ in range(2):
        clock.work(5.0)
        whole()
    assert clock.slept == pytest.approx(9 * 1.512 + 2)
    with pytest.raises(QuantizeError, match="above 0"):
        clock.pace(0.0)


def order(world: World, **more: object) -> Order:
    values = {
        "name": "b", "verb": "add", "number": 1, "parent": 0, "source": str(world.out),
        "folder": str(bank_path(world.out) / "versions" / "0001"), "bank": str(bank_path(world.out)),
        "adapter": str(world.tasks[1].adapter), "data": str(world.tasks[1].data), "share": 1.0, "force": True,
    }  # fmt: skip
    return Order(**(values | more))  # type: ignore[arg-type]


def carried_out(world: World, **more: object) -> Report:
    jobs, one = Jobs(bank_path(world.out)), order(world, **more)
    jobs.save(one)
    assert online.run(jobs.file("b")) == 0
    return jobs.report("b")


def test_an_order_makes_a_version_beside_the_folder_and_reports_losses_seconds_and_memory(world: World) -> None:
    before = {file.name: file.read_bytes() for file in world.out.iterdir()}
    report = carried_out(world)
    assert report.outcome == "ready"
    assert report.base_version == Checkpoint(bank_path(world.out) / "versions" / "0001").fingerprint()
    assert (set(report.before), set(report.after)) == ({"a"}, {"a", "b"})
    assert {"forward", "Hessians", "solving", "checking", "writing"} <= set(report.seconds)
    assert report.memory.expected > 0
    assert report.memory.peak > 0  # of this process; that of a job of its own stays below what is expected
    assert {file.name: file.read_bytes() for file in world.out.iterdir()} == before
    again = carried_out(world)  # a kill came between the version and its report
    assert (again.outcome, again.base_version) == ("ready", report.base_version)


def test_what_fails_is_reported_in_a_sentence(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = carried_out(world, memory_gib=0.01)
    assert tight.outcome == "failed"
    assert "--task-memory-gib" in str(tight.why)
    gone = carried_out(world, adapter=str(world.root / "gone"))
    assert gone.outcome == "failed"
    assert "gone" in str(gone.why)

    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(online, "add_task", full)
    assert "the disk is full; free some space" in str(carried_out(world).why)


def test_a_refused_version_is_kept_and_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from inlaid.quant import quantize as rail

    monkeypatch.setattr(rail, "why_unfit", lambda fit, vocabulary: None)
    monkeypatch.setattr(rail, "regressions", lambda before, after, tolerance: ["a: 1.0 -> 2.0 nats a token"])
    report = carried_out(world, force=False)
    assert report.outcome == "refused"
    assert "would become worse: a: 1.0 -> 2.0" in str(report.why)
    assert report.base_version == Checkpoint(bank_path(world.out) / "versions" / "0001").fingerprint()


def test_a_warm_start_keeps_what_has_hardly_moved_and_improves_the_rest(world: World) -> None:
    bank = bank_path(world.out)
    kept = add_task(
        world.out, world.tasks[1], None, ANYWAY, Into(world.root / "kept", bank), Shortcuts("warm", threshold=9.0)
    )
    assert all(site["moved"] < 9 for site in kept.sites)
    old, new = Checkpoint(world.out), Checkpoint(world.root / "kept")
    for name in old.linears:
        assert torch.equal(old.linear(name).qweight, new.linear(name).qweight)
    better = add_task(
        world.out, world.tasks[1], None, ANYWAY, Into(world.root / "better", bank), Shortcuts("warm", threshold=0.0)
    )
    for before, after in zip(kept.sites, better.sites, strict=True):
        assert after["loss"] <= before["loss"] * 1.001
    assert sum(site["loss"] for site in better.sites) < sum(site["loss"] for site in kept.sites)
    back = remove_task(world.root / "better", "b", None, ANYWAY, Into(world.root / "back", bank), Shortcuts("warm"))
    assert set(back.tasks) == {"a"}
    with pytest.raises(QuantizeError, match="not one of"):
        Shortcuts("lukewarm")


def test_a_solution_is_improved_for_another_hessian() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator)
    first, second = (torch.randn(256, 64, generator=generator) * torch.rand(64, generator=generator) for _ in range(2))
    grid = Grid(3, 32, act_order=True)
    stored = solve(weight, first.T @ first, grid)
    better = improve(stored, weight, second.T @ second, grid)
    before = reconstruction_error(weight, stored.weight_KN(), second.T @ second)
    assert better.loss < float(before)
    assert torch.equal(better.zeros_GN, stored.zeros_GN)
    assert torch.equal(better.g_idx_K, stored.g_idx_K)


def test_losses_of_shared_passes_are_those_of_each_task_alone(world: World) -> None:
    record = Record.read(world.out)
    plan_tasks = []
    for i, source in enumerate(world.tasks):
        from inlaid.adapters.peft import read_adapter
        from inlaid.model.spec import read_spec

        adapter = read_adapter(source.adapter, read_spec(world.base), torch.float32)
        sequences = tuple(Sequence(tuple(range(3 + i, 9 + i + 2 * n)), 2 + n % 3) for n in range(5))
        plan_tasks.append(GateTask(source.name, adapter, sequences))
    plan_tasks.append(replace(plan_tasks[0], name="base", adapter=None))
    model = BlockModel(Checkpoint(record.out))
    alone = quantized_losses(model, plan_tasks, lambda what: None)
    together = quantized_losses(model, plan_tasks, lambda what: None, shared=True)
    assert {name: loss.tokens for name, loss in together.items()} == {name: loss.tokens for name, loss in alone.items()}
    for name, loss in alone.items():
        assert together[name].nats == pytest.approx(loss.nats, rel=1e-5)
    assert len({round(loss.mean, 6) for loss in alone.values()}) == 3
