"""Prices of tokens. The ledger charges by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Cost(Protocol):
    """Prices. Service is additive: prefill of [0, n) costs the same in one chunk or in many."""

    def prefill(self, start: int, end: int) -> float:
        """Price the computation of prompt tokens [start, end)."""
        ...

    def cached(self, start: int, end: int) -> float:
        """Price prompt tokens [start, end) that were found in the prefix cache."""
        ...

    def output(self, num_prompt: int, first: int, last: int) -> float:
        """Price output tokens number `first` to `last` (from 1, both included) after a prompt of `num_prompt`."""
        ...


@dataclass(frozen=True)
class LinearCost:
    """Tokens times weights: VTC's default is 1 for a prompt token and 2 for an output token."""

    prompt_weight: float = 1.0
    output_weight: float = 2.0
    cached_price: float = 0.0  # share of the prompt price that a token found in the prefix cache costs

    def prefill(self, start: int, end: int) -> float:
        return self.prompt_weight * (end - start)

    def cached(self, start: int, end: int) -> float:
        return self.cached_price * self.prefill(start, end)

    def output(self, num_prompt: int, first: int, last: int) -> float:
        return self.output_weight * (last - first + 1)


@dataclass(frozen=True)
class ProfiledCost:
    """Milliseconds that a request of x prompt and y output tokens takes of a full A10G batch, as the VTC authors
    fitted it: h(x, y) = a x + b y + c x y + d y^2 + e."""

    a: float = 0.21001891
    b: float = 0.10075395
    c: float = 0.0039868
    d: float = 0.00324733
    e: float = 1.14601454
    cached_price: float = 0.0

    def prefill(self, start: int, end: int) -> float:
        return self.a * (end - start) + (self.e if start == 0 else 0.0)

    def cached(self, start: int, end: int) -> float:
        return self.cached_price * self.a * (end - start) + (self.e if start == 0 else 0.0)

    def output(self, num_prompt: int, first: int, last: int) -> float:
        before = first - 1
        return (self.b + self.c * num_prompt) * (last - before) + self.d * (last * last - before * before)
