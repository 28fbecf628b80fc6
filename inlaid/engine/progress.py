"""The scheduler's private records: what it knows of a tenant (`Account`) and of a request (`Progress`).

The runner and the policies see `Request`; only the parts of the scheduler and the ledger see these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from inlaid.engine.request import Request, TokenLogprobs


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's sums, see ledger.py. A step delivers hundreds of output tokens: where all cost the same they are
    only counted, and priced when `service` or `counter` is read."""

    tenant: str
    order: int
    weight: float = 1.0
    price: float = 0.0  # of an output token, where all cost the same
    charged: float = 0.0  # service without output tokens at this price
    virtual: float = 0.0  # counter without them
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


@dataclass(eq=False, slots=True)
class Progress:
    """One request's progress, from its arrival to its end."""

    request: Request
    account: Account
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # gathered until the first output takes them

    # Charges.
    num_charged: int = 0  # prompt tokens charged so far; recomputing them after preemption is free
    num_prepaid: int = 0  # output tokens charged ahead, by policies that charge predictions

    # While it waits.
    overtaken_since: int | None = None  # admissions so far when it was first found not to fit
    aside_since: float | None = None  # when it was first set aside for want of its adapter, until it starts
    root: bytes = b""  # where the chain of block_keys starts; empty until it is needed
    block_keys: list[bytes] = field(default_factory=list)  # names of its full blocks, see kv_cache.py

    # While it runs.
    num_reserved: int = 0  # blocks that its admission counted on, those to come included
    decode_until: int = 0  # below this position each step decodes one token, with nothing to check first
    prefilled: bool = False  # since it runs, everything before its newest token has been computed
    num_pending: int = 0  # tokens that steps in flight still bring it after a preemption
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    first_scheduled: float | None = None
    first_token: float | None = None
