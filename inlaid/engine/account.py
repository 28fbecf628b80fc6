"""A tenant's account. The ledger is the only writer, but for the counts of waiting and running requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's sums; ledger.py says what `service` and `counter` are.

    A step delivers hundreds of output tokens. Where all cost the same they are only counted, and priced on reading.
    """

    tenant: str
    order: int
    weight: float = 1.0
    price: float = 0.0  # of an output token, where all cost the same
    charged: float = 0.0  # service without output tokens at this price
    virtual: float = 0.0  # counter without them
    ahead: float = 0.0  # price of output tokens that were charged ahead and are still to come
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    num_requests: int = 0
    num_waiting: int = 0
    num_running: int = 0
    version: int = 0  # which of its entries in the backlog heap is current
    noted: float = 0.0  # service at the last note in the history

    @property
    def service(self) -> float:
        return self.charged + self.output_tokens * self.price

    @property
    def counter(self) -> float:
        return self.virtual + self.output_tokens * self.price / self.weight

    @counter.setter
    def counter(self, value: float) -> None:
        self.virtual = value - self.output_tokens * self.price / self.weight

    @property
    def delivered(self) -> float:
        """The counter without what was charged ahead for tokens that are still to come."""
        return self.counter - self.ahead / self.weight
