"""Pricer: keeps the prices of placement and planner what the replicas' own steps say.

A price list is one object that placement, planner and pricer share. The steps of all replicas are fitted together; how
much slower or faster one of them is goes into its view's `pace`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace

import msgspec
import numpy as np

from inlaid.cluster.fleet import Fleet
from inlaid.cluster.view import Prices
from inlaid.engine.step_log import Step
from inlaid.sim.cost import CostModel, prices_of
from inlaid.sim.fit import LEAST, errors, fit_quickly
from inlaid.worker.errors import EngineError
from inlaid.worker.messages import AdapterInfo

log = logging.getLogger(__name__)

_INTERVAL = 15.0  # seconds between two fits
_PATIENCE = 10.0  # seconds that a replica has to tell its steps
_LEAST_EXPLAINED = 0.5  # of the variance of steps: a worse fit is left out
_LIKE_OTHERS = 0.1  # a pace this near to the others' is noise
_SLOWEST = 8.0


def fitted(
    steps: Mapping[str, Sequence[Step]], adapters: Iterable[AdapterInfo], before: Prices
) -> tuple[Prices, dict[str, float]]:
    """Return prices by the steps of each replica and the loads of adapters, and each replica's pace. What they do not
    tell stays as it was before."""
    listed = list(adapters)
    prices = replace(
        before,
        load_rank=_each_rank([(info.copy_seconds, info.rank) for info in listed], before.load_rank),
        read_rank=_each_rank([(info.load_seconds, info.rank) for info in listed], before.read_rank),
    )
    if any(info.copy_seconds and info.rank for info in listed):
        prices = replace(prices, load_base=0.0)
    together = [step for each in steps.values() for step in each]
    if len(together) < LEAST:
        return prices, {}
    cost = fit_quickly(together, "the replicas")
    if errors(cost, together)["r_squared"] < _LEAST_EXPLAINED:
        return prices, {}
    loads = {name: getattr(prices, name) for name in ("load_base", "load_rank", "read_rank")}
    return replace(prices_of(cost), **loads), {name: _pace(cost, each) for name, each in steps.items()}


def _each_rank(loads: Sequence[tuple[float, int]], before: float) -> float:
    """Return the usual seconds for each unit of rank."""
    known = [seconds / rank for seconds, rank in loads if seconds and rank]
    return float(np.median(known)) if known else before


def _pace(cost: CostModel, steps: Sequence[Step]) -> float:
    """Return the seconds of a replica's steps for each second predicted."""
    ratios = [step.seconds / predicted for step in steps if (predicted := cost.step_seconds(step.load))]
    pace = float(np.median(ratios)) if len(ratios) >= LEAST else 1.0
    return 1.0 if abs(pace - 1.0) < _LIKE_OTHERS else min(max(pace, 1.0 / _SLOWEST), _SLOWEST)


class Pricer:
    """The loop that fits."""

    def __init__(self, prices: Prices, fleet: Fleet, adapters: Callable[[], Iterable[AdapterInfo]]) -> None:
        self._prices = prices
        self._fleet = fleet
        self._adapters = adapters
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to fit."""
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Fit no more."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL)
            await self.fit()

    async def fit(self) -> None:
        """Ask the replicas for their steps, and take over what they say."""
        steps = {}
        for replica in self._fleet.serving:
            try:
                told = await asyncio.wait_for(replica.engine.call("steps"), _PATIENCE)
                steps[replica.name] = msgspec.convert(told, list[Step])
            except (EngineError, asyncio.TimeoutError) as error:
                log.debug("%s does not tell its steps: %s", replica.name, error)
        prices, paces = await asyncio.to_thread(fitted, steps, list(self._adapters()), self._prices)
        for field in fields(Prices):
            setattr(self._prices, field.name, getattr(prices, field.name))
        for name, pace in paces.items():
            if (known := self._fleet.replicas.get(name)) is not None:
                known.view.pace = pace
