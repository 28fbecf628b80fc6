"""Popularity of adapters: the adapter that each request asks for.

An adapter is the model name a request is sent with; `None` asks for the base model.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

Distribution = Literal[
    "uniform", "distinct", "identical", "skewed", "zipf", "power", "rates", "trace", "tenant", "none"
]


class AdapterChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The spread of requests over the adapters served.

    distinct   one after the other, so that neighbours always differ
    identical  all the first
    skewed     the k-th has weight alpha**-k (geometric)
    zipf       the k-th has weight (k+1)**-alpha
    power      index floor(n * U**(1/alpha)): the smaller alpha, the more the first ones get
    rates      weights named in `rates`
    trace      the name in the trace row, given to the adapters in order of first appearance
    tenant     every tenant has an adapter of its own, given in the order in which the workload names tenants
    none       no adapter: the base model

    `indices` restricts the choice to some of the served adapters; `fold` lets a trace with more names, or more
    tenants, than adapters share them.
    """

    distribution: Distribution = "uniform"
    alpha: float = 1.0
    indices: list[int] = []
    rates: dict[str, float] = {}
    fold: bool = False

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError("alpha must be above 0")
        if self.distribution == "rates" and not self.rates:
            raise ValueError('distribution "rates" needs a table rates = { adapter = weight }')
        if any(not weight >= 0 for weight in self.rates.values()):
            raise ValueError("rates must not be negative")


def parse_skew(skew: str | float) -> AdapterChoice:
    """Read the runner's `skew` axis: a distribution's name, `zipf-1.2` / `power-0.5`, or a number (zipf's alpha)."""
    if isinstance(skew, (int, float)):
        return AdapterChoice("zipf", float(skew)) if skew else AdapterChoice("uniform")
    name, _, alpha = skew.partition("-")
    try:
        return msgspec.convert({"distribution": name, **({"alpha": float(alpha)} if alpha else {})}, AdapterChoice)
    except (msgspec.ValidationError, ValueError):
        raise ValueError(
            f"unknown skew {skew!r}: use uniform, distinct, identical, skewed, tenant, zipf-ALPHA, power-ALPHA"
        ) from None


def choose_adapters(spec: AdapterChoice, served: list[str], count: int, rng: np.random.Generator) -> list[str | None]:
    """Choose one adapter for each of `count` requests; "trace" and "tenant" are left to `name_by_appearance`."""
    if spec.distribution in ("none", "tenant"):
        return [None] * count
    names = _candidates(spec, served)
    picks = _indices(spec, names, count, rng)
    return [names[int(i)] for i in picks]


def name_by_appearance(
    spec: AdapterChoice, wanted: list[str | None], served: list[str], need: str = "the trace names {} adapters"
) -> list[str | None]:
    """Give each distinct name (an adapter of a trace, or a tenant) the next served adapter; `need` words the error."""
    names = _candidates(spec, served)
    order = {name: i for i, name in enumerate(dict.fromkeys(w for w in wanted if w is not None))}
    if len(order) > len(names) and not spec.fold:
        raise ValueError(f"{need.format(len(order))} and {len(names)} are served: serve more, or set fold = true")
    return [None if w is None else names[order[w] % len(names)] for w in wanted]


def _candidates(spec: AdapterChoice, served: list[str]) -> list[str]:
    if spec.distribution == "rates":
        return list(spec.rates)
    if not served:
        raise ValueError(f'distribution "{spec.distribution}" needs adapters: name them, or use "none"')
    outside = [i for i in spec.indices if not 0 <= i < len(served)]
    if outside:
        raise ValueError(f"adapter index {outside[0]} is outside the {len(served)} adapters served")
    return [served[i] for i in spec.indices] or served


def _indices(spec: AdapterChoice, names: list[str], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    size = len(names)
    if spec.distribution == "distinct":
        return np.arange(count) % size
    if spec.distribution == "identical":
        return np.zeros(count, dtype=np.int64)
    if spec.distribution == "power":
        return np.minimum((size * rng.power(spec.alpha, count)).astype(np.int64), size - 1)
    return rng.choice(size, count, p=_weights(spec, names))


def _weights(spec: AdapterChoice, names: list[str]) -> npt.NDArray[np.float64]:
    rank = np.arange(len(names), dtype=np.float64)
    if spec.distribution == "skewed":
        weights = np.exp(-rank * np.log(spec.alpha))
    elif spec.distribution == "zipf":
        weights = (rank + 1) ** -spec.alpha
    elif spec.distribution == "rates":
        weights = np.array([spec.rates[name] for name in names])
    else:
        weights = np.ones(len(names))
    if not weights.sum() > 0:
        raise ValueError("the rates of all adapters are 0")
    return np.asarray(weights / weights.sum())
