"""Run: executions of one plan side by side, between the graph and an engine. It knows no engine: whoever drives it
encodes and sends the calls that it hands out, and brings back pieces of answers.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.engine.request import FinishReason
from inlaid.program.call import Call, Words, encode, make_call
from inlaid.program.dispatch import Dispatch
from inlaid.program.evaluate import Cell, Evaluation
from inlaid.program.nodes import Function, Map
from inlaid.program.options import Limits
from inlaid.program.plan import Plan
from inlaid.program.values import Failure
from inlaid.text.stream import Piece

Place = tuple[str, tuple[int, ...]]  # an output, and the elements of maps that lead to a part of it


class CallFailed(RuntimeError):
    """A result that is asked for has failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.where}: {failure.message}")
        self.failure = failure


@dataclass(frozen=True)
class Event:
    """Something new about a result: more of its text, or its whole value (a Failure where it failed)."""

    name: str  # the output
    path: tuple[int, ...]  # the elements of maps that lead to it
    number: int  # the execution
    text: str | None = None
    value: Any = None

    @property
    def complete(self) -> bool:
        """True when this is the whole value."""
        return self.text is None


@dataclass
class Results(Mapping[str, Any]):
    """The outputs of one execution by name, and the calls that were made for them."""

    values_by_name: dict[str, Any]
    calls: list[Call] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        """Return an output's value. CallFailed: it has none."""
        value = self.values_by_name[name]
        if isinstance(value, Failure):
            raise CallFailed(value)
        return value

    def __iter__(self) -> Any:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    @property
    def failures(self) -> dict[str, Failure]:
        """The outputs that have no value, and why."""
        return {name: value for name, value in self.values_by_name.items() if isinstance(value, Failure)}

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.values_by_name.items())


@dataclass(eq=False)
class Job:
    """A Python function to be called."""

    cell: Cell
    call: Callable[..., Any]
    arguments: list[Any]


