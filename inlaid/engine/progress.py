"""The scheduler's private record of a request. The runner and the policies see `Request`; only the parts of the
scheduler see this."""

from __future__ import annotations

from dataclasses import dataclass, field

from inlaid.engine.request import Request, TokenLogprobs


@dataclass(eq=False, slots=True)
class Progress:
    """One request's progress, from its arrival to its end.

    Invariants: num_computed <= len(request.tokens) + num_inflight, where a draft in flight counts for its first token;
    request.blocks cover [0, num_computed) at least.
    """

    request: Request
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # gathered until the first output takes them
    num_charged: int = 0  # prompt tokens charged so far; recomputing them after preemption is free

    # While it waits.
    overtaken_since: int | None = None  # admissions so far when it was first found not to fit
    aside_since: float | None = None  # when it was first set aside for want of its adapter, until it starts
    adapter_time: float = 0.0  # seconds that it has been aside
    adapter_read: float = 0.0  # of these, while its adapter was read from disk,
    adapter_copy: float = 0.0  # and while it was copied to the device
    root: bytes = b""  # where the chain of block_keys starts; empty until it is needed
    block_keys: list[bytes] = field(default_factory=list)  # names of its full blocks, see kv_cache.py

    # While it runs.
    num_computed: int = 0  # tokens whose KV is written or being written by a submitted step
    decode_until: int = 0  # below this position each step decodes one token, with nothing to check first
    drafted: bool = False  # a step in flight has a draft of it: how many guesses are right is not known yet
    num_reserved: int = 0  # blocks that its admission counted on, those to come included
    prefilled: bool = False  # since it runs, everything before its newest token has been computed
    num_pending: int = 0  # tokens that steps in flight still bring it after a preemption
    shares_prefix: bool = False  # since it runs, it uses KV that another request computed
    uncached: bool = False  # it computes all its KV itself: with KV of others its logits were not finite
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    host_since: float = 0.0  # the state's host_share when it began to run
    host_time: float = 0.0  # its share of the host's seconds, in runs that are over
    first_scheduled: float | None = None
    first_token: float | None = None

    @property
    def num_inflight(self) -> int:
        """Tokens sampled by submitted, not yet committed steps, while it runs."""
        return max(0, min(self.num_computed + 1, self.request.limit) - len(self.request.tokens))
