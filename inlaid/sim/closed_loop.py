"""Recorded answers served side by side on a virtual clock, with their drafts and without: what guesses bring at a
machine's step times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inlaid.config import SpeculationConfig
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.engine.speculation import Speculation
from inlaid.sim.cost import CostModel
from inlaid.sim.simulate import Clock, Setup, make_engine
from inlaid.sim.traced import Acceptances, TracedDrafter

PROMPT = 60  # tokens
RANK = 16


@dataclass(frozen=True)
class Served:
    """The time and the steps of serving all requests, prompts included."""

    seconds: float
    tokens: int
    steps: int
    guesses: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Return tokens a second."""
        return self.tokens / self.seconds


def serve(
    cost: CostModel,
    trace: Acceptances,
    concurrency: int,
    num_requests: int,
    *,
    tasks: Sequence[str] = (),
    speculation: SpeculationConfig | None = None,
    overlap: bool = False,
) -> Served:
    """Answer so many requests of these tasks (none: all) in turn, `concurrency` at a time; with `speculation`, the
    drafts are the trace's."""
    names = list(tasks) or sorted(trace.by_adapter)
    setup = Setup(
        cost, num_tokens=400_000, scheduler={"max_num_seqs": 256}, ranks=dict.fromkeys(names, RANK),
        resident=tuple(names), overlap=overlap, lengths="none",
    )  # fmt: skip
    clock = Clock()
    engine, _, _ = make_engine(setup, clock)
    drafter = TracedDrafter(trace)
    made = Speculation(speculation, drafter) if speculation is not None else None
    engine.scheduler.state.speculation = made
    added = running = tokens = steps = 0
    while added < num_requests or running:
        while added < num_requests and running < concurrency:
            task = names[added % len(names)]
            answer = trace.by_adapter[task][added // len(names) % len(trace.by_adapter[task])]
            params = SamplingParams(max_tokens=2 * len(answer), temperature=0.0)
            engine.add(NewRequest(
                id=str(added), prompt=[3] * PROMPT, adapter=task, params=params, true_output_len=len(answer),
            ))  # fmt: skip
            drafter.assign(str(added), answer)
            added, running = added + 1, running + 1
        outputs = engine.step()
        steps += bool(outputs)
        for output in outputs:
            tokens += len(output.tokens)
            running -= output.finish_reason is not None
    total = made.total if made is not None else None
    return Served(
        clock.now, tokens, steps, 0 if total is None else total.guesses, 0 if total is None else total.accepted
    )
