"""The routes of tasks and of the base's versions. All of them need the admin key, and `--online-tasks`."""

from __future__ import annotations

from pathlib import Path

import msgspec
from aiohttp import web

from inlaid.quant.online_jobs import Order
from inlaid.quant.online_versions import losses_of
from inlaid.server.completions import answer
from inlaid.server.errors import BadRequest, Forbidden, NotFound
from inlaid.server.online import OnlineTasks
from inlaid.server.protocol.tasks import AddTaskBody, BaseCard, TaskCard, TaskList, VersionCard
from inlaid.server.service import SERVICE, Service


async def list_tasks(request: web.Request) -> web.Response:
    """List the tasks of the base with their losses, and the jobs."""
    online = _online(request)
    current = online.versions.current
    tasks = losses_of(Path(current.folder))
    return answer(TaskList(version=current.number, tasks=tasks, jobs=task_cards(online)))


async def get_task(request: web.Request) -> web.Response:
    """Describe a task: its job, or its place in the base."""
    online, name = _online(request), request.match_info["name"]
    if name in online.orders:
        return answer(_card(online, online.orders[name]))
    current = online.versions.current
    if name not in current.tasks:
        raise NotFound(f"there is no task {name!r}; GET /v1/tasks lists them", "name")
    return answer(TaskCard(name=name, version=current.number, after=losses_of(Path(current.folder))))


async def add_task(request: web.Request, body: AddTaskBody) -> web.Response:
    """Order that a task be added to the base; the job runs in the background."""
    service, online = request.app[SERVICE], _online(request)
    if (why := service.names.why_not(body.name)) is not None:
        raise BadRequest(f"{body.name!r} cannot be a task's name: {why}", "name")
    order = online.new_order(
        body.name,
        "add",
        adapter=_adapter(service, body.adapter),
        solve=body.solve,
        check=body.check,
        threshold=body.threshold,
        force=body.force,
        switch=body.switch,
        **({} if body.tolerance is None else {"tolerance": body.tolerance}),
    )
    known = online.orders.get(body.name)
    if known is None or known.state not in ("queued", "running", "switching"):
        order.data = _data(service, online, body)
    return answer(_card(online, online.add(order)))


async def delete_task(request: web.Request) -> web.Response:
    """Cancel a job, forget one that is over, or order that a task be removed from the base."""
    online, name = _online(request), request.match_info["name"]
    order = await online.delete(name)
    return answer(TaskCard(name=name, state="forgotten") if order is None else _card(online, order))


async def switch_task(request: web.Request) -> web.Response:
    """Serve the version of the base that a job has made."""
    online, name = _online(request), request.match_info["name"]
    await online.switch(name)
    return answer(_card(online, online.orders[name]))


async def get_base(request: web.Request) -> web.Response:
    """List the versions of the base that are kept."""
    return answer(base_card(_online(request)))


async def rollback(request: web.Request) -> web.Response:
    """Serve the version of the base before the present one."""
    online = _online(request)
    await online.rollback()
    return answer(base_card(online))


def _online(request: web.Request) -> OnlineTasks:
    online = request.app[SERVICE].online
    if online is None:
        raise Forbidden("adding tasks while serving is off; start with --online-tasks FOLDER, the bank of the base")
    return online


def _adapter(service: Service, named: str) -> str:
    """Return the folder of an adapter that is served or lies in an allowed folder."""
    known = service.engine.adapters.get(named)
    if named == "none" or known is not None:
        return "none" if known is None else str(Path(known.path).resolve())
    return str(service.folders.resolve(named))


def _data(service: Service, online: OnlineTasks, body: AddTaskBody) -> str:
    """Return the file with a task's data."""
    if (body.examples is None) == (body.data is None):
        raise BadRequest("give either examples or data", "examples")
    if body.data is not None:
        return str(service.folders.file(body.data, "data"))
    lines = b"\n".join(map(msgspec.json.encode, body.examples or ()))
    return str(online.jobs.write_data(body.name, lines + b"\n").resolve())


def task_cards(online: OnlineTasks) -> list[TaskCard]:
    """Describe all jobs, oldest first."""
    return [_card(online, order) for order in online.orders.values()]


def base_card(online: OnlineTasks) -> BaseCard:
    """Describe the versions of the base."""
    cards = [
        VersionCard(
            number=version.number,
            base_version=version.base_version,
            parent=version.parent,
            tasks=list(version.tasks),
            created=version.created,
            refused=version.refused,
        )
        for version in online.versions.listed
    ]
    return BaseCard(current=online.versions.current.number, versions=cards, last_switch=online.last_switch)


def _card(online: OnlineTasks, order: Order) -> TaskCard:
    report = online.report(order.name)
    return TaskCard(
        name=order.name,
        verb=order.verb,
        state=order.state,
        stage=report.stage,
        done=report.done,
        total=report.total,
        seconds=report.seconds,
        memory=msgspec.structs.asdict(report.memory),
        before=report.before,
        after=report.after,
        why=order.why,
        version=order.number,
        parent=order.parent,
        switch=_switch(online, order),
    )


def _switch(online: OnlineTasks, order: Order) -> str:
    """Say what the switch to an order's version will do."""
    rule, where = online.config.on_base_switch, online.config.base_switch_memory
    if order.state == "serving":
        return "done"
    if order.state not in ("queued", "running", "ready", "switching"):
        return "none"
    begins = "when the gate has passed" if order.switch and order.state != "ready" else f"at POST …/{order.name}/switch"
    running = {
        "finish": "requests that have begun finish on the old base",
        "recompute": "running requests keep their tokens, and their KV is computed again",
    }[rule]
    both = {"device": "both bases on the device", "host": "one base on the device, no request starts meanwhile"}
    return f"{begins}, between two steps: {running}; {both.get(where, 'both bases on the device if they fit')}"