class Run:
    """Executions of one plan."""

    def __init__(
        self, plan: Plan, inputs: Sequence[Mapping[str, Any]], limits: Limits | None = None, seed: int | None = None
    ) -> None:
        self.plan = plan
        self.limits = limits or Limits()
        self.calls: list[Call] = []  # all that were made or merged
        self.unencoded: deque[Call] = deque()
        self.jobs: deque[Job] = deque()
        self._events: list[Event] = []
        self._seed = secrets.randbits(62) if seed is None else seed
        self._dispatch = Dispatch(plan.options, self.limits, plan.target.block_size, secrets.token_hex(8))
        self._open: set[Call | Job] = set()  # that have not come back
        self.num_ended = 0  # calls that have an answer or have failed
        self._over: str | None = None  # why nothing more is computed
        self._shown: dict[Cell, list[Place]] = {}  # cells that outputs show
        self._read: dict[Cell, list[Place]] = {}  # cells whose text becomes that of an output
        self._evaluation = Evaluation(
            plan.options, self.limits, self._on_call, self._on_function, self._on_value, self._on_elements
        )
        self._frames = [
            self._evaluation.start(plan.root, plan.outputs, each, number) for number, each in enumerate(inputs)
        ]
        for frame in self._frames:
            for name in plan.outputs:
                self._shown.setdefault(frame.cell(name), []).append((name, ()))
        self._evaluation.advance()

    @property
    def done(self) -> bool:
        """True when nothing is left to be computed."""
        return not self._open

    @property
    def num_in_flight(self) -> int:
        """Count the calls that the engine has."""
        return self._dispatch.num_in_flight

    def results(self) -> list[Results]:
        """Return the outputs of each execution."""
        found = [Results({name: frame.cell(name).value for name in self.plan.outputs}) for frame in self._frames]
        for call in self.calls:
            found[call.cell.frame.path[0]].calls.append(call)
        return found

    def take_events(self) -> list[Event]:
        """Take what is new about the outputs."""
        events, self._events = self._events, []
        return events

    # Calls and functions on their way.

    def encode(self, call: Call) -> None:
        """Make a call's tokens and let it wait for its turn."""
        try:
            self.encoded(call, *encode(call, self.plan.target))
        except Refused as error:
            self.fail(call, Failure.of(call.where, error.refusal))

    def encoded(self, call: Call, prompt: list[int], messages: list[dict[str, str]]) -> None:
        """Let a call with these tokens wait for its turn."""
        call.prompt, call.messages = prompt, messages
        if call in self._open and (made := self._dispatch.offer(call)) is not None:
            self._end(call, made.cell.value)

    def take_calls(self) -> list[Call]:
        """Take the calls to send now; those beyond the limits fail here."""
        sent, over = self._dispatch.take()
        for call, failure in over:
            self.fail(call, failure)
        return sent

    def full(self, call: Call, refusal: Refusal) -> None:
        """Take back a call for which the engine's queue has no room now; it fails if no other runs that makes room."""
        if call in self._open and not self._dispatch.returned(call):
            self.fail(call, Failure.of(call.where, refusal))

    def take(self, call: Call, piece: Piece) -> None:
        """Take a piece of an answer."""
        if call not in self._open:
            return
        if not call.started:
            call.started = True
            self._dispatch.prefilled(call)
        call.answer.add(piece)
        if piece.text:
            places = (*self._shown.get(call.cell, ()), *self._read.get(call.cell, ()))
            self._events += [Event(name, path, call.number, text=piece.text) for name, path in places]
        if piece.finish_reason is FinishReason.ABORT:
            self.fail(call, Failure(call.where, "the call was cancelled", RefusalKind.UNAVAILABLE))
        elif piece.finish_reason is not None:
            self._end_all(call, call.answer.text)

    def fail(self, call: Call, failure: Failure) -> None:
        """Note that a call has failed or was refused."""
        if call in self._open:
            self._end_all(call, failure)

    def returned(self, job: Job, value: Any) -> None:
        """Take the value of a function."""
        self._end(job, value)

    def stop(self, reason: str) -> list[Call]:
        """Fail what is not done, and return the calls that the engine still has."""
        self._over = reason
        running = self._dispatch.running()
        for each in tuple(self._open):
            self._end(each, Failure(each.cell.where, reason, RefusalKind.UNAVAILABLE))
        self.unencoded.clear()
        self.jobs.clear()
        return running

    def _end_all(self, call: Call, value: Any) -> None:
        """Give its value to a call and to those that take its answer."""
        for each in (call, *self._dispatch.ended(call)):
            self._end(each, value)

    def _end(self, each: Call | Job, value: Any) -> None:
        if each in self._open:
            self._open.remove(each)
            self.num_ended += isinstance(each, Call)
            self._evaluation.settle(each.cell, value)
            self._evaluation.advance()

    # What the evaluation asks for.

    def _on_call(self, cell: Cell, words: Words) -> None:
        call = cell.call = make_call(cell, words, self.plan.target, self._seed)
        self.calls.append(call)
        if self._begin(call):
            self.unencoded.append(call)

    def _on_function(self, cell: Cell, element: Function, arguments: list[Any]) -> None:
        job = Job(cell, element.call, arguments)
        if self._begin(job):
            self.jobs.append(job)

    def _begin(self, each: Call | Job) -> bool:
        if self._over is not None:
            self._evaluation.settle(each.cell, Failure(each.cell.where, self._over, RefusalKind.UNAVAILABLE))
            return False
        self._open.add(each)
        return True

    def _on_value(self, cell: Cell) -> None:
        self._read.pop(cell, None)
        for name, path in self._shown.pop(cell, ()):
            self._events.append(Event(name, path, cell.frame.path[0], value=cell.value))

    def _on_elements(self, cell: Cell) -> None:
        """Show the elements of a shown map one by one, and the text of the side that a shown branch takes."""
        places = self._shown.get(cell, [])
        if isinstance(cell.node.element, Map):
            for number, element in enumerate(cell.elements if places else ()):
                self._shown.setdefault(element, []).extend((name, (*path, number)) for name, path in places)
        elif cell.elements:
            self._read.setdefault(cell.elements[0], []).extend(places)
