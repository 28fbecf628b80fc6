"""Speculation: which decodes of a step get a draft, and how long it is. The scheduler asks it once a step.

With an overlapping runner a look for drafts costs the overlap of its step: newest tokens must be known before drafts
are made, and how many guesses were right before the next step is made. So all decodes are looked at in the same steps,
and where drafts do not pay, looking for them pauses, and decodes overlap as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from inlaid.config import ConfigError, SpeculationConfig, check
from inlaid.engine.draft_costs import SHORTEST_PAUSE, AllLooks, Looks, Prices, StepCosts
from inlaid.engine.draft_lengths import CLASSES, NUM_GRADES, Acceptance, choose, least_worth
from inlaid.engine.drafts import LONGEST_MATCH, OwnText, PhraseBook, Reader, as_text
from inlaid.engine.request import Batch, FinishReason, Request, Work

MOST_COUNTED = 16  # adapters with counts of their own
FEWEST_TRIED = 2  # guesses of a step that shall tell what a guess costs; or an eighth of the decodes
LEAST_WORTH = 0.01  # a guess less likely than that is not made
OWN, PHRASES, GRAMMAR = 0, 1, 2  # sources of drafts


class Draft(msgspec.Struct, frozen=True, gc=False):
    """Guesses at the next tokens of a request, the source they are from, and how many tokens before them agree."""

    tokens: tuple[int, ...]
    source: int = OWN
    match: int = 0

    def first(self, count: int) -> Draft:
        """Return the draft of the first `count` guesses."""
        return self if count >= len(self.tokens) else Draft(self.tokens[:count], self.source, self.match)


class Drafter(Protocol):
    """A maker of drafts. A draft head or a draft-only adapter may be one."""

    def draft(self, request: Request, most: int) -> Draft | None:
        """Return up to `most` guesses, or None."""
        ...

    def end(self, request: Request) -> None:
        """Learn from a request that has ended, and forget it."""
        ...


class TextDrafter:
    """Drafts from the request's own text and, by the scope, from answers before; the longer match wins."""

    def __init__(self, book: PhraseBook) -> None:
        self.book = book
        self._read: dict[str, tuple[Request, OwnText, Reader]] = {}  # by request id

    def draft(self, request: Request, most: int) -> Draft | None:
        found = self._read.get(request.id)
        if found is None or found[0] is not request:
            found = self._read[request.id] = (request, OwnText(request), self.book.reader(request))
        _, own, reader = found
        phrase, match = reader.find(self.book, most)
        if match < LONGEST_MATCH or not phrase:
            guesses, length = own.find(most)
            if guesses and (length > match or not phrase):
                return Draft(tuple(guesses), OWN, length)
        return Draft(tuple(map(ord, phrase)), PHRASES, match) if phrase else None

    def end(self, request: Request) -> None:
        self._read.pop(request.id, None)
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.book.learn(request, as_text(request.outputs))


@dataclass(slots=True)
class Counts:
    """Drafts made, their guesses, and those that were right."""

    drafts: int = 0
    guesses: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _Plan:
    """A step that is in flight: whether drafts were looked for, and how many guesses should be right."""

    looks: Looks
    looked: bool
    decodes: int = 0
    expected: float = 0.0


