"""The switch to another base in the engine process: staged on a thread, then done between two steps.

    stage_base     bring the base into memory and check it; nothing that is served changes. Answered when it is ready
    switch_base    serve it from the next step on. Answered when it serves
    unstage_base   forget what is staged. Answered at once

Two calls, so that several engines can be switched together: all stage, and when all are ready all switch.

Requests in flight follow a rule. `finish`: those that have begun finish on the old base. With both bases on the device
they run beside new ones; else no request starts until they have ended. `recompute`: they keep their tokens, and KV
is made again on the new base.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from inlaid.engine.engine import Engine
from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.worker import messages
from inlaid.worker.threads import Threads

if TYPE_CHECKING:
    from inlaid.worker.bases import Bases, StagedBase

log = logging.getLogger("inlaid.engine")

SWITCH_CALLS = ("stage_base", "switch_base", "unstage_base")
FINISH, RECOMPUTE = "finish", "recompute"
_Answer = Callable[[messages.Call, Callable[[], Any]], None]


class Switch:
    """One switch at a time."""

    def __init__(self, engine: Engine, bases: Bases, threads: Threads, answer: _Answer) -> None:
        self._engine, self._bases, self._threads, self._answer = engine, bases, threads, answer
        self._staging = 0  # of the latest order; what an earlier one brings is dropped
        self._staged: StagedBase | None = None
        self._draining: tuple[messages.Call, float] | None = None  # who waits for running requests, and since when
        self._staying: frozenset[str] = frozenset()  # requests on the old base
        self._own_runner = engine.runner

    def receive(self, call: messages.Call) -> None:
        """Begin what is asked for."""
        if call.name == "stage_base":
            self._stage(call)
        elif call.name == "switch_base":
            self._begin(call)
        else:
            self._answer(call, self._unstage)

    def between_steps(self) -> None:
        """Go on with a switch that waits for requests to end."""
        if self._draining is not None and not self._engine.scheduler.num_running:
            call, began = self._draining
            self._draining = None
            self._answer(call, lambda: self._copy_in(began))
        if self._staying and not self._staying & self._engine.scheduler.requests.keys():
            self._staying = frozenset()
            self._engine.settle()
            self._engine.runner = self._own_runner
            log.info("no request is on the old base any more; its memory is free")

    def _stage(self, call: messages.Call) -> None:
        if self._draining is not None or self._staying:
            reason = "requests still finish on the base before; try again when they have ended"
            self._answer(call, lambda: _refuse(reason, RefusalKind.UNAVAILABLE))
            return
        self._staged = None
        self._staging += 1
        number = self._staging

        def take(done: Future[StagedBase]) -> dict[str, Any]:
            staged = done.result()
            if number != self._staging:
                raise _refusal("another base has been staged meanwhile, or this one was called off")
            self._staged = staged
            return {"where": staged.where, "seconds": staged.seconds}

        arguments = call.arguments
        self._threads.stage(lambda: self._bases.stage(**arguments), lambda done: self._answer(call, lambda: take(done)))

    def _unstage(self) -> None:
        if self._draining is not None:
            _refuse("the switch is under way; roll it back when it is done")
        self._staging += 1
        self._staged = None

    def _begin(self, call: messages.Call) -> None:
        staged, version, rule = self._staged, call.arguments["version"], call.arguments["rule"]
        began = time.monotonic()
        if staged is None or staged.version != version or self._draining is not None:
            self._answer(call, lambda: _refuse(f"base {version[:12]} is not staged"))
        elif staged.where == "device":
            self._answer(call, lambda: self._exchange(staged, rule, began))
        elif rule == FINISH and self._engine.scheduler.num_running:
            self._engine.scheduler.admitting = False
            self._draining = call, began
        else:
            self._answer(call, lambda: self._copy_in(began))

    def _exchange(self, staged: StagedBase, rule: str, began: float) -> dict[str, Any]:
        """Exchange two bases that both lie on the device."""
        engine, scheduler = self._engine, self._engine.scheduler
        self._bases.check_free()  # of adapters loaded since it was staged
        engine.settle()
        staying = scheduler.begun() if rule == FINISH else frozenset[str]()
        old = self._bases.exchange(staged)
        self._enter(staged, staying)
        if staying:
            self._staying, self._own_runner = staying, engine.runner
            engine.runner = self._bases.both(old, staying)
        return _outcome(began, began, len(staying))

    def _copy_in(self, began: float) -> dict[str, Any]:
        """Write a base that lies in host memory over the old one."""
        staged, scheduler = self._staged, self._engine.scheduler
        assert staged is not None
        stopped = time.monotonic()
        try:
            self._bases.check_free()  # of adapters loaded since it was staged
            self._engine.settle()
            scheduler.set_base_version(staged.version)  # preempts what runs, before its weights go
            self._bases.copy_in(staged)
            self._enter(staged, frozenset())
        finally:
            scheduler.admitting = True
        return _outcome(began, stopped, 0)

    def _enter(self, staged: StagedBase, staying: frozenset[str]) -> None:
        self._engine.scheduler.set_base_version(staged.version, staying)
        self._bases.enter(staged)
        self._staged = None


def _outcome(began: float, stopped: float, staying: int) -> dict[str, Any]:
    """Return seconds from the order to the new base, those of them in which no step could run, and how many requests
    finish on the old base.
    """
    now = time.monotonic()
    return {"seconds": now - began, "pause": now - stopped, "staying": staying}


def _refusal(message: str, kind: RefusalKind = RefusalKind.INVALID) -> Refused:
    return Refused(Refusal(message, kind))


def _refuse(message: str, kind: RefusalKind = RefusalKind.INVALID) -> None:
    raise _refusal(message, kind)
