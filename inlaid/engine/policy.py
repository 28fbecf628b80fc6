"""Policies: each is a pure ordering of requests. Budgets, admission and preemption are the scheduler's.

A policy sorts requests into groups and answers two questions. `rank(request, view)` is a request's place in its group;
it may not change while the request waits (ageing is written so that it does not: two requests age at the same pace, so
their order is settled at arrival), unless its group changes too: when it is late, or senior. `key(group, rank, view)`
is that request's place among all; smaller goes first, and the last of the running is preempted when memory runs out.
`prepay` says how many predicted output tokens to charge at admission. `verdict` lets a policy give a request up.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from inlaid.engine.ledger import Ledger
from inlaid.engine.progress import Progress
from inlaid.engine.request import Request

Rank = tuple[float, ...]
GO, LAST, REFUSE = "go", "last", "refuse"
SENIOR, JUNIOR = 0.0, 1.0
MAX_OPTION = 1e9  # of a policy's options: sort keys stay finite
MIN_POSITIVE = 1e-3  # of those that something is divided by


class Lengths(Protocol):
    """A predictor of answer lengths, as policies use it."""

    def remaining(self, request: Request) -> float:
        """Return the expected output tokens still to come, given those already made."""
        ...

    def observe(self, request: Request) -> None:
        """Learn from a request that has ended."""
        ...


class MaxTokens:
    """No prediction: every answer counts as long as it may become."""

    def remaining(self, request: Request) -> float:
        return float(request.limit - len(request.tokens))

    def observe(self, request: Request) -> None:
        """Do nothing: there is nothing to learn."""


@dataclass
class View:
    """The state that a policy may look at beside the request. The scheduler keeps it current."""

    ledger: Ledger
    lengths: Lengths = field(default_factory=MaxTokens)
    now: float = 0.0
    active: Mapping[str | None, int] = field(default_factory=dict)  # running requests per adapter
    running: Mapping[str, Progress] = field(default_factory=dict)  # by id
    seconds_per_step: float = 0.0
    tokens_per_step: int = 1

    def seconds_left(self, request: Request) -> float:
        """Estimate the seconds that a request still takes once it runs, at the present pace."""
        progress = self.running.get(request.id)
        computed = 0 if progress is None else progress.num_computed
        prefill = (len(request.tokens) - computed) / self.tokens_per_step
        return (prefill + self.lengths.remaining(request)) * self.seconds_per_step


@dataclass(frozen=True)
class Policy:
    """First come, first served; the base of the others."""

    name: ClassVar[str] = "fcfs"
    strict: ClassVar[bool] = False  # no request overtakes one that does not fit: the bound on unfairness needs it

    def group(self, request: Request) -> Hashable:
        return ""

    def rank(self, request: Request, view: View) -> Rank:
        return (request.arrival,)

    def key(self, group: Hashable, rank: Rank, view: View) -> Rank:
        return rank

    def prepay(self, request: Request, view: View) -> int:
        return 0

    def verdict(self, request: Request, view: View) -> str:
        return GO

    def groups_of(self, adapter: str | None) -> Collection[Hashable]:
        """Return the groups that hold all of an adapter's requests and no others, if there are such groups."""
        return ()

    @property
    def seniority_s(self) -> float:
        """Seconds of waiting after which a request is senior, and its group may be another."""
        return math.inf

    def reason(self, before: Request, after: Request, view: View) -> str:
        """Say why one request goes before another, for people."""
        return f"came {after.arrival - before.arrival:.1f} s earlier"


@dataclass(frozen=True)
class Priority(Policy):
    """The request's own priority, then arrival."""

    name: ClassVar[str] = "priority"

    def rank(self, request: Request, view: View) -> Rank:
        return (request.priority, request.arrival)

    def reason(self, before: Request, after: Request, view: View) -> str:
        if before.priority == after.priority:
            return super().reason(before, after, view)
        return f"has priority {before.priority}, this one {after.priority}"