class Speculation:
    """Choose drafts for a step's decodes, and learn from what becomes of them."""

    def __init__(self, config: SpeculationConfig, drafter: Drafter | None = None) -> None:
        scope = config.speculation_scope if config.speculation == "suffix" else "request"
        self.drafter = drafter or TextDrafter(PhraseBook(scope, int(config.speculation_memory_mib * 2**20)))
        self.total = Counts()
        self.by_adapter: dict[str, Counts] = {}  # by name; the base is ""
        self.accepted_at = [0] * config.num_speculative_tokens  # guesses that were right, by place in the draft
        self._most = config.num_speculative_tokens
        self._adaptive = config.speculation_length == "auto"
        self._without = frozenset(config.no_speculation_tenant)
        self._acceptance = Acceptance(sources=3)
        self._costs = StepCosts()
        self._made: dict[str, Draft] = {}  # in flight, by request id
        self._looks = AllLooks(SHORTEST_PAUSE if self._adaptive else 0)  # plain steps come first
        self._now = self._looks.of(0, None)
        self._plan = _Plan(self._now, False)
        self._plans: dict[int, _Plan] = {}  # in flight, by step
        self._num_right = 0  # guesses of the step that ends now

    def begin(self, num_running: int, adapter: str | None) -> None:
        """Begin a step of so many running requests; `adapter` is that of a request alone."""
        self._now = looks = self._looks.of(num_running, adapter)
        if looks.pause == 0 and self._adaptive and not self._costs.of(num_running).has_plain:
            looks.pause = SHORTEST_PAUSE  # there is nothing to compare with yet

    @property
    def looking(self) -> bool:
        """Return True if drafts are looked for in the step that begins: then newest tokens must be known."""
        return self._now.pause == 0

    def _may(self, request: Request) -> bool:
        return request.speculation and request.account.tenant not in self._without

    def choose(self, singles: Sequence[Work], budget: int) -> dict[str, Draft]:
        """Return drafts for some of a step's decodes, by request id: at most `budget` guesses, as long as they pay."""
        decodes = len(singles)
        self._plan = plan = _Plan(self._now, self._now.pause == 0, decodes)
        if not plan.looked:
            self._now.pause -= 1
            return {}
        prices = self._costs.of(decodes)
        least = least_worth(decodes, prices.curve, LEAST_WORTH) if self._adaptive else 0.0
        if least >= 1.0:  # not even a guess that is sure pays
            return {}
        found: list[tuple[Request, Draft]] = []
        worths: list[list[float]] = []
        for work in singles:
            request = work.request
            known = len(request.tokens)
            most = min(self._most, request.limit - known - 1)
            if most > 0 and work.samples and len(request.prompt) <= work.start == known - 1 and self._may(request):
                draft = self._draft(request, most)
                if draft is not None:
                    found.append((request, draft))
                    worths.append(self._worths(request, draft, least))
        if not self._adaptive:
            lengths = _within([len(draft.tokens) for _, draft in found], budget)
        else:
            if not prices.known or prices.doubted:
                budget = min(budget, max(FEWEST_TRIED, decodes // 8))
            lengths = choose(worths, decodes, prices.curve, budget)
            plan.expected = sum(sum(each[:length]) for each, length in zip(worths, lengths))
        return {request.id: draft.first(length) for (request, draft), length in zip(found, lengths) if length}

    def _draft(self, request: Request, most: int) -> Draft | None:
        """Return the drafter's guesses up to the first that would end the request or that its grammar forbids; or the
        tokens that the grammar leaves no choice about."""
        draft = self.drafter.draft(request, most)
        if draft is not None and not request.stop_ids.isdisjoint(draft.tokens):
            end = next((at for at, token in enumerate(draft.tokens) if token in request.stop_ids), len(draft.tokens))
            draft = draft.first(end) if end else None
        if request.grammar is None:
            return draft
        forced = tuple(request.grammar.forced(request.outputs))[:most]
        if forced:
            draft = Draft(forced, GRAMMAR, LONGEST_MATCH)
        if draft is None:
            return None
        count = request.grammar.prepare(request.outputs, draft.tokens)
        return draft.first(count) if count else None

    def _worths(self, request: Request, draft: Draft, least: float) -> list[float]:
        """Return the chance of each guess that it and those before it are right, while that is likely enough."""
        chances, worth, worths = self._acceptance.chances(request.adapter), 1.0, []
        first, match = draft.source * NUM_GRADES, draft.match
        for at in CLASSES[match : match + len(draft.tokens)]:
            worth *= chances[first + at]
            if worth < least:
                break
            worths.append(worth)
        return worths

    def submitted(self, request: Request, draft: Draft) -> None:
        """Note the draft that a request has in the step being made."""
        self._made[request.id] = draft

    def begun(self, step: int) -> None:
        """Note the number of the step that has been made."""
        self._plans[step] = self._plan

    def note_accepted(self, work: Work, num_right: int) -> None:
        """Learn how many guesses of a work's draft were right."""
        draft = self._made.pop(work.request.id, None)
        if draft is None:
            return
        self._acceptance.note(work.request.adapter, draft.source, draft.match, len(work.draft), num_right)
        own = self._counts(work.request.adapter_name or "")
        for counts in (self.total, own):
            counts.drafts += 1
            counts.guesses += len(work.draft)
            counts.accepted += num_right
        for place in range(num_right):
            self.accepted_at[place] += 1
        self._num_right += num_right

    def _counts(self, name: str) -> Counts:
        """Return an adapter's counts; names come and go without end, so the rest of many share one."""
        if name not in self.by_adapter and len(self.by_adapter) >= MOST_COUNTED:
            name = "other"
        return self.by_adapter.setdefault(name, Counts())

    def note_step(self, batch: Batch, seconds: float, overlapped: bool) -> None:
        """Learn what a step has cost, if it had decodes only, and whether it paid to look for drafts. `overlapped`: the
        host made it while the device computed the step before."""
        plan, right, self._num_right = self._plans.pop(batch.step, None), self._num_right, 0
        if plan is None:
            return
        works, decodes = batch.works, plan.decodes
        guesses = sum(len(work.draft) for work in works)
        prices = self._costs.of(decodes)
        if works and batch.num_tokens == len(works) + guesses:
            prices.add(guesses, seconds, overlapped)
        if not plan.looked or not self._adaptive:
            return
        looks = plan.looks
        expected = looks.hope(plan.expected, right) if guesses else 0.0
        if prices.known or not guesses:
            gain = (1.0 + expected / decodes) / prices.curve.of(guesses) - 1.0
            if looks.note(gain):
                self._doubt(prices, works)
            elif prices.age >= looks.stale_after():
                looks.pause, prices.age = SHORTEST_PAUSE, 0

    def _doubt(self, prices: Prices, works: Sequence[Work]) -> None:
        """Believe a little less in what spoke against guesses, so that in the end they are tried again."""
        prices.doubt()
        for adapter in {work.request.adapter for work in works}:
            self._acceptance.doubt(adapter)

    def end(self, request: Request) -> None:
        """Forget a request that has ended, and learn its answer if drafts may be made from it."""
        self._made.pop(request.id, None)
        if self._may(request):
            self.drafter.end(request)

    def stats(self) -> dict[str, float]:
        """Return the counters for /metrics."""
        total = self.total
        found: dict[str, float] = {
            "spec_drafts": total.drafts,
            "spec_draft_tokens": total.guesses,
            "spec_accepted_tokens": total.accepted,
        }
        found |= {f"spec_accepted_at_{place}": count for place, count in enumerate(self.accepted_at)}
        for name, counts in self.by_adapter.items():
            found[f"spec_drafts of {name}"] = counts.drafts
            found[f"spec_draft_tokens of {name}"] = counts.guesses
            found[f"spec_accepted_tokens of {name}"] = counts.accepted
        return found


def make_speculation(config: SpeculationConfig) -> Speculation | None:
    """Make what a configuration asks for; None: no drafts. ConfigError: its JSON form is not valid."""
    settled = resolved(config)
    return None if settled.speculation == "off" else Speculation(settled)


def resolved(config: SpeculationConfig) -> SpeculationConfig:
    """Return the settings with those of --speculative-config over them."""
    if not config.speculative_config:
        return config
    try:
        given = msgspec.json.decode(config.speculative_config, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--speculative-config is not a JSON object: {error}") from error
    names = {"method": "speculation", "num_speculative_tokens": "num_speculative_tokens"}
    unknown = sorted(given.keys() - names.keys())
    if unknown:
        raise ConfigError(f"--speculative-config: unknown {', '.join(unknown)}; known: {', '.join(names)}")
    values = {names[name]: value for name, value in given.items()}
    if values.get("speculation") not in ("ngram", "suffix"):
        raise ConfigError(f"--speculative-config: method {values.get('speculation')!r}; known: ngram, suffix")
    settled = replace(config, speculative_config="", **values)
    check(settled)
    return settled


def _within(lengths: Sequence[int], budget: int) -> list[int]:
    """Cut lengths so that their sum stays within a budget, the first first."""
    cut = []
    for length in lengths:
        cut.append(min(length, max(0, budget)))
        budget -= cut[-1]
    return cut
