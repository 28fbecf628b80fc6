"""Programmatic dependent launch: a kernel's blocks come onto the device while the kernel before it drains, and wait
there for its end, so that launching and setting up cost less. For kernels that follow their only predecessor on the
same stream; whoever joins two streams launches as usual. Hopper GPUs and newer have it.

A kernel launched so first of all waits for everything before it, and only then lets its successor come: whatever was
written two kernels ago is there. Decode attention, which has more blocks than fit, lets it come at its end. `EARLY`
says whether it is done; perf/gpu measures a step both ways.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

EARLY = True


def wanted() -> bool:
    return EARLY and possible()


@cache
def possible() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def early(alone: bool = True) -> dict[str, Any]:
    """Arguments of a launch; `alone`: it has one predecessor."""
    return {"EARLY": True, "launch_pdl": True} if alone and wanted() else {"EARLY": False}