@dataclass(frozen=True)
class Srtf(Policy):
    """Shortest predicted remaining output first, and every second of waiting is worth `ageing` tokens.

    The bound on waiting: a request that has waited `seniority` seconds is senior. Seniors go before all others, in
    order of arrival, so later requests overtake a request in its first `seniority` seconds only. From then on it waits
    for what first come, first served would make it wait for too: earlier requests, and running ones that have to end.
    """

    name: ClassVar[str] = "srtf"
    ageing: float = 2.0
    seniority: float = 60.0

    @property
    def seniority_s(self) -> float:
        return self.seniority

    def group(self, request: Request) -> Hashable:
        return request.senior

    def rank(self, request: Request, view: View) -> Rank:
        if request.senior:
            return (SENIOR, request.arrival)
        return (JUNIOR, view.lengths.remaining(request) + self.ageing * request.arrival)

    def reason(self, before: Request, after: Request, view: View) -> str:
        if before.senior and not after.senior:
            return f"has waited for more than {self.seniority:g} s"
        if before.senior:
            return super().reason(before, after, view)
        first, second = view.lengths.remaining(before), view.lengths.remaining(after)
        earlier = (after.arrival - before.arrival) * self.ageing
        return f"is predicted {first:.0f} tokens, this one {second:.0f}; its wait is worth {earlier:.0f} more"


@dataclass(frozen=True)
class Inlaid(Srtf):
    """Shortest remaining first among few tasks: at most `beta` adapters in a step, and while there are as many, those
    waiting for one of them go first. A senior's adapter comes in beside them, so that srtf's bound on waiting holds."""

    name: ClassVar[str] = "inlaid"
    beta: int = 32

    def group(self, request: Request) -> Hashable:
        return (request.adapter, request.senior)

    def groups_of(self, adapter: str | None) -> Collection[Hashable]:
        return ((adapter, True), (adapter, False))


@dataclass(frozen=True)
class Vtc(Policy):
    """Virtual token counter: the tenant served least (over weight, lifted after idleness) goes first. `predict`:
    charge nothing ahead, the predictor's length, or the true one (experiments).

    The bound: over any time in which two tenants both have requests waiting, their services over weight differ by at
    most 2 max(w_p L, w_q M), with L the longest prompt, M the most tokens that running requests hold together, and the
    prices w_p and w_q of prompt and output tokens. A tenant that comes when another holds all S seats does not wait for
    answers to end: one seat a step changes hands until it holds its share s (see seats.py), so beside one other of
    equal weight it falls behind by at most w_q s (S - s) meanwhile, prompts aside.
    """

    name: ClassVar[str] = "vtc"
    strict: ClassVar[bool] = True
    predict: str = "none"

    def __post_init__(self) -> None:
        if self.predict not in ("none", "predicted", "oracle"):
            raise ValueError(f"vtc: predict is {self.predict!r}; it must be none, predicted or oracle")

    def group(self, request: Request) -> Hashable:
        return request.tenant

    def key(self, group: Hashable, rank: Rank, view: View) -> Rank:
        account = view.ledger.account(str(group))
        return (account.counter, account.order, *rank)

    def reason(self, before: Request, after: Request, view: View) -> str:
        if before.account is after.account:
            return super().reason(before, after, view)
        return f"its tenant's counter is {before.account.counter:.0f}, this one's {after.account.counter:.0f}"

    def prepay(self, request: Request, view: View) -> int:
        if self.predict == "predicted":
            return max(1, round(view.lengths.remaining(request)))
        if self.predict == "oracle":
            return request.true_output_len or (request.params.max_tokens if request.params.ignore_eos else 0)
        return 0


@dataclass(frozen=True)
class Lcf(Policy):
    """Least counter first: like vtc, but idleness saves up credit (no lift)."""

    name: ClassVar[str] = "lcf"
    strict: ClassVar[bool] = True

    def group(self, request: Request) -> Hashable:
        return request.tenant

    def key(self, group: Hashable, rank: Rank, view: View) -> Rank:
        account = view.ledger.account(str(group))
        return (account.service / account.weight, account.order, *rank)

    def reason(self, before: Request, after: Request, view: View) -> str:
        first, second = before.account, after.account
        if first is second:
            return super().reason(before, after, view)
        served, other = first.service / first.weight, second.service / second.weight
        return f"its tenant was served {served:.0f} over weight, this one's {other:.0f}"


