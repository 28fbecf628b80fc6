"""The queue of grammars: a tenant's slow ones hold up its own requests only, and aborted ones leave."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import pytest

from inlaid.engine.refusal import Refused
from inlaid.engine.request import Grammar, NewRequest, SamplingParams
from inlaid.worker.compiling import MAX_COMPILING, Compilations
from inlaid.worker.threads import Threads


class ByHand:
    """Threads whose work is finished by hand, the oldest first."""

    def __init__(self) -> None:
        self.begun: list[tuple[Callable[[], object], Callable[[Future[Any]], None]]] = []

    def compile(self, work: Callable[[], object], then: Callable[[Future[Any]], None]) -> None:
        self.begun.append((work, then))

    def finish(self, place: int = 0) -> None:
        work, then = self.begun.pop(place)
        done: Future[Any] = Future()
        done.set_result(work())
        then(done)


class Queue:
    """Compilations over such threads, with the requests that have come out."""

    def __init__(self) -> None:
        self.threads = ByHand()
        self.compiled: list[str | None] = []
        self.added: list[str] = []
        self.queue = Compilations(
            lambda grammar: self.compiled.append(grammar.regex),
            cast(Threads, self.threads),
            lambda request, outcome: self.added.append(request.id),
        )

    def submit(self, name: str, tenant: str) -> None:
        params = SamplingParams(grammar=Grammar(regex=name))
        self.queue.submit(NewRequest(id=name, prompt=[1], params=params, tenant=tenant))


def test_one_tenants_grammars_queue_behind_each_other_and_not_before_others() -> None:
    made = Queue()
    for number in range(5):
        made.submit(f"a{number}", "a")
    made.submit("b0", "b")
    made.submit("c0", "c")
    assert len(made.threads.begun) == 2
    made.threads.finish(1)  # b's, while a's first goes on
    assert made.added == ["b0"]
    made.threads.finish(1)
    assert made.added == ["b0", "c0"]
    assert len(made.threads.begun) == 1
    while made.threads.begun:
        made.threads.finish()
    assert made.added == ["b0", "c0", "a0", "a1", "a2", "a3", "a4"]


def test_aborted_requests_leave_the_queue() -> None:
    """They once were compiled all the same, before the others."""
    made = Queue()
    for number in range(50):
        made.submit(f"a{number}", "a")
    for number in range(49):
        made.queue.discard(f"a{number}")
    while made.threads.begun:
        made.threads.finish()
    assert made.compiled == ["a0", "a49"]
    assert made.added == ["a49"]


def test_a_tenant_may_wait_with_so_many() -> None:
    made = Queue()
    for number in range(MAX_COMPILING + 1):
        made.submit(f"a{number}", "a")
    with pytest.raises(Refused, match="of this tenant wait") as refused:
        made.submit("more", "a")
    assert refused.value.retry_after == 1.0
    made.submit("b", "b")
