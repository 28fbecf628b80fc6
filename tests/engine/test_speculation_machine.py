"""Any order of requests, steps, swapped adapters, aborts and preemptions, with drafts made of texts: answers are those
of plain decoding, and no draft has text that its request may not see."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from msgspec.structs import replace

from inlaid.config import SpeculationConfig
from inlaid.engine.drafts import PhraseBook, as_text
from inlaid.engine.request import FinishReason, Request
from inlaid.engine.speculation import Draft, Speculation, TextDrafter
from tests.engine.bench import ADAPTERS, Bench
from tests.engine.fake_runner import FakeAdapters
from tests.examples import examples

PROMPTS = ([1, 2, 3, 1, 2], [4, 5, 4, 5, 4, 5], [6])
TENANTS = ("x", "y")


class SwappedAdapters(FakeAdapters):
    """A directory in which a name may get other weights: requests that have begun keep theirs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(ADAPTERS, **settings)
        self.swaps = dict.fromkeys(ADAPTERS, 0)

    def resolve(self, name: str) -> str:
        super().resolve(name)
        super().release(name)
        identity = self.identity(name)
        self.held[identity] = self.held.get(identity, 0) + 1
        return identity

    def identity(self, name: str) -> str:
        return name + "'" * self.swaps[name]


class Watched(TextDrafter):
    """Makes drafts of texts, and checks that each stands in a text that its request may see."""

    def __init__(self, scope: str) -> None:
        super().__init__(PhraseBook(scope, 1 << 20))
        self.num_drafts = 0
        self._finished: list[tuple[object, str]] = []

    def draft(self, request: Request, most: int) -> Draft | None:
        draft = super().draft(request, most)
        if draft is not None:
            self.num_drafts += 1
            seen = [as_text(request.tokens), *(text for owner, text in self._finished if owner == _owner(request))]
            assert any(as_text(draft.tokens) in text for text in seen), "a draft of text that is not its own"
        return draft

    def end(self, request: Request) -> None:
        super().end(request)
        self._finished.append((_owner(request), as_text(request.outputs)))


def _owner(request: Request) -> object:
    return request.adapter, request.tenant, request.cache_salt


class Drafting(RuleBasedStateMachine):
    """An engine whose requests have drafts."""

    @initialize(
        overlap=st.booleans(),
        length=st.sampled_from(["auto", "fixed"]),
        slots=st.integers(1, 3),
        blocks=st.integers(10, 30),
    )
    def start(self, overlap: bool, length: str, slots: int, blocks: int) -> None:
        config = SpeculationConfig(speculation="suffix", num_speculative_tokens=4, speculation_length=length)
        self.adapters = SwappedAdapters(slots=slots, load=2)
        self.drafter = Watched("tenant")
        self.bench = Bench(
            num_blocks=blocks, overlap=overlap, adapters=self.adapters, speculation=Speculation(config, self.drafter),
            max_num_seqs=4,
        )  # fmt: skip
        self.num_added = 0

    @rule(
        prompt=st.sampled_from(PROMPTS), adapter=st.sampled_from([None, "a", "b"]), tenant=st.sampled_from(TENANTS),
        most=st.integers(1, 16), speculates=st.sampled_from([True, True, False]),
    )  # fmt: skip
    def add(self, prompt: list[int], adapter: str | None, tenant: str, most: int, speculates: bool) -> None:
        name = f"r{self.num_added}"
        self.num_added += 1
        self.bench.add(
            name, list(prompt), adapter, tenant, max_tokens=most, ignore_eos=True, speculation=speculates
        )  # fmt: skip
        if adapter is not None:  # its answer is that of the weights that it found
            wanted = self.bench.wanted[name]
            self.bench.wanted[name] = replace(wanted, adapter=self.adapters.identity(adapter))

    @rule(adapter=st.sampled_from(["a", "b"]))
    def swap(self, adapter: str) -> None:
        self.adapters.swaps[adapter] += 1

    @rule(which=st.integers(0, 9))
    def abort(self, which: int) -> None:
        self.bench.engine.abort(f"r{which}")

    @rule(which=st.integers(0, 3))
    def preempt(self, which: int) -> None:
        running = sorted(self.bench.scheduler.state.running)
        if which < len(running):
            self.bench.scheduler.preempt(running[which])

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.bench.step()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.run().check_all()
        ends = self.bench.ends.values()
        assert all(end.finish_reason in (FinishReason.LENGTH, FinishReason.ABORT) for end in ends)
        drafter = self.drafter
        assert not drafter._read, "a request that has ended is still remembered"


TestDrafting = Drafting.TestCase
TestDrafting.settings = examples(40, stateful_step_count=30, suppress_health_check=list(HealthCheck))


def test_the_watch_sees_text_of_another_tenant() -> None:
    """The same two requests under the scope that lets text through."""
    drafter = Watched("adapter")
    config = SpeculationConfig(speculation="suffix", num_speculative_tokens=4, speculation_length="fixed")
    bench = Bench(speculation=Speculation(config, drafter))
    bench.add("owner", [6], "a", "x", max_tokens=16, ignore_eos=True)
    bench.run()
    bench.add("thief", [6], "a", "y", max_tokens=16, ignore_eos=True)
    seen = ""
    try:
        bench.run()
    except AssertionError as error:
        seen = str(error)
    assert "not its own" in seen
