"""Programmatic dependent launch: a kernel's blocks come onto the device while the kernel before it drains, and wait
there for its end, so that launching and setting up cost less. It is for kernels that follow their only predecessor on
the same stream; a kernel that joins two streams launches as usual. Hopper GPUs and newer have it.

A kernel launched early first waits for everything before it, and only then lets its successor come, so that all that
was written two kernels ago is there. Decode attention, which has more blocks than fit, lets its successor come at its
end. `EARLY` switches it for the process; perf/gpu measures a step both ways.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

EARLY = True


def wanted() -> bool:
    """Return whether kernels launch early here."""
    return EARLY and possible()


@cache
def possible() -> bool:
    """Return whether the device can."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def early(alone: bool = True) -> dict[str, Any]:
    """Return the arguments of a launch; `alone`: it has one predecessor."""
    return {"EARLY": True, "launch_pdl": True} if alone and wanted() else {"EARLY": False}
