"""Starting from a stored solution: sites whose aggregated Hessian has hardly moved keep it, others improve it.

This is an approximation. The exact job solves each site anew, several times where losses decide the tasks' weights;
here each is touched once at most, and tasks keep their stored shares of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from inlaid.checkpoint import Checkpoint, unpack
from inlaid.quant.aggregate import TaskHessian, combine
from inlaid.quant.bank import Bank, BankError, Entry
from inlaid.quant.grid import Grid
from inlaid.quant.record import Record
from inlaid.quant.solver import Solution, improve, rated


class StoredSolution:
    """The version that a job starts from: its codes and steps, and the Hessians that they were solved for."""

    def __init__(self, record: Record, bank: Bank, threshold: float) -> None:
        self.shares, self.by_trace = record.even_shares() | record.shares, record.by_trace
        self._checkpoint, self._threshold = Checkpoint(record.out), threshold
        self._aggregation = record.settings.aggregation
        self._entries: dict[str, Entry] = {
            name: bank.entry(task["bank_key"]) for name, task in sorted(record.tasks.items())
        }

    def solve(
        self,
        index: int,
        site: str,
        weights: Mapping[str, Tensor],
        tasks: Sequence[TaskHessian],
        grid: Grid,
        rest: Callable[[], object],
    ) -> tuple[Solution, float]:
        """Return a site's solution for these tasks, and by how much its Hessian has moved (a share of its norm)."""
        weight_KN = torch.cat(list(weights.values()), dim=1)
        stored = self._stored(list(weights), weight_KN.device)
        hessian_KK = self._combined(tasks)
        moved = self._moved(index, site, hessian_KK)
        if moved < self._threshold:
            return rated(stored, weight_KN, hessian_KK), moved
        return improve(stored, weight_KN, hessian_KK, grid, rest), moved

    def new_shares(self, names: Sequence[str]) -> Tensor:
        """Return shares of the weights for tasks by name: an even one for a new task, the others in proportion to those
        stored.
        """
        known = [name for name in names if name in self.shares]
        left = len(known) / len(names) / max(sum(self.shares[name] for name in known), 1e-30)
        return torch.tensor(
            [self.shares[name] * left if name in self.shares else 1 / len(names) for name in names], dtype=torch.float64
        )

    def _moved(self, index: int, site: str, hessian_KK: Tensor) -> float:
        """Return |A - B| / |A| of the aggregated Hessians before and now, both divided by their trace."""
        device = hessian_KK.device
        try:
            before = [
                TaskHessian(
                    partial(entry.read, index, site, device), entry.tokens(index), self.shares[name], self.by_trace
                )
                for name, entry in self._entries.items()
            ]
            before_KK = self._combined(before)
        except BankError:  # the bank has lost what the stored version was solved for
            return float("inf")
        before_KK /= before_KK.trace().clamp(min=1e-30)
        now_KK = hessian_KK / hessian_KK.trace().clamp(min=1e-30)
        return float((now_KK - before_KK).norm() / before_KK.norm().clamp(min=1e-30))

    def _combined(self, tasks: Sequence[TaskHessian]) -> Tensor:
        """Return the aggregated Hessian; minimax, which has none of its own, is stood for by the mean."""
        return combine("mean" if self._aggregation == "minimax" else self._aggregation, tasks)

    def _stored(self, names: Sequence[str], device: torch.device) -> Solution:
        linears = [self._checkpoint.linear(name) for name in names]
        codes_KN = torch.cat([unpack(linear.qweight, linear.bits) for linear in linears], dim=1)
        zeros_GN = torch.cat([unpack(linear.qzeros, linear.bits, dim=1) for linear in linears], dim=1)
        scales_GN = torch.cat([linear.scales for linear in linears], dim=1)
        g_idx_K = linears[0].g_idx
        return Solution(
            codes_KN.to(device), scales_GN.to(device), zeros_GN.to(device), g_idx_K.to(device), loss=0.0, damping=0.0
        )
