"""OnlineTasks: tasks that are added to the base, or removed from it, while it serves.

One background task of the server carries out the orders one by one: a process quantizes a new version beside the bank
(`inlaid.quant.online`), the version is listed when it is whole, and the engine switches to it. The orders are files, so
that a server that is started again goes on where it was.

What decides (orders, versions, the gate's verdict, when to switch) is here; what a switch is, behind the protocol
`Switches`: an engine, or several that stage all and then switch all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from inlaid.config import ConfigError, EngineConfig, TaskConfig
from inlaid.engine.refusal import Refused
from inlaid.quant.online_jobs import Jobs, Order, Report
from inlaid.quant.online_versions import Version, VersionError, Versions, bank_keys_of
from inlaid.server.errors import Conflict, NotFound, Unavailable
from inlaid.worker.errors import EngineDead, EngineError

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3  # of a process that ends without a report
_UNFINISHED = ("queued", "running", "ready", "switching")

RunProcess = Callable[[Path, Mapping[str, str]], Awaitable[int]]


class Switches(Protocol):
    """The engine, or several, as a switch needs it: stage everywhere, then switch everywhere."""

    @property
    def adapters(self) -> Mapping[str, Any]: ...

    async def stage_base(
        self, folder: str, version: str, where: str, adapters: Mapping[str, str], rest: float
    ) -> Any: ...

    async def switch_base(self, version: str, rule: str) -> dict[str, Any]: ...

    async def unstage_base(self) -> None: ...


class OnlineTasks:
    """The orders of one bank and the versions that came of them."""

    def __init__(
        self,
        config: TaskConfig,
        versions: Versions,
        engine: Switches,
        device: str = "cpu",
        run_process: RunProcess | None = None,
    ) -> None:
        self.config, self.versions, self.engine, self.device = config, versions, engine, device
        self.jobs = Jobs(Path(config.online_tasks))
        self.orders: dict[str, Order] = self.jobs.orders()
        self.last_switch: dict[str, Any] | None = None
        self._run_process = run_process or run_quantizer
        self._wake = asyncio.Event()
        self._switching = asyncio.Lock()
        self._working: asyncio.Task[int] | None = None
        self._name = ""  # of the order being carried out

    # Orders.

    def add(self, order: Order) -> Order:
        """Queue an order. Conflict: the task is in the base, or has an order that is not done."""
        known, tasks = self.orders.get(order.name), self.versions.current.tasks
        if known is not None and known.state in _UNFINISHED:
            raise Conflict(f"task {order.name!r} has a job already, which is {known.state}; DELETE it first", "name")
        if order.verb == "add" and order.name in tasks:
            raise Conflict(f"task {order.name!r} is in the base already; DELETE it first", "name")
        if known is not None and known.state == "failed" and known.verb == order.verb and known.number:
            order.number, order.parent, order.source, order.folder = (
                known.number,
                known.parent,
                known.source,
                known.folder,
            )  # fmt: skip - its job goes on with what it has
        self._save(order)
        self._wake.set()
        return order

    async def delete(self, name: str) -> Order | None:
        """Cancel a job, forget one that is over, or order the removal of a task in the base; returns the order that is
        left.
        """
        order = self.orders.get(name)
        if order is not None and order.state == "switching":
            raise Conflict(
                f"task {name!r} is being switched to, which cannot be called off; roll it back when it is done "
                "(POST /v1/base/rollback)"
            )
        if order is not None and order.state in ("queued", "running"):
            self._end(order, "cancelled", "it was cancelled")
            if self._name == name and self._working is not None:
                self._working.cancel()
            return order
        if order is not None and not (order.state == "serving" and name in self.versions.current.tasks):
            del self.orders[name]
            self.jobs.forget(name)
            self._clean()
            return None
        if name not in self.versions.current.tasks:
            raise NotFound(f"there is no task {name!r}; GET /v1/tasks lists them", "name")
        if len(self.versions.current.tasks) == 1:
            raise Conflict(f"{name!r} is the only task of the base, which is quantized for at least one", "name")
        return self.add(self.new_order(name, "remove"))

    def new_order(self, name: str, verb: Any, **more: Any) -> Order:
        """Return an order with this server's options."""
        config = self.config
        device = self.device if config.task_device == "auto" else config.task_device
        values: dict[str, Any] = {
            "number": 0, "parent": 0, "source": "", "folder": "", "bank": config.online_tasks,
            "tolerance": config.task_tolerance, "device": device, "share": config.task_gpu_share,
            "threads": config.task_threads, "memory_gib": config.task_memory_gib,
            "gpu_memory_gib": config.task_gpu_memory_gib, "created": time.time(),
        }  # fmt: skip
        return Order(name=name, verb=verb, **(values | more))

    def report(self, name: str) -> Report:
        return self.jobs.report(name)

    # Carrying out.

    async def run(self) -> None:
        """Carry out orders one by one, for ever."""
        while True:
            order = next((each for each in self._by_age() if each.state in ("queued", "running")), None)
            if order is None:
                self._wake.clear()
                await self._wake.wait()
            else:
                await self._carry_out(order)

    def _by_age(self) -> list[Order]:
        return sorted(self.orders.values(), key=lambda order: (order.state != "running", order.created))

    async def _carry_out(self, order: Order) -> None:
        self._name = order.name
        try:
            self._plan(order)
            status = await self._work(order)
        except OSError as error:
            self._end(order, "failed", f"{error}; mend that, and ask for the task again")
            return
        finally:
            self._name, self._working = "", None
        if order.state == "running":
            await self._conclude(order, status)

    def _plan(self, order: Order) -> None:
        """Let an order make a version of what is served now."""
        current = self.versions.current
        if not order.number or order.parent != current.number:
            order.number, order.parent, order.source = self.versions.reserve(), current.number, current.folder
            order.folder = str(self.versions.folder_of(order.number))
        order.keep = sorted(set[str]().union(*(bank_keys_of(Path(each.folder)) for each in self.versions.listed)))
        order.state, order.why = "running", None
        Path(order.folder).parent.mkdir(parents=True, exist_ok=True)
        self.jobs.begin(order.name)
        self._save(order)

    async def _work(self, order: Order) -> int:
        """Run the process to its end, and return its exit status."""
        environment = {"OMP_NUM_THREADS": str(order.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        log.info("task %s: version %d is being made", order.name, order.number)
        self._working = asyncio.ensure_future(self._run_process(self.jobs.file(order.name), environment))
        try:
            return await asyncio.shield(self._working)
        except asyncio.CancelledError:
            if order.state != "cancelled":  # the server ends
                self._working.cancel()
                await asyncio.gather(self._working, return_exceptions=True)
                raise
            await asyncio.gather(self._working, return_exceptions=True)
            return -1

    async def _conclude(self, order: Order, status: int) -> None:
        """Take up what the process has reported."""
        report = self.jobs.report(order.name)
        if not report.outcome:
            order.attempts += 1
            if order.attempts >= _MAX_ATTEMPTS:
                self._end(order, "failed", f"its process ended {order.attempts} times without a report, with {status}")
            else:
                log.warning("task %s: the process ended with %d; it goes on where it was", order.name, status)
                self._save(order)
            return
        if report.base_version:
            known = set(self.versions.current.tasks)
            tasks = known | {order.name} if order.verb == "add" else known - {order.name}
            self.versions.add(
                Version(
                    number=order.number, folder=order.folder, base_version=report.base_version, parent=order.parent,
                    tasks=tuple(sorted(tasks)), refused=report.why,
                )
            )  # fmt: skip
        self._end(order, report.outcome, report.why)
        log.info("task %s: %s%s", order.name, report.outcome, f": {report.why}" if report.why else "")
        if order.state == "ready" and order.switch:
            try:
                await self.switch(order.name)
            except (Conflict, Unavailable) as error:
                log.error("task %s: the base is not switched: %s", order.name, error)
        self._clean()

    # Switching.

    async def switch(self, name: str) -> dict[str, Any]:
        """Serve the version that a job has made. Conflict and Unavailable say why not; then the old one serves on."""
        order = self.orders.get(name)
        if order is None:
            raise NotFound(f"task {name!r} has no job; GET /v1/tasks lists them", "name")
        if order.state != "ready":
            raise Conflict(f"task {name!r} is {order.state}{f': {order.why}' if order.why else ''}", "name")
        if order.parent != self.versions.current.number:
            raise Conflict(
                f"version {order.number} was made from version {order.parent}, and version "
                f"{self.versions.current.number} is served: DELETE the job and ask for the task again"
            )
        adapters = {name: order.adapter} if order.verb == "add" and order.adapter != "none" else {}
        missing = {each: path for each, path in adapters.items() if each not in self.engine.adapters}
        order.state = "switching"
        try:
            outcome = await self._switch_to(self.versions[order.number], missing)
        except BaseException as error:
            order.state = "ready"
            self._end(order, "ready", str(error) or "the switch was interrupted")
            raise
        self._end(order, "serving", outcome.get("unsaved"))
        return outcome

    async def rollback(self) -> dict[str, Any]:
        """Serve the version before again."""
        current = self.versions.current
        try:
            before = self.versions.before()
        except VersionError as error:
            raise Conflict(str(error)) from error
        outcome = await self._switch_to(before, {})
        for order in self.orders.values():
            if order.number == current.number and order.state == "serving":
                self._end(order, "ready", f"rolled back to version {before.number}")
        return outcome

    async def _switch_to(self, version: Version, adapters: Mapping[str, str]) -> dict[str, Any]:
        if self._switching.locked():
            raise Conflict("another switch of the base is under way; try again when it is done")
        async with self._switching:
            if not version.base_version:
                raise Conflict(f"version {version.number} has never been served, so its hash is not known")
            try:
                rest = 1 / self.config.task_gpu_share - 1
                where = self.config.base_switch_memory
                staged = await self.engine.stage_base(version.folder, version.base_version, where, adapters, rest)
                outcome = await self.engine.switch_base(version.base_version, self.config.on_base_switch)
            except (EngineDead, EngineError) as error:
                raise Unavailable(
                    f"the engine did not switch ({error}); the old base is served", retry_after=5
                ) from error
            except Refused as error:
                raise Conflict(f"{error}; the old base is served") from error
            before = self.versions.current.number
            self.last_switch = {**outcome, "staged": staged, "from": before, "to": version.number, "time": time.time()}
            log.info("version %d of the base is served (a pause of %.0f ms)", version.number, 1e3 * outcome["pause"])
            try:
                self.versions.switch_to(version.number)
            except OSError as error:
                self.last_switch["unsaved"] = (
                    f"version {version.number} is served, but that could not be written down ({error}): "
                    f"after a restart version {before} serves"
                )
                log.error("%s", self.last_switch["unsaved"])
            return self.last_switch

    def _clean(self) -> None:
        """Drop versions beyond those to keep."""
        needed = {order.number for order in self.orders.values() if order.state in (*_UNFINISHED, "failed")}
        try:
            gone = self.versions.clean(self.config.keep_versions, needed)
        except OSError as error:
            log.error("old versions could not be removed: %s", error)
            return
        if gone:
            log.info("versions %s of the base are removed (--keep-versions)", ", ".join(map(str, gone)))

    def _save(self, order: Order) -> None:
        self.jobs.save(order)
        self.orders[order.name] = order

    def _end(self, order: Order, state: Any, why: str | None) -> None:
        """Let an order be in this state, on disk too if that is possible."""
        order.state, order.why = state, why
        self.orders[order.name] = order
        try:
            self.jobs.save(order)
        except OSError as error:  # a full disk must not end the server's own task
            log.error("the state of task %s could not be written: %s", order.name, error)


async def run_quantizer(order_file: Path, environment: Mapping[str, str]) -> int:
    """Run the quantizing process to its end; end it when cancelled."""
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "inlaid.quant.online",
        str(order_file),
        stdin=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def open_versions(config: TaskConfig, model: str) -> Versions:
    """Read the list of versions before anything is loaded. ConfigError says why it cannot be used."""
    if not Path(model).is_dir():
        raise ConfigError(f"--online-tasks needs a local folder made by `inlaid quantize`, not {model!r}")
    try:
        return Versions(Path(config.online_tasks), Path(model))
    except (VersionError, OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"--online-tasks: {error}") from error


def with_changing_base(config: EngineConfig) -> EngineConfig:
    """Return the settings of an engine whose base will be replaced: no kernel may keep a copy of its weights."""
    if config.decode_kernel == "one":
        raise ConfigError("--decode-kernel one keeps a copy of the weights, which --online-tasks replaces; use layers")
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            "--online-tasks replaces the base of one process, not with --tensor-parallel-size; serve with 1, or "
            "without --online-tasks"
        )
    return replace(config, decode_kernel="layers")


def adapters_of(config: TaskConfig, versions: Versions) -> dict[str, str]:
    """Return the adapters that came with tasks of the version that is served, where they still are."""
    found = {}
    for name, order in Jobs(Path(config.online_tasks)).orders().items():
        if order.verb == "add" and order.state == "serving" and name in versions.current.tasks:
            if Path(order.adapter).is_dir():
                found[name] = order.adapter
            elif order.adapter != "none":
                log.error("the adapter of task %s is gone from %s; it is not served", name, order.adapter)
    return found
