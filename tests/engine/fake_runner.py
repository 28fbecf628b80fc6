"""A runner without a model. It keeps a KV cache of hashes: every position written names everything before it and the
adapter, and every token sampled first checks that the whole context is there, so a block handed to the wrong request,
freed too early or shared by mistake shows at once. The next token is a function of the context alone, so that
outputs must not depend on batching, chunking, preemption or prefix hits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from inlaid.engine.request import Batch, Request, Sampled, StepResult, TokenLogprobs, Work, accept

EOS = 7
VOCABULARY = 50


def next_token(context: int) -> int:
    return context % VOCABULARY


def chain(parent: int, token: int) -> int:
    return hash((parent, token)) & 0xFFFFFFFF


def root(adapter: str | None) -> int:
    return sum(map(ord, adapter or "base"))


def generate(prompt: list[int], adapter: str | None, count: int, stop: frozenset[int] = frozenset({EOS})) -> list[int]:
    """Return the answer that the engine must give: the oracle, one token after the other."""
    context = root(adapter)
    for token in prompt:
        context = chain(context, token)
    made: list[int] = []
    while len(made) < count:
        made.append(next_token(context))
        if made[-1] in stop:
            break
        context = chain(context, made[-1])
    return made


@dataclass
class FakeRunner:
    """Runs at submit, answers at collect, like a device with a queue."""

    block_size: int
    overlap: bool = False
    max_tokens: int = 10**9
    fail_submit: set[int] = field(default_factory=set)
    fail_collect: set[int] = field(default_factory=set)
    poison: dict[str, str] = field(default_factory=dict)  # request -> where it fails: submit or collect
    void: dict[str, int] = field(default_factory=dict)  # request -> how often its logits are not finite
    kv: dict[tuple[int, int], int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    in_flight: dict[int, dict[int, str]] = field(default_factory=dict)  # step -> block it writes -> request

    def submit(self, batch: Batch) -> Any:
        assert batch.works
        assert batch.num_tokens <= self.max_tokens
        assert len({work.request.id for work in batch.works}) == len(batch.works)
        sizes = [work.num_tokens > 1 for work in batch.works]
        assert sizes == sorted(sizes), "single-token works come first"
        self.batches.append(batch)
        self._check_writes(batch)
        if batch.step in self.fail_submit:
            raise RuntimeError("the device said no")
        self._fail_on(batch, "submit")
        void = tuple(w.request.id for w in batch.works if w.samples and self.void.get(w.request.id, 0) > 0)
        self.void.update({name: self.void[name] - 1 for name in void})
        result = StepResult([], not_finite=void)
        for work in batch.works:
            contexts = self._write(work)
            if work.samples:
                made = [Sampled(next_token(context)) for context in contexts[-1 - len(work.draft) :]]
                result.sampled.append(accept(work, made) if work.draft else made[0])
                self.last[work.request.id] = made[0].token
            if work.request.params.prompt_logprobs is not None:
                known = work.request.prompt[work.start + 1 : work.start + work.num_tokens + 1]
                result.prompt_logprobs[work.request.id] = [TokenLogprobs(t, -1.0, 1, []) for t in known]
        return batch, result

    def collect(self, ticket: Any) -> StepResult:
        batch, result = ticket
        del self.in_flight[batch.step]
        self._fail_on(batch, "collect")
        if batch.step in self.fail_collect:
            raise RuntimeError("the device fell over")
        return result

    def _fail_on(self, batch: Batch, where: str) -> None:
        for work in batch.works:
            if self.poison.get(work.request.id) == where:
                if where == "submit":
                    self.in_flight.pop(batch.step, None)
                raise IndexError(f"no embedding for {work.request.id}")

    def _check_writes(self, batch: Batch) -> None:
        """No block that a submitted step still writes has been given to someone else."""
        writes: dict[int, str] = {}
        for work in batch.works:
            first, last = work.start // self.block_size, (work.start + work.num_tokens - 1) // self.block_size
            writes |= dict.fromkeys(work.request.blocks[first : last + 1], work.request.id)
        for other in self.in_flight.values():
            for block, owner in writes.items():
                assert other.get(block, owner) == owner, f"block {block} is still written by {other[block]}"
        if batch.step not in self.fail_submit:
            self.in_flight[batch.step] = writes

    def _write(self, work: Work) -> list[int]:
        request, start, count = work.request, work.start, work.num_tokens
        tokens = [*request.tokens, *work.draft]
        contexts = []
        context = root(request.adapter) if start == 0 else self._read(request, start - 1)
        for position in range(start):
            self._read(request, position)
        for position in range(start, start + count):
            context = chain(context, tokens[position] if position < len(tokens) else self.last[request.id])
            block = request.blocks[position // self.block_size]
            assert block != 0
            self.kv[block, position % self.block_size] = context
            contexts.append(context)
        return contexts

    def _read(self, request: Request, position: int) -> int:
        context = root(request.adapter)
        for index in range(position + 1):
            context = chain(context, request.tokens[index] if index < len(request.tokens) else self.last[request.id])
        stored = self.kv.get((request.blocks[position // self.block_size], position % self.block_size))
        assert stored == context, f"KV of {request.id} at {position} is not its own"
        return context


class FakeAdapters:
    """A directory with room for `slots` adapters; `load` steps pass between want and ready."""

    def __init__(self, names: tuple[str, ...] = (), slots: int = 100, load: int = 0, ranks: int = 8) -> None:
        self.names = names
        self.slots = slots
        self.load = load
        self.ranks = ranks
        self.loading: dict[str, int] = {}
        self.resident: dict[str, None] = {}
        self.pins: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.broken: set[str] = set()
        self.seconds = (0.0, 0.0)  # of reading and copying

    def resolve(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(f"adapter {name!r} is unknown")
        self.held[name] = self.held.get(name, 0) + 1
        return name

    def release(self, identity: str) -> None:
        assert self.held[identity] > 0
        self.held[identity] -= 1

    def ready(self, identity: str) -> bool:
        if identity in self.broken:
            raise RuntimeError("it has NaNs")
        return identity in self.resident

    def want(self, identity: str) -> None:
        if identity in self.resident:
            return
        self.loading[identity] = self.loading.get(identity, self.load) - 1
        if self.loading[identity] <= 0 and self._make_room():
            self.resident[identity] = None
            del self.loading[identity]

    def _make_room(self) -> bool:
        idle = [name for name in self.resident if not self.pins.get(name)]
        if len(self.resident) >= self.slots and idle:
            del self.resident[idle[0]]
        return len(self.resident) < self.slots

    def pin(self, identity: str) -> None:
        assert identity in self.resident
        self.pins[identity] = self.pins.get(identity, 0) + 1

    def load_seconds(self, identity: str) -> tuple[float, float]:
        return self.seconds

    def unpin(self, identity: str) -> None:
        assert self.pins[identity] > 0
        self.pins[identity] -= 1

    def rank(self, identity: str) -> int:
        return self.ranks

    def check_idle(self) -> None:
        assert not any(self.pins.values())
        assert not any(self.held.values())