@dataclass(frozen=True)
class Drr(Policy):
    """Deficit round robin: tenants take turns in a fixed order; a turn lasts until `quantum` of service is used up,
    and what a turn overdrew is missing from the next. The turn a tenant is in is its counter over the quantum."""

    name: ClassVar[str] = "drr"
    strict: ClassVar[bool] = True
    quantum: float = 500.0

    def group(self, request: Request) -> Hashable:
        return request.tenant

    def key(self, group: Hashable, rank: Rank, view: View) -> Rank:
        account = view.ledger.account(str(group))
        return (account.counter // self.quantum, account.order, *rank)

    def reason(self, before: Request, after: Request, view: View) -> str:
        first, second = (request.account.counter // self.quantum for request in (before, after))
        if before.account is after.account:
            return super().reason(before, after, view)
        return f"its tenant is in turn {first:.0f}, this one's in turn {second:.0f}"


@dataclass(frozen=True)
class Rpm(Policy):
    """First come, first served among those let in: a tenant may start `limit` requests per `window` seconds, more are
    refused at once."""

    name: ClassVar[str] = "rpm"
    limit: int = 10
    window: float = 60.0


@dataclass(frozen=True)
class Slo(Policy):
    """Least slack first: the latest moment a request can start and still meet its deadline. One without a deadline
    gets `seconds` (0: none). What can no longer make it goes last or is refused, as `late` says."""

    name: ClassVar[str] = "slo"
    seconds: float = 0.0
    late: str = LAST

    def __post_init__(self) -> None:
        if self.late not in (LAST, REFUSE):
            raise ValueError(f"slo: late is {self.late!r}; it must be last or refuse")

    def group(self, request: Request) -> Hashable:
        return "late" if request.late else "in time"

    def rank(self, request: Request, view: View) -> Rank:
        return (self._deadline(request) - view.seconds_left(request), request.arrival)

    def key(self, group: Hashable, rank: Rank, view: View) -> Rank:
        return (group == "late", *rank)

    def verdict(self, request: Request, view: View) -> str:
        in_time = view.now + view.seconds_left(request) <= self._deadline(request)
        return GO if in_time or request.late else self.late

    def reason(self, before: Request, after: Request, view: View) -> str:
        if before.late != after.late:
            return "can still meet its deadline, this one cannot"
        first, second = (self._deadline(r) - view.seconds_left(r) - view.now for r in (before, after))
        if first == second:
            return super().reason(before, after, view)
        return f"must start within {first:.1f} s, this one within {second:.1f} s"

    def _deadline(self, request: Request) -> float:
        if request.deadline is not None:
            return request.deadline
        return request.arrival + self.seconds if self.seconds else float("inf")


POLICIES: Mapping[str, type[Policy]] = MappingProxyType(
    {policy.name: policy for policy in (Policy, Priority, Srtf, Inlaid, Vtc, Lcf, Drr, Rpm, Slo)}
)


def make_policy(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """Make a policy by name with its options; an unknown or negative option raises ValueError."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    kind, options = POLICIES[name], dict(options or {})
    known = {f.name: f.type for f in fields(kind)}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"policy {name} has no option {key!r}; known: {', '.join(sorted(known)) or 'none'}")
        if known[key] == "str" and not isinstance(value, str):
            raise ValueError(f"policy {name}: {key} must be a string, not {value!r}")
        if known[key] != "str":
            _check_number(name, key, value, whole=known[key] == "int")
    return kind(**options)


def parse_policy(text: str) -> Policy:
    """Make a policy from its form on a command line: `vtc`, or `inlaid:beta=5,ageing=2`."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"policy {text!r}: {part!r} is not written key=value")
        try:
            options[key] = int(value) if value.isdigit() else float(value)
        except ValueError:
            options[key] = value
    return make_policy(name, options)


def _check_number(policy: str, key: str, value: Any, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value <= MAX_OPTION:
        kind = "whole number" if whole else "number"
        raise ValueError(f"policy {policy}: {key} must be a {kind} >= 0 and at most {MAX_OPTION:g}, not {value!r}")
    if value < MIN_POSITIVE and key in ("quantum", "window", "beta"):
        raise ValueError(f"policy {policy}: {key} must be above 0, at least {MIN_POSITIVE:g}")
