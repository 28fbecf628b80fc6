"""The queue in words: its order is the policy's, and each reason is about the two requests that it stands between."""

from __future__ import annotations

from dataclasses import replace

import pytest

from inlaid.config import CacheConfig, SchedulerConfig
from inlaid.engine.engine import Engine
from inlaid.engine.explain import queue, service_history
from inlaid.engine.policy import POLICIES, make_policy
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.engine.scheduler import Scheduler
from tests.engine.fake_runner import FakeAdapters, FakeRunner


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def engine_of(policy: str) -> tuple[Engine, Clock]:
    """Make an engine with one seat, so that all but one request wait."""
    clock = Clock()
    scheduler = Scheduler(
        replace(SchedulerConfig(), policy=policy, max_num_seqs=1, max_seqs_per_tenant=1),
        CacheConfig(),
        num_blocks=100,
        max_model_len=200,
        adapters=FakeAdapters(("x", "y")),
    )
    return Engine(scheduler, FakeRunner(16), clock), clock


def ask(engine: Engine, name: str, tenant: str, **more: object) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    engine.add(NewRequest(id=name, prompt=[1, 2, 3], tenant=tenant, params=params, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("fcfs", "came 2.0 s earlier"),
        ("priority", "has priority 0, this one 1"),
        ("srtf", "is predicted 30 tokens, this one 30; its wait is worth 4 more"),
        ("inlaid", "is predicted 30 tokens, this one 30; its wait is worth 4 more"),
        ("vtc", "its tenant's counter is"),
        ("lcf", "its tenant was served 0 over weight"),
        ("drr:quantum=1", "its tenant is in turn"),
        ("rpm", "came 2.0 s earlier"),
        ("slo:seconds=10", "must start within"),
    ],
)
def test_each_policy_gives_its_own_reason(policy: str, reason: str) -> None:
    engine, clock = engine_of(policy)
    ask(engine, "runs", "greedy")
    engine.step()
    clock.now = 1.0
    ask(engine, "first", "modest")
    for _ in range(4):
        engine.step()  # which serves the greedy tenant
    clock.now = 3.0
    ask(engine, "second", "greedy", priority=1)
    listed = queue(engine.scheduler, 20, 4.0)
    assert [(each["tenant"], each["behind"]) for each in listed] == [("modest", None), ("greedy", "modest")]
    assert listed[0]["reason"] == "all 1 seats are taken (--max-num-seqs)"
    assert listed[0]["waited"] == 3.0
    assert reason in listed[1]["reason"]


def test_every_policy_can_say_why() -> None:
    for name in POLICIES:
        engine, clock = engine_of(name)
        for number, tenant in enumerate("aabbc"):
            clock.now += 0.5
            ask(engine, str(number), tenant, adapter="xy"[number % 2])
        listed = engine.queue(3)
        assert len(listed) == 3
        assert all(each["reason"] for each in listed), make_policy(name)


def test_what_waits_for_its_adapter_is_said() -> None:
    engine, _ = engine_of("fcfs")
    engine.scheduler.adapters.load = 10_000  # type: ignore[attr-defined]
    ask(engine, "one", "a", adapter="x")
    engine.step()
    assert engine.queue()[0]["reason"] == "its adapter is being loaded"


def test_the_history_of_service_is_what_was_served() -> None:
    engine, clock = engine_of("fcfs")
    ask(engine, "one", "a")
    while engine.has_work:
        clock.now += 1.0
        engine.step()
    engine.scheduler.ledger.note(clock.now + 1.0)
    history = service_history(engine.scheduler, 300.0, 5.0, clock.now + 1.0)
    assert sum(history["tenants"]["a"]) == engine.scheduler.ledger.account("a").service
    assert len(history["tenants"]["a"]) == 60
    short = service_history(engine.scheduler, 10.0, 5.0, clock.now + 1.0)
    assert 0 < sum(short["tenants"]["a"]) < sum(history["tenants"]["a"])


def test_a_run_of_16_steps_in_64_is_measured_and_all_are_timed() -> None:
    engine, clock = engine_of("fcfs")
    for name in ("one", "two", "three"):
        ask(engine, name, "a", adapter="x")
    while engine.has_work:
        engine.step()
        clock.now += 1.0
    log = engine.scheduler.step_log
    assert engine.stats()["steps"] > 80
    assert [step.number for step in log.list()] == [*range(1, 17), *range(65, 81)]
    assert {step.waited for step in log.list()} == {None}, "this runner is never a step ahead"
    assert {step.load.adapters for step in log.list()} == {1}
    assert {step.load.ranks for step in log.list()} == {8}
    assert {step.load.decodes + step.load.prefills for step in log.list()} == {1}
