"""Orders of tasks through deaths, full disks, cancellations and refusals, with a made-up engine and quantizer."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from inlaid.config import ConfigError, EngineConfig, TaskConfig
from inlaid.engine.refusal import Refusal, Refused
from inlaid.quant.online_jobs import Order, Report, read_order, write_report
from inlaid.quant.online_versions import Version, VersionError, Versions
from inlaid.server.errors import Conflict, NotFound, Unavailable
from inlaid.server.online import OnlineTasks, adapters_of, open_versions, with_changing_base
from inlaid.worker.errors import EngineDead

Outcome = Callable[[Order], Report | int]


def write_folder(folder: Path, *tasks: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"tasks": {task: {"loss_quantized": 1.0, "bank_key": f"key-{task}"} for task in tasks}}
    (folder / "inlaid.json").write_text(json.dumps(record))
    return folder


class FakeEngine:
    """An engine that notes what it is asked to serve; `fault` is raised by the call of that name."""

    def __init__(self) -> None:
        self.adapters: dict[str, Any] = {}
        self.calls: list[str] = []
        self.faults: dict[str, Exception] = {}
        self.hold: asyncio.Event | None = None

    async def stage_base(self, folder: str, version: str, where: str, adapters: Mapping[str, str], rest: float) -> Any:
        self.calls.append(f"stage {Path(folder).name} {version} {','.join(adapters)}")
        if self.hold is not None:
            await self.hold.wait()
        self._raise("stage")
        return {"where": "device", "seconds": 0.0}

    async def switch_base(self, version: str, rule: str) -> dict[str, Any]:
        self._raise("switch")
        self.calls.append(f"switch {version} {rule}")
        return {"seconds": 0.0, "pause": 0.0, "staying": 0}

    async def unstage_base(self) -> None:
        self.calls.append("unstage")

    def _raise(self, name: str) -> None:
        if (fault := self.faults.pop(name, None)) is not None:
            raise fault


class Bench:
    """A bank, an engine, and a quantizer that does what `outcomes` say, one after the other."""

    def __init__(self, root: Path, *outcomes: Outcome, **options: Any) -> None:
        self.bank, self.first = root / "out.bank", write_folder(root / "out", "a", "b")
        self.config = TaskConfig(online_tasks=str(self.bank), **options)
        self.outcomes = list(outcomes)
        self.orders: list[Order] = []
        self.engine = FakeEngine()
        self.started = asyncio.Event()
        self.online: Any = None
        self.begin()

    def begin(self) -> None:
        """Begin as a server does that is started, or started again."""
        if self.online is not None:
            self.versions.close()
        self.versions = open_versions(self.config, str(self.first))
        self.versions.check_served("v0" if self.versions.current.number == 0 else self.versions.current.base_version)
        self.online = OnlineTasks(self.config, self.versions, self.engine, run_process=self.process)

    async def process(self, file: Path, environment: Mapping[str, str]) -> int:
        order = read_order(file)
        self.orders.append(order)
        self.started.set()
        outcome = self.outcomes.pop(0)
        found = outcome(order)
        if isinstance(found, int):
            if found < 0:
                await asyncio.Event().wait()  # it works until it is ended
            return found
        if found.base_version:
            write_folder(Path(order.folder), "a", "b", order.name)
        write_report(file, found)
        return 0

    async def settled(self, name: str) -> Order:
        """Carry out orders until this one is over."""
        task = asyncio.create_task(self.online.run())
        while self.online.orders[name].state in ("queued", "running", "switching") and not task.done():
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return self.online.orders[name]

    def add(self, name: str = "c", **more: Any) -> Order:
        return self.online.add(self.online.new_order(name, "add", adapter=f"/adapters/{name}", **more))


def made(order: Order) -> Report:
    return Report(outcome="ready", base_version=f"v{order.number}")


def run(work: Awaitable[Any]) -> Any:
    async def waited() -> Any:
        return await asyncio.wait_for(work, 20)

    return asyncio.run(waited())


def test_a_version_is_made_listed_switched_to_and_rolled_back(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path, made)
        bench.add()
        order = await bench.settled("c")
        assert (order.state, order.number, order.parent) == ("serving", 1, 0)
        assert bench.engine.calls == ["stage 0001 v1 c", "switch v1 finish"]
        assert bench.versions.current.tasks == ("a", "b", "c")
        with pytest.raises(Conflict, match="in the base already"):
            bench.add()
        await bench.online.rollback()
        assert bench.versions.current.number == 0
        assert bench.online.orders["c"].state == "ready"
        with pytest.raises(Conflict, match="none before"):
            await bench.online.rollback()
        await bench.online.switch("c")
        assert bench.versions.current.number == 1

    run(story())


def test_two_jobs_at_once_are_queued_and_the_second_starts_from_the_first(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path, made, made)
        bench.add("c")
        bench.add("d")
        assert (await bench.settled("d")).state == "serving"
        assert [(order.name, order.number, order.parent) for order in bench.orders] == [("c", 1, 0), ("d", 2, 1)]
        assert bench.orders[1].source == bench.orders[0].folder
        assert bench.orders[1].keep == ["key-a", "key-b", "key-c"]

    run(story())


def test_a_job_whose_process_dies_goes_on_and_is_given_up_after_three_deaths(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path, lambda order: 1, made)
        bench.add()
        assert (await bench.settled("c")).state == "serving"
        assert len({order.folder for order in bench.orders}) == 1  # the same version, so that it finds its work
        bench.outcomes = [lambda order: 9] * 3
        bench.add("d")
        order = await bench.settled("d")
        assert order.state == "failed"
        assert "ended 3 times without a report, with 9" in str(order.why)
        assert bench.versions.current.number == 1

    run(story())


def test_a_server_that_is_started_again_goes_on_with_the_job_and_serves_the_last_switch(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path, lambda order: -1, made)
        bench.add()
        task = asyncio.create_task(bench.online.run())
        await bench.started.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        bench.begin()
        assert bench.versions.current.number == 0
        assert bench.online.orders["c"].state == "running"
        assert (await bench.settled("c")).state == "serving"
        assert bench.orders[0].folder == bench.orders[1].folder
        bench.begin()
        assert bench.versions.current.number == 1
        assert adapters_of(bench.config, bench.versions) == {}  # its adapter has vanished
        order = bench.online.orders["c"]
        order.adapter = str(bench.first)
        bench.online.jobs.save(order)
        assert adapters_of(bench.config, bench.versions) == {"c": str(bench.first)}

    run(story())


def test_what_the_gate_refuses_is_kept_told_and_never_served(tmp_path: Path) -> None:
    async def story() -> None:
        why = "old tasks would become worse by more than 0.02: a: 1.0 -> 1.5"
        bench = Bench(tmp_path, lambda order: Report(outcome="refused", why=why, base_version="v1"))
        bench.add()
        order = await bench.settled("c")
        assert (order.state, order.why) == ("refused", why)
        assert bench.engine.calls == []
        assert bench.versions[1].refused == why
        with pytest.raises(Conflict, match="worse by more"):
            await bench.online.switch("c")
        with pytest.raises(AssertionError):
            bench.versions.switch_to(1)
        assert await bench.online.delete("c") is None
        assert "c" not in bench.online.orders

    run(story())


def test_a_full_disk_fails_the_job_and_asking_again_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        full = Report(outcome="failed", why="No space left on device: the disk is full")
        bench = Bench(tmp_path, lambda order: full, made)
        bench.add()
        assert (await bench.settled("c")).why == full.why
        assert bench.versions.current.number == 0
        bench.add()
        assert (await bench.settled("c")).state == "serving"
        assert bench.orders[0].folder == bench.orders[1].folder

        def refuse(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        bench.outcomes = [made]
        bench.add("d")
        monkeypatch.setattr(Versions, "reserve", refuse)
        order = await bench.settled("d")
        assert order.state == "failed"
        assert "No space left" in str(order.why)
        assert bench.versions.current.number == 1

    run(story())


def test_a_switch_that_cannot_be_written_down_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        bench = Bench(tmp_path, made)

        def refuse(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Versions, "switch_to", refuse)
        bench.add()
        order = await bench.settled("c")
        assert order.state == "serving"
        assert "after a restart version 0 serves" in str(order.why)

    run(story())


@pytest.mark.parametrize(
    ("call", "fault", "kind", "words"),
    [
        (
            "stage",
            Refused(Refusal("its files have changed")),
            Conflict,
            "its files have changed; the old base is served",
        ),
        ("stage", Refused(Refusal("the adapter of task c cannot be served")), Conflict, "cannot be served"),
        ("switch", EngineDead("the engine process ended"), Unavailable, "the engine process ended"),
    ],
)
def test_a_switch_that_fails_leaves_the_old_base_and_can_be_tried_again(
    tmp_path: Path, call: str, fault: Exception, kind: type[Exception], words: str
) -> None:
    async def story() -> None:
        bench = Bench(tmp_path, made)
        bench.add(switch=False)
        assert (await bench.settled("c")).state == "ready"
        bench.engine.faults[call] = fault
        with pytest.raises(kind, match=words):
            await bench.online.switch("c")
        assert bench.versions.current.number == 0
        assert bench.online.orders["c"].state == "ready"
        assert words in str(bench.online.orders["c"].why)
        await bench.online.switch("c")
        assert bench.versions.current.number == 1

    run(story())


def test_jobs_are_cancelled_but_not_in_the_middle_of_a_switch(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path, lambda order: -1, made)
        bench.add("c")
        bench.add("d", switch=False)
        work = asyncio.create_task(bench.online.run())
        await bench.started.wait()
        assert (await bench.online.delete("c")).state == "cancelled"  # type: ignore[union-attr]
        while bench.online.orders["d"].state != "ready":
            await asyncio.sleep(0)
        assert bench.online.orders["c"].state == "cancelled"
        bench.engine.hold = asyncio.Event()
        switch = asyncio.create_task(bench.online.switch("d"))
        while not bench.engine.calls:
            await asyncio.sleep(0)
        with pytest.raises(Conflict, match="cannot be called off"):
            await bench.online.delete("d")
        with pytest.raises(Conflict, match="is switching"):
            await bench.online.switch("d")
        bench.engine.hold.set()
        await switch
        assert bench.versions.current.tasks == ("a", "b", "d")
        removal = await bench.online.delete("d")
        assert removal is not None
        assert (removal.verb, removal.state) == ("remove", "queued")
        with pytest.raises(NotFound, match="no task 'z'"):
            await bench.online.delete("z")
        work.cancel()

    run(story())


def test_old_versions_go_but_never_those_that_are_needed(tmp_path: Path) -> None:
    async def story() -> None:
        bench = Bench(tmp_path, *[made] * 4, keep_versions=3)
        for name in "cdef":
            bench.add(name)
            await bench.settled(name)
        assert [version.number for version in bench.versions.listed] == [0, 3, 4]
        assert sorted(path.name for path in (bench.bank / "versions").iterdir() if path.is_dir()) == ["0003", "0004"]
        await bench.online.rollback()
        assert bench.versions.current.number == 3
        with pytest.raises(VersionError, match="no version 2; kept are 0, 3, 4"):
            bench.versions[2]

    run(story())


def test_no_kernel_keeps_a_copy_of_a_base_that_will_change() -> None:
    assert with_changing_base(EngineConfig()).decode_kernel == "layers"
    with pytest.raises(ConfigError, match="use layers"):
        with_changing_base(EngineConfig(decode_kernel="one"))


def test_a_list_of_another_base_a_broken_one_and_changed_files_are_refused_at_the_start(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(ConfigError, match="in use by another server"):
        open_versions(bench.config, str(bench.first))
    bench.versions.close()
    file = bench.bank / "versions" / "versions.json"
    with pytest.raises(ConfigError, match="not of"):
        open_versions(bench.config, str(write_folder(tmp_path / "other", "a")))
    opened = open_versions(bench.config, str(bench.first))
    with pytest.raises(VersionError, match="its files have changed"):
        opened.check_served("v9")
    opened.close()
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(ConfigError, match="cannot be used"):
        open_versions(bench.config, str(bench.first))
    file.write_bytes(whole.replace(b'"current": 0', b'"current": 7'))
    with pytest.raises(ConfigError, match="does not hold together"):
        open_versions(bench.config, str(bench.first))
    file.write_bytes(whole)
    bench.versions.add(Version(number=5, folder=str(tmp_path / "gone"), base_version="v5", tasks=(), parent=0))
    opened = open_versions(bench.config, str(bench.first))
    assert [version.number for version in opened.listed] == [0]
    with pytest.raises(ConfigError, match="made by `inlaid quantize` only"):
        open_versions(TaskConfig(online_tasks=str(tmp_path / "new.bank")), str(tmp_path))
