"""The replay of served requests under other settings, and the split of a step's time."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest

from inlaid.console.split import MeasuredSplit, fitted
from inlaid.console.traffic import Served
from inlaid.console.what_if import Choice, Question, WhatIfError, answer, ask
from inlaid.engine.step_log import Load, Step


def steps(count: int = 200) -> list[Step]:
    """Make steps of 5 ms, 1 ms a decode, 2 ms an adapter and 10 µs a token of context."""
    draw = random.Random(1)
    made = []
    for _ in range(count):
        decodes, adapters, context = draw.randint(1, 8), draw.randint(0, 4), draw.randint(0, 400)
        seconds = 0.005 + 0.001 * decodes + 0.002 * adapters + 1e-5 * context
        made.append(Step(seconds, Load(decodes=decodes, adapters=adapters, prompt_context=context)))
    return made


def question(**changes: object) -> Question:
    """Ask about a greedy and a modest tenant."""
    served = [Served(at / 50, "greedy", "a", 20, 40, 40) for at in range(100)]
    served += [Served(at / 5, "modest", "b", 20, 5, 5) for at in range(10)]
    choices = [Choice(label=policy, policy=policy, slots=2, kv_tokens=4000) for policy in ("fcfs", "vtc")]
    asked = Question(
        served=sorted(served, key=lambda each: each.arrival),
        steps=steps(),
        ranks={"a": 8, "b": 8},
        copy_seconds=0.001,
        block_size=16,
        max_model_len=1024,
        scheduler={"max_num_seqs": 4, "max_num_batched_tokens": 512, "max_seqs_per_tenant": 4},
        choices=choices,
    )
    return msgspec.structs.replace(asked, **changes)


def test_a_fair_policy_serves_the_modest_tenant_sooner() -> None:
    outcome = asyncio.run(ask(question()))
    assert outcome.requests == 110
    assert outcome.r_squared > 0.99
    fcfs, vtc = (row["tenants"]["modest"]["mean_ttft"] for row in outcome.rows)
    assert vtc < fcfs / 2
    assert outcome == answer(question())  # in a process of its own as here


def test_what_cannot_be_replayed_is_said() -> None:
    with pytest.raises(WhatIfError, match="fewer than two requests"):
        answer(question(served=[]))
    with pytest.raises(WhatIfError, match="10 steps are too few"):
        asyncio.run(ask(question(steps=steps(10))))


def test_a_steps_time_is_split_by_a_fit_to_whole_steps() -> None:
    found = fitted(steps())
    assert (found["how"], found["r_squared"]) == ("fitted", 1.0)
    count = len(steps())
    assert found["adapters"] == pytest.approx(0.002 * sum(step.load.adapters for step in steps()) / count, rel=0.02)
    assert found["base"] + found["adapters"] + found["attention"] == pytest.approx(found["mean"], rel=0.02)
    assert fitted(steps(3)) == {"how": "fitted", "steps": 3, "least": 50}


def test_a_measured_split_is_of_the_last_seconds() -> None:
    measured = MeasuredSplit()
    assert measured.mean() is None
    for second in range(60):
        fast = min(second, 40)  # from then on a step takes twice as long
        slow = second - fast
        parts = {"measured": second, "measured_seconds": second, "adapters": 0.1 * second, "attention": 0.2 * second}
        measured.add({"steps": 4 * second, "seconds": 4 * fast + 8 * slow, **parts}, 4 * second, 6 * fast + 12 * slow)
    found = measured.mean()
    assert found is not None
    assert (found["how"], found["steps"]) == ("measured", 29)
    seconds = (10 + 2 * 19) / 29
    shares = found["adapters"] / seconds, found["attention"] / seconds, found["base"] / seconds
    assert shares == pytest.approx((0.1, 0.2, 0.7), rel=1e-3)
    assert found["mean"] == pytest.approx(1.5 * seconds, rel=1e-3)
    assert found["host"] == pytest.approx(0.5 * seconds, rel=1e-3)
    names = ("steps", "seconds", "measured", "measured_seconds", "adapters", "attention")
    measured.add(dict.fromkeys(names, 0.0), 0, 0.0)  # another engine process
    assert measured.mean() is None
