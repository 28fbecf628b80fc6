"""Gather the state of the console once a second for all pages: from the engine, from the meters and from the tasks.

While no page is open, only the engine's counts are read each second, and the adapters every half minute. Lists that
take the engine long are asked for less often: at most 2% of its time goes into them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from inlaid import __version__
from inlaid.adapters.gate import GateError, read, why_not
from inlaid.console.feed import Feed, Level
from inlaid.console.history import LoadHistory, ResidencyHistory
from inlaid.console.split import MeasuredSplit, fitted
from inlaid.console.state import Section, State
from inlaid.console.traffic import UNUSED
from inlaid.engine.step_log import Step
from inlaid.server.service import Service
from inlaid.server.tasks import base_card, task_cards
from inlaid.worker.errors import EngineDead
from inlaid.worker.messages import AdapterInfo

log = logging.getLogger(__name__)

_TICK = 1.0
_PATIENCE = 5.0  # seconds that the engine may take to answer
_MOST_TIME = 0.02  # share of the engine's time that one kind of question may take
_LONGEST = 10.0  # seconds between two such questions, however long an answer takes
_UNWATCHED = 30.0  # seconds between two looks at the adapters while no page is open
_SELDOM = 60.0  # seconds between two measurements of what hardly changes
_HISTORY = 900.0  # seconds of service per tenant that a page begins with
_HISTORY_PACE = 5.0
ADAPTER_COLUMNS = (
    *("tier", "rank", "bytes", "held", "hits", "loads", "evictions", "reads", "load_seconds", "copy_seconds"),
    *("pinned", "draining", "identity"),
    *("queue", "running", "requests", "tokens", "last_used", "attainment"),
    *("ttft_p50", "ttft_p99", "itl_p50", "itl_p99"),
)


class _Paced:
    """An answer of the engine that is asked for anew as often as its cost allows."""

    def __init__(self, ask: Callable[[], Awaitable[Any]], least: float) -> None:
        self._ask, self._least = ask, least
        self._next = 0.0
        self.value: Any = None
        self.fresh = False

    async def get(self) -> Any:
        """Return the answer, asked for now if that is due."""
        began = time.monotonic()
        self.fresh = began >= self._next
        if self.fresh:
            self.value = await asyncio.wait_for(self._ask(), _PATIENCE)
            ended = time.monotonic()
            pause = min((ended - began) / _MOST_TIME, _LONGEST)
            self._next = began + max(self._least, pause) - _TICK / 2
        return self.value


class ConsoleState:
    """The state of one server's console."""

    def __init__(self, service: Service) -> None:
        self._service = service
        engine = service.engine
        self.feed = Feed()
        self._load, self._residency = LoadHistory(), ResidencyHistory()
        self._adapters = _Paced(engine.list_adapters, _TICK)
        self._fairness = _Paced(lambda: engine.call("fairness", window=60.0), _TICK)
        self._queue = _Paced(lambda: engine.call("queue", most=20), _TICK)
        self._steps = _Paced(lambda: engine.call("steps"), 10.0)
        self._sums = _Paced(lambda: engine.call("step_split"), _TICK)
        self._floor = _Paced(lambda: engine.call("step_floor"), _SELDOM)
        self._measured = MeasuredSplit()
        self._least: dict[str, float] = {}  # floor of a step
        self._service_history = _Paced(
            lambda: engine.call("service_history", seconds=_HISTORY, pace=_HISTORY_PACE), _HISTORY_PACE
        )
        self._split: Section = {}
        self._last: tuple[float, dict[str, float], int, int] | None = None
        self._listed_at = 0.0
        self._known: dict[str, tuple[int, int]] = {}  # each adapter's loads and reads when last seen
        self.cold_starts: dict[str, dict[str, float | str]] = {}
        self._accuracy: tuple[str, Section] | None = None

    async def run(self) -> None:
        """Publish a state each second until cancelled."""
        try:
            due = time.monotonic()
            while True:
                await self._tick()
                due = max(due + _TICK, time.monotonic() + _TICK / 10)
                await asyncio.sleep(due - time.monotonic())
        finally:
            self.feed.close()

    async def _tick(self) -> None:
        service = self._service
        service.metrics.traffic.roll()
        engine, up = service.engine, True
        try:
            point = self._point(await asyncio.wait_for(engine.call("stats"), _PATIENCE))
            self._load.add(point)
            await self._look_at_adapters()
        except (EngineDead, asyncio.TimeoutError) as error:
            point, up = {"t": round(time.time(), 1)}, False
            log.debug("the console has no figures: %s", error)
        if self.feed.num_viewers:
            self.feed.publish(await self._state(point, up), self._load.columns())

    def _point(self, stats: dict[str, float]) -> dict[str, float | None]:
        """Return the load since the point before."""
        traffic = self._service.metrics.traffic
        now = time.monotonic()
        then, before, requests, tokens = self._last or (now - _TICK, stats, traffic.num_requests, traffic.num_tokens)
        if stats["steps"] < before["steps"]:
            before = dict.fromkeys(stats, 0.0)  # the engine process is a new one
        self._last = (now, stats, traffic.num_requests, traffic.num_tokens)
        passed = max(1e-3, now - then)
        steps = stats["steps"] - before["steps"]
        seconds = stats["step_seconds"] - before["step_seconds"]
        blocks = max(1, stats["kv_blocks"])
        ttft, itl = traffic.first.percentiles(), traffic.between.percentiles()
        return {
            "t": round(time.time(), 1),
            "requests": round((traffic.num_requests - requests) / passed, 2),
            "tokens": round((traffic.num_tokens - tokens) / passed, 1),
            "running": stats["running"],
            "waiting": stats["waiting"],
            "ttft_p50": ttft[0],
            "ttft_p99": ttft[1],
            "itl_p50": itl[0],
            "itl_p99": itl[1],
            "kv_used": round(stats["kv_blocks_used"] / blocks, 4),
            "kv_cached": round(stats["kv_blocks_cached"] / blocks, 4),
            "preemptions": round((stats["preemptions"] - before["preemptions"]) / passed, 2),
            "busy": round(min(1.0, seconds / passed / max(1, len(self._service.engine.replica_states))), 3),
            "step": float(f"{seconds / steps:.3g}") if steps else None,
            "on_device": sum(info.tier == "device" for info in self._service.engine.adapters.values()),
        }

    async def _look_at_adapters(self) -> None:
        """Note where the adapters are; seldom, while no page is open."""
        now = time.monotonic()
        if not self.feed.num_viewers and now - self._listed_at < _UNWATCHED:
            return
        self._listed_at = now
        listed: list[AdapterInfo] = await self._adapters.get()
        if not self._adapters.fresh:
            return
        self._residency.note(
            time.time(), ((info.name, info.tier == "device", info.loads, info.evictions) for info in listed)
        )
        traffic = self._service.metrics.traffic
        traffic.forget(info.name for info in listed)
        for info in listed:
            one = traffic.by_adapter.get(info.name)
            if one is None:
                continue
            loads, reads = self._known.get(info.name, (0, -1))
            if info.loads > loads and one.slowest:
                self.cold_starts[info.name] = cold_start(info, info.reads > reads, one.slowest)
            one.slowest = 0.0
        self._known = {info.name: (info.loads, info.reads) for info in listed}
        self.cold_starts = {name: cold for name, cold in self.cold_starts.items() if name in self._known}

    async def _state(self, point: dict[str, float | None], up: bool) -> State:
        """Return all sections that somebody who looks may see."""
        service = self._service
        state: State = {"load": dict(point), "server": self._server(up)}
        highest = max(self.feed.levels, default=Level.READER)
        if not up:
            return state
        listed: list[AdapterInfo] = await self._adapters.get()
        state["adapters"] = self._rows(listed)
        state["residency"] = {**self._residency.minutes()}
        state["thrashing"] = dict(self._residency.thrashing())
        try:
            if highest >= Level.OPERATOR:
                await self._fair(state)
            state["step"] = await self._step()
        except (EngineDead, asyncio.TimeoutError, ValueError) as error:
            log.debug("the console lacks some figures: %s", error)
        state["accuracy"] = await self._accuracy_of(listed)
        if highest >= Level.ADMIN:
            state["paths"] = {info.name: info.path for info in listed}
            if service.online is not None:
                state["tasks"] = {card.name: msgspec.to_builtins(card) for card in task_cards(service.online)}
                state["base"] = msgspec.to_builtins(base_card(service.online))
        return state

    async def _step(self) -> Section:
        """Split the time of a step into its parts: as they were measured, or by a fit where the engine cannot."""
        if sums := await self._sums.get():
            if self._sums.fresh and self._last is not None:
                self._measured.add(sums, self._last[1]["steps"], self._last[1]["step_seconds"])
            self._split = self._measured.mean() or {**self._split, "how": "measured"}
        else:
            steps = await self._steps.get()
            if self._steps.fresh:
                self._split = fitted(msgspec.convert(steps, list[Step]))
        floor = await self._floor.get()
        if self._floor.fresh and floor.get("rate", 0.0) > self._least.get("rate", 0.0):
            self._least = floor  # of several: a busy machine copies more slowly than it can
        return {**self._split, "floor": self._least}

    async def _fair(self, state: State) -> None:
        engine = self._service.engine
        fairness = dict(await self._fairness.get())
        state["tenants"] = fairness.pop("tenants")
        state["fairness"] = {**fairness, "queue": await self._queue.get()}
        state["scheduler"] = await engine.call("scheduler")
        history = await self._service_history.get()
        state["service"] = {"pace": history["pace"], **{f"/{name}": row for name, row in history["tenants"].items()}}

    def _server(self, up: bool) -> Section:
        service, model = self._service, self._service.engine.model
        assert model is not None
        return {
            "up": up,
            "why": None if up else service.engine.last_death or "the engine process does not answer",
            "restarts": service.engine.num_restarts,
            "replicas": service.engine.replica_states,
            "version": __version__,
            "model": service.names.base,
            "base_version": model.base_version,
            "device": model.device,
            "dtype": model.dtype,
            "max_model_len": model.max_model_len,
            "kv_blocks": model.num_blocks,
            "block_size": model.block_size,
            "max_loras": model.max_loras,
            "started": service.started,
            "chat": service.tokenizer.template.exists,
            "tenant": service.engine.config.scheduler.tenant,
            "runtime_lora": service.config.allow_runtime_lora,
            "online_tasks": service.online is not None,
            "has_admin": service.keys.has_admin,
            "draining": service.draining,
            "columns": ADAPTER_COLUMNS,
        }

    def _rows(self, listed: Iterable[AdapterInfo]) -> Section:
        """Return a row for the base, under an empty name, and for each adapter."""
        traffic, draining = self._service.metrics.traffic, self._service.draining_adapters
        base = ("device", 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, False, False, "", *traffic.of(None).row())
        rows: Section = {"": base}
        for info in listed:
            rows[info.name] = (
                *(info.tier, info.rank, info.bytes, info.requests, info.hits, info.loads, info.evictions, info.reads),
                *(_short(info.load_seconds), _short(info.copy_seconds), info.pinned, info.name in draining),
                info.identity[:12],
                *(UNUSED if (one := traffic.by_adapter.get(info.name)) is None else one.row()),
            )
        return rows

    async def _accuracy_of(self, listed: Iterable[AdapterInfo]) -> Section:
        """Return the accuracy records of the base that is served, read anew when it or the adapters change."""
        service, model = self._service, self._service.engine.model
        assert model is not None
        key = f"{model.base_version} {sorted(info.identity for info in listed)}"
        if self._accuracy is None or self._accuracy[0] != key:
            config = service.engine.config.adapters
            names = {info.identity: info.name for info in listed}
            section = await asyncio.to_thread(
                accuracy, Path(model.folder), config.require_eval, model.base_version, config.max_drop, names
            )
            self._accuracy = key, section
        return self._accuracy[1]


