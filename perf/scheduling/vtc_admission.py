"""Admission as in VTC's artifact, on our simulator, to see which of its figures are due to it.

The artifact admits every ten decode steps, and a request only if the most memory that it and all running requests will
ever hold together fits, with every answer as long as it may be. Answers of one length then fall into step:
they start together, end together, and the next round starts together. A counter that is charged as tokens come does
not see a round that has just started, so VTC gives whole rounds to one client and then to the other: a client that is
x requests ahead after a round is x times wq M / (wp Lin) behind after the next. Charging predictions ahead ends it.
`vtc_published.py` sets these figures beside ours and the artifact's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from inlaid.engine.admission import Admission
from inlaid.engine.decodes import Decodes
from inlaid.engine.endings import Endings
from inlaid.engine.progress import Progress
from inlaid.engine.request import Work
from inlaid.engine.scheduler import Scheduler
from inlaid.engine.state import State
from inlaid.sim.experiment import Experiment

STEPS_BETWEEN_ROUNDS = 10


class VtcAdmission(Admission):
    """Admission at the times and of the requests that VTC's artifact chooses."""

    def __init__(self, state: State, decodes: Decodes, endings: Endings) -> None:
        super().__init__(state, decodes, endings)
        self._steps_since_round = STEPS_BETWEEN_ROUNDS

    def admit(self, budget: int) -> list[Work]:
        self._steps_since_round += 1
        if self.state.running and self._steps_since_round <= STEPS_BETWEEN_ROUNDS:
            return []
        works = super().admit(budget)
        if works:
            self._steps_since_round = 0
        return works

    def _has_memory(self, progress: Progress, hits: list[int]) -> bool:
        request, pool = progress.request, self.state.pool
        running = [other.request for other in self.state.running.values()]
        held = [(len(other.tokens), other.limit - len(other.tokens) - 1) for other in running]
        held.append((len(request.tokens) + 1, request.limit - len(request.tokens) - 1))
        progress.num_reserved = 0
        return peak(held) < pool.capacity * pool.block_size


class VtcScheduler(Scheduler):
    """inlaid's scheduler with the artifact's admission."""

    admission_type = VtcAdmission


def peak(held: Sequence[tuple[int, int]]) -> int:
    """Return the most tokens that requests, each given as (held now, still to come), will ever hold together.

    A request frees its tokens with its last; those with more to come have then grown by as much as it has.
    """
    together = most = 0
    for number, (now, still) in enumerate(sorted(held, key=lambda entry: -entry[1]), 1):
        together += now
        most = max(most, together + number * still)
    return most


def with_vtc_admission(experiment: Experiment, speed: float = 1.0) -> Experiment:
    """Give the experiment the artifact's admission, memory in single tokens, and a machine `speed` times as fast."""
    setup = experiment.setup
    cost = setup.cost if speed == 1.0 else setup.cost.scaled(1.0 / speed, f"{setup.cost.name}, {speed:g} times as fast")
    return replace(experiment, setup=replace(setup, cost=cost, block_size=1, scheduler_type=VtcScheduler))
