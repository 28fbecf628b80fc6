"""Split the time of a step into base, adapters, attention and the host's part.

Where the runner has a clock around its kernels (on a CPU) the parts are measured. Elsewhere they are a fit to whole
steps: what is inside a captured graph cannot be told from outside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inlaid.engine.step_log import Step
from inlaid.sim.fit import LEAST, errors, fit_quickly

_PARTS = (
    ("base", ("prefill_tokens", "prefills", "decodes")),
    ("adapters", ("adapters", "adapter_rows", "ranks")),
    ("attention", ("prompt_context", "output_context", "prefill_attention")),
)


_KEPT = 30  # seconds that a measured split is of


class MeasuredSplit:
    """The parts of the steps of the last seconds, as differences of sums that the engine counts up."""

    def __init__(self) -> None:
        self._points: deque[tuple[Mapping[str, float], float, float]] = deque(maxlen=_KEPT)

    def add(self, sums: Mapping[str, float], steps: float, seconds: float) -> None:
        """Note the runner's sums (`StepSplit.sums`), and the engine's number and seconds of steps."""
        if self._points and steps < self._points[-1][1]:
            self._points.clear()  # the engine process is a new one
        self._points.append((sums, steps, seconds))

    def mean(self) -> dict[str, Any] | None:
        """Return the seconds of the mean step by part; None: no step was measured in these seconds."""
        if not self._points:
            return None
        (first, steps_then, seconds_then), (last, steps, seconds) = self._points[0], self._points[-1]
        more = {name: last[name] - first[name] for name in last}
        if not more["measured"] or steps == steps_then:
            return None
        runner = more["seconds"] / more["steps"]
        adapters, attention = (runner * more[part] / more["measured_seconds"] for part in ("adapters", "attention"))
        mean = max(runner, (seconds - seconds_then) / (steps - steps_then))
        parts = {
            "base": runner - adapters - attention,
            "adapters": adapters,
            "attention": attention,
            "host": mean - runner,
            "mean": mean,
        }
        return {"how": "measured", "steps": more["measured"], **{part: _short(value) for part, value in parts.items()}}


def _short(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def fitted(steps: Sequence[Step]) -> dict[str, Any]:
    """Return the seconds of the mean step by part, and how well the fit explains the steps; without enough steps, only
    their number."""
    if len(steps) < LEAST:
        return {"how": "fitted", "steps": len(steps), "least": LEAST}
    cost = fit_quickly(steps, "this machine")
    count = len(steps)
    parts = {
        part: sum(getattr(cost, term) * sum(getattr(step.load, term) for step in steps) / count for term in terms)
        for part, terms in _PARTS
    }
    parts["base"] += cost.step
    return {
        "how": "fitted",
        "steps": count,
        "least": LEAST,
        **{part: _short(value) for part, value in parts.items()},
        "mean": _short(float(np.mean([step.seconds for step in steps]))),
        "r_squared": round(errors(cost, steps)["r_squared"], 2),
    }
