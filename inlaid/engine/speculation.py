"""Speculation: which decodes of a step get a draft, and how long it is. The scheduler asks it once a step.

With an overlapping runner a draft costs the overlap of its request: its newest token must be known before the draft is
made, and how many guesses were right before the next step is made. So where drafts do not pay, at this number of
decodes, looking for them pauses, and decodes overlap as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from inlaid.config import ConfigError, SpeculationConfig, check
from inlaid.engine.draft_lengths import Acceptance, StepCosts, choose, grade
from inlaid.engine.drafts import LONGEST_MATCH, PhraseBook, Prompted, as_text
from inlaid.engine.request import Batch, FinishReason, Request, Work

SHORTEST_PAUSE, LONGEST_PAUSE = 4, 256  # steps without a look, after looks in vain
LOOKS = 8  # over which a gain is averaged
LEAST_GAIN = 0.02  # of tokens a second; less is within the error of what is known
MOST_COUNTED = 16  # adapters with counts of their own
FEWEST_TRIED = 2  # guesses of a step that shall tell what a guess costs
LEAST_WORTH = 0.05  # a guess less likely than that is not made
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
        self._own: dict[str, Prompted] = {}  # by request id

    def draft(self, request: Request, most: int) -> Draft | None:
        own = self._own.get(request.id)
        if own is None:
            own = self._own[request.id] = Prompted(request)
        tail = own.text()[-LONGEST_MATCH:]
        guesses, match = self.book.find(request, tail, most)
        source = PHRASES
        if match < LONGEST_MATCH:
            found, length = own.find(most)
            if length > match or not guesses:
                guesses, match, source = found, length, OWN
        return Draft(tuple(map(ord, guesses)), source, match) if guesses else None

    def end(self, request: Request) -> None:
        self._own.pop(request.id, None)
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.book.learn(request, as_text(request.outputs))


@dataclass(slots=True)
class Counts:
    """Drafts made, their guesses, and those that were right."""

    drafts: int = 0
    guesses: int = 0
    accepted: int = 0


class _Looks:
    """The mean gain of the last looks for drafts, and the pause after looks in vain."""

    __slots__ = ("gain", "last", "pause")

    def __init__(self) -> None:
        self.gain = 10 * LEAST_GAIN
        self.pause = 0  # steps left until the next look
        self.last = SHORTEST_PAUSE // 2  # the last pause

    def pauses_after(self, gain: float) -> bool:
        """Take in what a look has gained, as a share of the step's tokens a second. Return True if a pause begins now,
        each longer than the one before."""
        self.gain += (gain - self.gain) / LOOKS
        if self.gain >= LEAST_GAIN:
            self.last = SHORTEST_PAUSE // 2
            return False
        self.pause = self.last = min(2 * self.last, LONGEST_PAUSE)
        return True


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
        self._looks: dict[int, _Looks] = {}  # by bit length of the number of running requests
        self._now = _Looks()
        self._num_right = 0  # guesses of the step that ends now

    def begin(self, num_running: int) -> None:
        """Begin a step of so many running requests."""
        self._now = self._looks.setdefault(num_running.bit_length(), _Looks())

    def wants(self, request: Request) -> bool:
        """Return True if drafts are looked for now, and this request may have one."""
        return self._now.pause == 0 and self._may(request)

    def _may(self, request: Request) -> bool:
        return request.speculation and request.account.tenant not in self._without

    def choose(self, singles: Sequence[Work], budget: int) -> dict[str, Draft]:
        """Return drafts for some of a step's decodes, by request id: at most `budget` guesses, as long as they pay."""
        budget = max(0, budget)
        if self._now.pause:
            self._now.pause -= 1
            return {}
        found: list[tuple[Request, Draft]] = []
        worths: list[list[float]] = []
        for work in singles:
            request = work.request
            known = len(request.tokens)
            most = min(self._most, request.limit - known - 1)
            if most > 0 and work.samples and request.num_prompt <= work.start == known - 1 and self._may(request):
                draft = self._draft(request, most)
                if draft is not None:
                    found.append((request, draft))
                    worths.append(self._worths(request, draft))
        if self._adaptive:
            if not self._costs.known(len(singles)):
                budget = min(budget, max(FEWEST_TRIED, len(singles) // 8))
            base, slope = self._costs.of(len(singles))
            lengths = choose(worths, len(singles), base, slope, budget)
            if self._costs.known(len(singles)):
                tokens = sum(sum(each[:length]) for each, length in zip(worths, lengths))
                if self._gain(len(singles), sum(lengths), tokens) < LEAST_GAIN:
                    lengths = [0] * len(lengths)
                    if self._now.pauses_after(0.0):
                        self._doubt(singles, found)
        else:
            lengths = _within([len(draft.tokens) for _, draft in found], budget)
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

    def _worths(self, request: Request, draft: Draft) -> list[float]:
        """Return the chance of each guess that it and those before it are right, while that is likely enough."""
        chances, worth, worths = self._acceptance.chances(request.adapter), 1.0, []
        for match in range(draft.match, draft.match + len(draft.tokens)):
            worth *= chances[grade(draft.source, match)]
            if worth < LEAST_WORTH:
                break
            worths.append(worth)
        return worths

    def _gain(self, decodes: int, guesses: int, right: float) -> float:
        """Return by what share so many right guesses raise the tokens a second of a step."""
        base, slope = self._costs.of(decodes)
        return (1.0 + right / decodes) * base / (base + slope * guesses) - 1.0

    def _doubt(self, singles: Sequence[Work], found: Sequence[tuple[Request, Draft]]) -> None:
        """Believe a little less in what spoke against guesses, so that in the end they are tried again."""
        self._costs.doubt(len(singles))
        for adapter in {request.adapter for request, _ in found}:
            self._acceptance.doubt(adapter)

    def submitted(self, request: Request, draft: Draft) -> None:
        """Note the draft that a request has in the step being made."""
        self._made[request.id] = draft

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

    def note_step(self, batch: Batch, seconds: float) -> None:
        """Learn what a step has cost, if it had decodes only."""
        works = batch.works
        guesses = batch.num_tokens - len(works)
        if works and guesses == sum(len(work.draft) for work in works):
            self._costs.note(len(works), guesses, seconds)
            if guesses and self._adaptive and self._costs.known(len(works)):
                self._now.pauses_after(self._gain(len(works), guesses, self._num_right))
        self._num_right = 0

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
