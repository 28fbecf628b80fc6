"""The queue gives what sorting would, while counters rise, fall and requests leave."""

from __future__ import annotations

import math
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from inlaid.engine.account import Account
from inlaid.engine.ledger import Ledger
from inlaid.engine.policy import Rank, View, make_policy
from inlaid.engine.request import Request, SamplingParams, Status
from inlaid.engine.waiting import MAX_APART, WaitingQueue
from tests.examples import examples


def queued(id: int, tenant: str, arrival: float) -> Request:
    return Request(
        id=str(id),
        prompt=[1],
        params=SamplingParams(),
        adapter=None,
        adapter_name=None,
        account=Account(tenant, 0),
        arrival=arrival,
        order=id,
        tokens=[1],
        limit=17,
    )


Action = tuple[str, int]
actions = st.lists(
    st.tuples(
        st.sampled_from(["push", "pop", "without", "among", "look", "drop", "charge", "refund", "promote"]),
        st.integers(0, 4),
    ),
    max_size=60,
)


def check_queue(name: str, steps: list[Action], change: Callable[[Ledger, str, bool, WaitingQueue], None]) -> None:
    ledger = Ledger()
    view = View(ledger)
    policy = make_policy(name)
    queue = WaitingQueue(policy, view)
    waiting: list[Request] = []

    def standing(request: Request) -> tuple[Rank, int]:
        return policy.key(policy.group(request), policy.rank(request, view), view), request.order

    for number, (action, value) in enumerate(steps):
        tenant = f"t{value}"
        if action == "push":
            waiting.append(queued(number, tenant, float(number // 3)))  # ties go by order
            queue.push(waiting[-1])
        elif action == "pop":
            best = min(waiting, key=standing, default=None)
            assert queue.peek() is best
            assert queue.pop() is best
            if best is not None:
                waiting.remove(best)
        elif action in ("without", "among"):
            left_out = {tenant, f"t{number % 5}"}
            names = {policy.group(request) for request in waiting if number % 3 or request.tenant != "t0"}
            few = [r for r in waiting if r.tenant not in left_out and (action == "without" or policy.group(r) in names)]
            best = min(few, key=standing, default=None)
            if action == "among":
                assert queue.pop_among(names, left_out) is best
            else:
                assert queue.peek(left_out) is best
                assert queue.pop(left_out) is best
            if best is not None:
                waiting.remove(best)
        elif action == "look" and waiting:
            looked_at = [queue.pop() for _ in range(min(value, len(waiting)))]
            for request in looked_at:
                assert request is not None
                queue.push(request)
        elif action == "drop" and waiting:
            gone = waiting.pop(value % len(waiting))
            gone.status = Status.FINISHED
            queue.discard(gone)
        elif action == "promote" and waiting:
            grown = waiting[value % len(waiting)]
            if not grown.senior and policy.seniority_s < math.inf:
                grown.senior = True
                queue.promote([grown])
        elif action in ("charge", "refund"):
            change(ledger, tenant, action == "charge", queue)
        assert len(queue) == len(waiting)
        assert set(queue) == set(waiting)


@examples(200)
@given(name=st.sampled_from(["fcfs", "vtc", "lcf", "drr", "srtf", "inlaid"]), steps=actions)
def test_the_queue_gives_what_sorting_would(name: str, steps: list[Action]) -> None:
    def change(ledger: Ledger, tenant: str, up: bool, queue: WaitingQueue) -> None:
        account = ledger.account(tenant)
        if up:
            ledger.charge_prefill(account, 0, 300)
        else:
            account.counter -= 100
            queue.touch(tenant)

    check_queue(name, steps, change)


def test_requests_that_left_are_not_kept_forever() -> None:
    queue = WaitingQueue(make_policy("fcfs"), View(Ledger()))
    keeper = queued(0, "t", -1.0)
    queue.push(keeper)
    for number in range(1, 5000):
        request = queued(number, "t", float(number))
        queue.push(request)
        request.status = Status.FINISHED
        queue.discard(request)
    assert len(queue) == 1
    assert sum(len(group.entries) for group in queue._groups.values()) < 200
    assert queue.pop() is keeper


def test_many_that_become_senior_at_once_are_counted_once() -> None:
    queue = WaitingQueue(make_policy("inlaid"), View(Ledger()))
    requests = [queued(number, "t", float(number)) for number in range(300)]
    for request in requests:
        queue.push(request)
    for request in requests[:250]:
        request.status = Status.FINISHED
        queue.discard(request)
    for request in requests[250:]:
        request.senior = True
    queue.promote(requests[250:])  # more entries are dead than alive: the queue is built anew
    assert len(queue) == 50
    assert sum(len(group.entries) for group in queue._groups.values()) < 120
    assert [queue.pop() for _ in range(51)] == [*requests[250:], None]


def test_changing_the_policy_keeps_everyone() -> None:
    view = View(Ledger())
    queue = WaitingQueue(make_policy("fcfs"), view)
    for number in range(50):
        queue.push(queued(number, f"t{number % 3}", float(-number)))
    queue.reorder(make_policy("vtc"))
    assert len(queue) == 50
    assert [queue.pop() for _ in range(51)].count(None) == 1


def test_leaving_out_a_flood_costs_nothing_per_look() -> None:
    """Ten thousand requests of one tenant are moved aside once; every later look finds the other tenant's at once."""
    queue = WaitingQueue(make_policy("fcfs"), View(Ledger()))
    for number in range(10_000):
        queue.push(queued(number, "flood", float(number)))
    queue.push(queued(10_000, "small", 10_000.0))
    queue.push(queued(10_001, "small", 10_001.0))
    first = queue.pop({"flood"})
    assert first is not None
    assert first.id == "10000"
    assert len(queue._front) < 10
    assert [len(group.entries) for group in queue._groups.values()] == [1]
    assert [request.id for _ in range(2) if (request := queue.pop()) is not None] == ["0", "1"]


def test_tenants_come_together_again_when_many_were_apart() -> None:
    queue = WaitingQueue(make_policy("fcfs"), View(Ledger()))
    for number in range(300):
        queue.push(queued(number, f"t{number % 100}", float(number)))
    for number in range(100):
        queue.peek({f"t{number}"})
    assert len(queue._groups) + len(queue._own) <= MAX_APART + 2
    assert [request.order for _ in range(300) if (request := queue.pop()) is not None] == list(range(300))
