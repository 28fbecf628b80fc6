"""A tensor-parallel group: processes that compute each step together, every one with its shard of the weights.

Its processes are called members; member 0, the lead, has the engine. `shared_group.py` is the group of one machine's
CPUs, `torch_group.py` that of torch.distributed. A linear divided by inputs sums its product over the group, the
embedding too, and the head gathers its logits.
"""

from __future__ import annotations

from typing import Protocol

import torch


class GroupBroken(RuntimeError):
    """A member has ended or hangs: the group computes nothing any more."""


class StepFailed(RuntimeError):
    """Another member could not compute its part of this step; the next step may go well."""


class Group(Protocol):
    """The other members, as one of them sees them. All members make the same calls in the same order."""

    index: int
    count: int

    def sum(self, x: torch.Tensor) -> None:
        """Replace x, on each member, by the sum of all members' x. Summands are added in the order of the members, so
        that all members have the same bits, and the same input gives them again."""

    def gather(self, x_LN: torch.Tensor) -> torch.Tensor:
        """Return the members' columns side by side, [L, count * N]."""
