"""The device's side of loading, without a device: copies that are made when the test says so, or when they have been
asked for often enough."""

from __future__ import annotations

import torch

from inlaid.adapters.loader import Copy


class FakeMark:
    """Passed when the lane has come so far; waiting for it takes the lane there, as the device's computing would."""

    def __init__(self, lane: FakeLane, number: int) -> None:
        self.lane = lane
        self.number = number

    def query(self) -> bool:
        lane = self.lane
        if lane.passed <= self.number and lane.patience:
            lane.num_asked += 1
            if lane.num_asked % lane.patience == 0:
                lane.advance()
        return lane.passed > self.number

    def wait(self) -> None:
        self.lane.num_waits += 1
        while self.lane.passed <= self.number:
            self.lane.advance()


class FakeLane:
    """A stream. With patience it gets to its next mark by itself after being asked so often."""

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self.queue: list[Copy | None] = []
        self.num_marks = self.passed = self.num_waits = self.num_asked = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.queue.append((target, source))

    def mark(self) -> FakeMark:
        self.queue.append(None)
        self.num_marks += 1
        return FakeMark(self, self.num_marks - 1)

    def advance(self) -> None:
        """To the next mark."""
        while self.queue and (copy := self.queue.pop(0)) is not None:
            copy[0].copy_(copy[1])
        self.passed = min(self.passed + 1, self.num_marks)
