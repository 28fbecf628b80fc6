"""Running plans on an engine in this process. `LocalPlan` is what `Program.compile(llm)` returns."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any, Protocol

from inlaid.engine.refusal import Refusal, Refused
from inlaid.engine.request import NewRequest
from inlaid.program.call import Call
from inlaid.program.execute import Event, Job, Results, Run
from inlaid.program.options import Limits
from inlaid.program.plan import Plan
from inlaid.program.values import Failure
from inlaid.progress import Bar
from inlaid.text.encoder import RequestEncoder
from inlaid.text.stream import Piece

_FUNCTION_THREADS = 8
_PAUSE = 0.001  # seconds between two looks at functions while the engine has work

Inbox = deque[tuple[str, Piece | Refusal]]


class Requests(Protocol):
    """The engine's requests, see inlaid.llm.RequestLoop."""

    def add(self, request: NewRequest, inbox: Inbox) -> bool: ...

    def step(self) -> None: ...

    def abort(self, request_id: str) -> None: ...


class Host(Protocol):
    """A model in this process: inlaid.LLM."""

    @property
    def encoder(self) -> RequestEncoder: ...

    @property
    def block_size(self) -> int: ...

    @property
    def requests(self) -> Requests: ...

    @property
    def ids(self) -> Iterator[str]: ...

    @property
    def adapters(self) -> Collection[str]: ...


class LocalPlan:
    """A plan and the model in this process that it was compiled for.

    Executions on one model may run side by side on an event loop: they step its engine together. `seed` is that of
    calls that sample without a seed of their own; the same seed gives the same answers.
    """

    def __init__(self, plan: Plan, host: Host) -> None:
        self.plan = plan
        self._host = host

    def show(self) -> str:
        """Return the graph before and after fusion as text."""
        return self.plan.show()

    def draw(self, file: str) -> None:
        """Draw the graph to a file: .svg or .dot."""
        self.plan.write(file)

    def execute(self, inputs: Mapping[str, Any], limits: Limits | None = None, seed: int | None = None) -> Results:
        """Run the program once."""
        return self.execute_many([inputs], limits, seed, progress=False)[0]

    def execute_many(
        self,
        inputs: Sequence[Mapping[str, Any]],
        limits: Limits | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> list[Results]:
        """Run the program for each of several inputs side by side. The limits are those of all together."""
        run = Run(self.plan, inputs, limits, seed)
        with Bar(desc="calls", delay=1, leave=False, disable=not progress) as bar, closing(self._turns(run)) as turns:
            for _ in turns:
                bar.total = len(run.calls)
                bar.update(run.num_ended - bar.n)
        return run.results()

    def stream(
        self, inputs: Mapping[str, Any], limits: Limits | None = None, seed: int | None = None
    ) -> Iterator[Event]:
        """Run the program once and yield what is new about its results. Closing the iterator ends what runs."""
        with closing(self._turns(Run(self.plan, [inputs], limits, seed))) as turns:
            for events in turns:
                yield from events

    async def execute_async(
        self, inputs: Mapping[str, Any], limits: Limits | None = None, seed: int | None = None
    ) -> Results:
        """Run the program once on the event loop, which is free between steps."""
        return (await self.execute_many_async([inputs], limits, seed))[0]

    async def execute_many_async(
        self, inputs: Sequence[Mapping[str, Any]], limits: Limits | None = None, seed: int | None = None
    ) -> list[Results]:
        """Run the program for each of several inputs on the event loop."""
        run = Run(self.plan, inputs, limits, seed)
        with closing(self._turns(run)) as turns:
            for _ in turns:
                await asyncio.sleep(0)
        return run.results()

    async def stream_async(
        self, inputs: Mapping[str, Any], limits: Limits | None = None, seed: int | None = None
    ) -> AsyncIterator[Event]:
        """Run the program once on the event loop and yield what is new about its results."""
        with closing(self._turns(Run(self.plan, [inputs], limits, seed))) as turns:
            for events in turns:
                for event in events:
                    yield event
                await asyncio.sleep(0)

    def _turns(self, run: Run) -> Generator[list[Event], None, None]:
        """Step until all is done, and yield the events of each step."""
        driver = _Driver(run, self._host)
        try:
            while True:
                driver.send()
                yield run.take_events()
                if run.done:
                    return
                driver.turn()
        finally:
            driver.close()


class _Driver:
    """One run on one engine."""

    def __init__(self, run: Run, host: Host) -> None:
        self._run = run
        self._host = host
        self._inbox: Inbox = deque()
        self._calls: dict[str, Call] = {}  # by the ids of their requests
        self._functions: dict[Future[Any], Job] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._until = time.monotonic() + run.limits.seconds if run.limits.seconds else None

    def send(self) -> None:
        """Encode and send all that can go now."""
        run = self._run
        while run.unencoded or run.jobs:
            while run.unencoded:
                run.encode(run.unencoded.popleft())
            while run.jobs:
                self._start(run.jobs.popleft())
            self._add(run.take_calls())
        self._add(run.take_calls())

    def _add(self, calls: Sequence[Call]) -> None:
        for call in calls:
            request = call.request(f"program-{next(self._host.ids)}", "", 0, time.monotonic())
            try:
                if self._host.requests.add(request, self._inbox):
                    self._calls[request.id] = call
                else:
                    self._run.full(call, Refusal("the engine's queue is full"))
            except Refused as error:
                self._run.fail(call, Failure.of(call.where, error.refusal))

    def turn(self) -> None:
        """Step the engine, or wait for functions, and take what has come."""
        if self._until is not None and time.monotonic() > self._until:
            for call in self._run.stop(f"the program's {self._run.limits.seconds:g} s are over"):
                self._host.requests.abort(call.id)
            return
        if self._calls:
            self._host.requests.step()
        elif self._functions:
            left = None if self._until is None else max(0.0, self._until - time.monotonic())
            wait(self._functions, left, FIRST_COMPLETED)
        while self._inbox:
            self._take(*self._inbox.popleft())
        for future in [each for each in self._functions if each.done()]:
            self._run.returned(*_returned(self._functions.pop(future), future))

    def _take(self, request_id: str, piece: Piece | Refusal) -> None:
        call = self._calls[request_id]
        if isinstance(piece, Refusal):
            del self._calls[request_id]
            self._run.fail(call, Failure.of(call.where, piece))
            return
        if piece.finish_reason is not None:
            del self._calls[request_id]
        self._run.take(call, piece)

    def _start(self, job: Job) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_FUNCTION_THREADS, "program")
        self._functions[self._threads.submit(job.call, *job.arguments)] = job

    def close(self) -> None:
        """End what runs. A function that has begun is left to itself."""
        for request_id in self._calls:
            self._host.requests.abort(request_id)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def _returned(job: Job, future: Future[Any]) -> tuple[Job, Any]:
    """Return a function's value, or its failure."""
    error = future.exception()
    if error is None:
        return job, future.result()
    return job, Failure(job.cell.where, f"{type(error).__name__}: {error}")
