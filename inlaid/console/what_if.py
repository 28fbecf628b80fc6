"""Replay the last minutes' requests in the simulator under other settings, in a process with limits.

    python -m inlaid.console.what_if < QUESTION.json

The server asks through `ask`. The cost of a step is fitted to steps that the engine measured, so the replay is of this
machine; answers keep the lengths that they had. One question runs the settings in force beside the others, so that a
difference is one of settings and not of simulator and server.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from inlaid.console.traffic import Served
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.engine.step_log import Step
from inlaid.sim.cost import CostModel
from inlaid.sim.fit import errors, fit_quickly
from inlaid.sim.metrics import summarize
from inlaid.sim.request_log import Arrival
from inlaid.sim.simulate import Setup, simulate

_SECONDS = 60  # that a replay may take
_MEMORY = 4 << 30
MOST_REQUESTS = 2000  # the last ones


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Settings to replay under."""

    label: str
    policy: str
    weights: dict[str, float] = {}
    slots: int
    kv_tokens: int


class Question(msgspec.Struct, frozen=True, kw_only=True):
    served: list[Served]
    steps: list[Step]
    ranks: dict[str, int]
    copy_seconds: float  # mean of an adapter's copy to the device
    block_size: int
    max_model_len: int
    scheduler: dict[str, Any]
    choices: list[Choice]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: a row for each choice, and how well the fitted steps explain those that were measured."""

    requests: int
    seconds: float
    r_squared: float
    rows: list[dict[str, Any]]


class WhatIfError(ValueError):
    """A question has no answer; the message says why."""


def answer(question: Question) -> Outcome:
    """Replay under each choice."""
    served = question.served
    if len(served) < 2:
        raise WhatIfError("fewer than two requests were answered in these minutes; there is nothing to replay")
    cost = fit_quickly(question.steps, "this machine")
    quality = errors(cost, question.steps)["r_squared"]
    begin = served[0].arrival
    trace = [_arrival(number, each, begin) for number, each in enumerate(served)]
    duration = max(1.0, served[-1].arrival - begin)
    rows = [_row(question, choice, cost, trace, duration) for choice in question.choices]
    return Outcome(requests=len(served), seconds=duration, r_squared=round(quality, 3), rows=rows)


def _arrival(number: int, each: Served, begin: float) -> Arrival:
    at = each.arrival - begin
    params = SamplingParams(max_tokens=max(1, each.max_tokens), temperature=0.0, seed=0)
    request = NewRequest(
        id=str(number),
        prompt=[0] * max(1, each.num_prompt),
        params=params,
        adapter=each.adapter,
        tenant=each.tenant,
        priority=each.priority,
        deadline=None if each.deadline is None else each.deadline - begin,
        true_output_len=max(1, each.num_outputs),
    )
    return Arrival(at, request)


def _row(
    question: Question, choice: Choice, cost: CostModel, trace: Sequence[Arrival], duration: float
) -> dict[str, Any]:
    loaded = sum(question.ranks.values()) or 1
    machine = replace(cost, load_rank=question.copy_seconds * len(question.ranks) / loaded)
    setup = Setup(
        cost=machine,
        policy=choice.policy,
        num_tokens=choice.kv_tokens,
        block_size=question.block_size,
        slots=choice.slots,
        ranks=question.ranks,
        weights=choice.weights,
        max_model_len=question.max_model_len,
        scheduler=question.scheduler,
    )
    outcome = simulate(trace, setup)
    row = summarize(outcome, duration, None, choice.weights)
    ttfts = [r.ttft for r in outcome.records if r.ttft is not None]
    row["p50_ttft"] = float(np.median(ttfts)) if ttfts else None
    return {"label": choice.label, **row}


async def ask(question: Question) -> Outcome:
    """Answer a question in a process of its own. WhatIfError says why there is no answer."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "inlaid.console.what_if",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        said, complained = await asyncio.wait_for(process.communicate(msgspec.json.encode(question)), 2 * _SECONDS)
    except asyncio.TimeoutError:
        raise WhatIfError(f"the replay took more than {2 * _SECONDS} s; choose fewer minutes") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return msgspec.json.decode(said, type=Outcome)
    last = complained.decode(errors="replace").strip().splitlines()[-1:] or ["no reason was given"]
    raise WhatIfError(f"the replay failed: {last[0]}" if process.returncode == 1 else _ended(process.returncode))


def _ended(status: int | None) -> str:
    if status == 2:
        return "the replay ran out of memory; choose fewer minutes"
    return f"the replay was ended after {_SECONDS} s of computing; choose fewer minutes"


def main() -> int:
    """Answer the question on standard input."""
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    try:
        question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
        sys.stdout.buffer.write(msgspec.json.encode(answer(question)))
    except MemoryError:
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
