"""Steps of a host that works one step ahead of its device, split into the host's part and the device's.

The measured seconds of such a step, from end to end, hold what the host took to make the next one. Where the host was
the slower, the device was done earlier than the host saw: that time is missing in the seconds of the step behind. The
fit (fit.py) uses these functions where steps say that the host waited for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from inlaid.engine.step_log import Load, Step

_SURE = 0.05  # share of its seconds that the host waited for a step whose end it saw in time
LEAST = 50  # steps of a kind that say something

Array = npt.NDArray[np.float64]
HOST_TERMS = ("host", "host_prompts", "host_rows", "host_tokens")


def host_row(load: Load) -> tuple[float, ...]:
    """Return what the host's seconds for a step are linear in, in the order of `HOST_TERMS`."""
    return 1.0, float(load.prefills > 0), float(load.decodes + load.prefills), float(load.prefill_tokens)


def is_ahead(steps: Sequence[Step]) -> bool:
    """Say whether the host made most steps while the device computed the one before."""
    return len(steps) >= LEAST and sum(step.waited is not None for step in steps) > len(steps) / 2


def host_steps(steps: Sequence[Step]) -> tuple[Array, Array]:
    """Return rows of `host_row` and the host's seconds, of steps that another one preceded."""
    known = [step for step in steps if step.waited is not None and step.host > 0.0]
    return np.array([host_row(step.load) for step in known]), np.array([step.host for step in known])


def device_steps(steps: Sequence[Step], seconds_of: Callable[[Load], float]) -> list[Step]:
    """Return steps with the seconds that the device computed.

    Left out are those whose end the host did not see in time. Where it saw that of the step before too late, by what
    `seconds_of` says of that one's load, the difference is added.
    """
    found = []
    for before, step in _followers(steps):
        late = 0.0
        if not _seen(before):
            late = min(max(0.0, before.seconds - seconds_of(before.load)), step.host)
        if _seen(step):
            found.append(msgspec.structs.replace(step, seconds=step.seconds + late))
    return found


def sure_decodes(steps: Sequence[Step]) -> list[Step]:
    """Return the steps without prompts of which both ends were seen in time."""
    return [step for before, step in _followers(steps) if not step.load.prefills and _seen(before) and _seen(step)]


def _followers(steps: Sequence[Step]) -> Iterator[tuple[Step, Step]]:
    """Yield each step that was made while the one before it was computed, behind that one."""
    for before, step in pairwise(steps):
        if step.number == before.number + 1 and before.waited is not None:
            yield before, step


def _seen(step: Step) -> bool:
    """Say whether the host was waiting when the device ended the step."""
    return step.waited is not None and step.waited > _SURE * step.seconds