def cold_start(info: AdapterInfo, was_read: bool, ttft: float) -> dict[str, float | str]:
    """Return the parts of an adapter's last load to the device, in seconds, and where it came from: from `disk` while
    the request waited, from `host` memory, or from host memory where it lay since it was `registered`."""
    origin = "disk" if was_read and ttft >= info.load_seconds else "registered" if info.loads == 1 else "host"
    read = 0.0 if origin == "host" else info.load_seconds
    check = min(read, info.check_seconds)
    return {"origin": origin, "read": read - check, "check": check, "copy": info.copy_seconds, "ttft": ttft}


def _short(seconds: float) -> float:
    return float(f"{seconds:.3g}")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that lie in groups as one list."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found


def accuracy(folder: Path, report: str, base_version: str, max_drop: float, names: Mapping[str, str]) -> Section:
    """Return the quantizer's record of a base, and the records of the accuracy gate for it.

    The first is `inlaid.json` of a folder that `inlaid quantize` wrote, the second the report of --require-eval.
    """
    found: Section = {"tasks": {}, "settings": {}, "date": None, "records": [], "fault": None}
    file = folder / "inlaid.json"
    try:
        values = json.loads(file.read_bytes())
        found["settings"] = _flat(values["settings"])
        found["tasks"] = {
            str(name): {
                "adapter": names.get(str(task.get("adapter_hash", "")), ""),
                "full": task.get("loss_full"),
                "quantized": task.get("loss_quantized"),
                "checked": task.get("checked"),
            }
            for name, task in values["tasks"].items()
        }
        found["date"] = round(file.stat().st_mtime)
    except FileNotFoundError:
        pass  # not made by `inlaid quantize`
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found["fault"] = f"inlaid.json cannot be read: {type(error).__name__}"
    if report:
        try:
            date = round(Path(report).stat().st_mtime)
            found["records"] = [
                {
                    "adapter": names.get(record.adapter_identity, record.adapter),
                    "task": record.task,
                    "metric": record.metric,
                    "score": record.score,
                    "reference": record.reference,
                    "drop": record.drop,
                    "why": why_not(record, max_drop),
                    "date": date,
                }
                for record in read(report)
                if record.base_version == base_version
            ]
        except (OSError, GateError) as error:
            found["fault"] = str(error) if isinstance(error, GateError) else "the report of --require-eval is gone"
    return found
