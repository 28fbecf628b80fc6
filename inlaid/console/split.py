"""Split the time of a step into base, adapters and attention, by a fit to steps that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inlaid.engine.step_log import Step
from inlaid.sim.fit import LEAST, errors, fit_quickly

_PARTS = (
    ("base", ("prefill_tokens", "prefills", "decodes")),
    ("adapters", ("adapters", "adapter_rows", "ranks")),
    ("attention", ("prompt_context", "output_context", "prefill_attention")),
)


def split(steps: Sequence[Step]) -> dict[str, Any]:
    """Return the seconds of the mean step by part, the fastest step as its floor, and how well the fit explains the
    steps; without enough steps, only their number."""
    if len(steps) < LEAST:
        return {"steps": len(steps), "least": LEAST}
    cost = fit_quickly(steps, "this machine")
    count = len(steps)
    parts = {
        part: sum(getattr(cost, term) * sum(getattr(step.load, term) for step in steps) / count for term in terms)
        for part, terms in _PARTS
    }
    parts["base"] += cost.step
    seconds = [step.seconds for step in steps]
    return {
        "steps": count,
        "least": LEAST,
        **{part: float(f"{value:.4g}") for part, value in parts.items()},
        "mean": float(f"{np.mean(seconds):.4g}"),
        "floor": float(f"{min(seconds):.4g}"),
        "r_squared": round(errors(cost, steps)["r_squared"], 2),
    }
