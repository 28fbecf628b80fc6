"""ReplicaView: a replica as its front sees it: the requests that it was sent, and what its answers say of it.

Placement reads views; the cluster's client and the simulator write them. Prices turn what a view holds into seconds;
a list of them is one object, which `pricing.py` brings up to date.
Pure: no clock, no Ray, no torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

MAX_PREFIXES = 8192  # chunks of prompts that a view remembers
PREFIX_CHUNK = 64  # tokens of a prompt under one key


@dataclass
class Prices:
    """Seconds per unit of a replica's work: the parts of a fitted cost model that placement uses."""

    step: float = 0.004
    floor: float = 0.0  # the least that a step takes
    prefill_token: float = 2.2e-5
    prefill: float = 2.1e-4
    decode: float = 2.5e-5  # for each row of a step
    context: float = 4e-8  # for each token that a step's rows attend to
    adapter: float = 5e-6  # for each adapter of a step
    rank: float = 1.2e-6  # for each unit of rank of a step's adapters
    load_base: float = 3e-4
    load_rank: float = 3.8e-5  # from host memory to the device
    read_rank: float = 4e-4  # from disk to host memory

    def step_seconds(self, rows: float, adapters: int, ranks: int, context: float) -> float:
        """Return the seconds of a decode step."""
        own = self.decode * rows + self.context * context + self.adapter * adapters + self.rank * ranks
        return max(self.floor, self.step + own)

    def prefill_seconds(self, tokens: int, prompts: int = 1) -> float:
        """Return the seconds that computing prompts adds."""
        return self.prefill_token * tokens + self.prefill * prompts

    def load_seconds(self, rank: int, on_host: bool = True) -> float:
        """Return the seconds until an absent adapter of this rank is on the device."""
        return self.load_base + rank * (self.load_rank + (0.0 if on_host else self.read_rank))


@dataclass(frozen=True)
class Ask:
    """A request as placement sees it. `prefix`: a key for each full chunk of the prompt, which names all before it."""

    id: str
    adapter: str | None
    rank: int
    prompt: int  # tokens
    output: float  # tokens that are expected
    prefix: tuple[int, ...] = ()


@dataclass(eq=False)
class ReplicaView:
    """One replica. `begin` and `end` follow each request that was sent; `resident` is as last heard."""

    name: str
    seats: int  # requests that run at once
    slots: int  # adapters on the device at once
    is_open: bool = True  # new requests may be sent
    silent: float = 0.0  # seconds that it has owed an answer
    pace: float = 1.0  # seconds of its steps for each second that the prices say
    resident: Collection[str] = frozenset()
    on_host: Collection[str] | None = None  # None: host memory holds all adapters
    waiting_tokens: int = 0  # of prompts that have no output yet
    context: int = 0  # tokens of all prompts
    num_waiting: int = 0
    num_running: int = 0
    ranks: int = 0  # of the adapters of all these requests, each adapter once
    expected: float = 0.0  # output tokens that its requests are expected to make
    _asks: dict[str, Ask] = field(default_factory=dict)
    _begun: set[str] = field(default_factory=set)
    _adapters: dict[str, int] = field(default_factory=dict)  # requests of each
    _prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def size(self) -> int:
        """Requests that it has been sent and has not ended."""
        return len(self._asks)

    @property
    def adapters(self) -> Collection[str]:
        """Adapters of its requests."""
        return self._adapters.keys()

    def has(self, adapter: str | None) -> bool:
        """Return True if no load is needed, or one is under way already."""
        return adapter is None or adapter in self.resident or adapter in self._adapters

    def send(self, ask: Ask) -> None:
        """Note a request that is sent to the replica."""
        self._asks[ask.id] = ask
        self.num_waiting += 1
        self.waiting_tokens += ask.prompt
        self.context += ask.prompt
        self.expected += ask.output
        if ask.adapter is not None:
            held = self._adapters.get(ask.adapter, 0)
            self._adapters[ask.adapter] = held + 1
            self.ranks += 0 if held else ask.rank
        for key in ask.prefix:
            self._prefixes[key] = None
            self._prefixes.move_to_end(key)
        while len(self._prefixes) > MAX_PREFIXES:
            self._prefixes.popitem(last=False)

    def begin(self, request_id: str) -> None:
        """Note a request's first output."""
        ask = self._asks.get(request_id)
        if ask is not None and request_id not in self._begun:
            self._begun.add(request_id)
            self.num_waiting -= 1
            self.num_running += 1
            self.waiting_tokens -= ask.prompt

    def end(self, request_id: str) -> None:
        """Note that a request has ended, or has left the replica."""
        ask = self._asks.pop(request_id, None)
        if ask is None:
            return
        self.expected -= ask.output
        self.context -= ask.prompt
        if request_id in self._begun:
            self._begun.remove(request_id)
            self.num_running -= 1
        else:
            self.num_waiting -= 1
            self.waiting_tokens -= ask.prompt
        if ask.adapter is not None:
            self._adapters[ask.adapter] -= 1
            if not self._adapters[ask.adapter]:
                del self._adapters[ask.adapter]
                self.ranks -= ask.rank

    def forget_caches(self) -> None:
        """Note that the replica has started anew: nothing is on its device."""
        self.resident = frozenset()
        self._prefixes.clear()

    def cached(self, ask: Ask) -> int:
        """Return how many tokens of the prompt the replica has probably computed before."""
        count = 0
        for key in ask.prefix:
            if key not in self._prefixes:
                break
            count += 1
        return min(count * PREFIX_CHUNK, max(0, ask.prompt - 1))


def prefix_keys(tokens: list[int], root: str) -> tuple[int, ...]:
    """Return a key for each full chunk of a prompt. `root` names what else KV depends on: adapter and salt."""
    keys, key = [], hash(root)
    for start in range(0, len(tokens) - PREFIX_CHUNK + 1, PREFIX_CHUNK):
        key = hash((key, *tokens[start : start + PREFIX_CHUNK]))
        keys.append(key)
    return tuple(keys)
