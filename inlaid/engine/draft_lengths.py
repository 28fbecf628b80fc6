"""Lengths of drafts that pay: how likely a guess is right, what a further row costs a step, and which guesses to take.

A step of S decodes with E guesses takes base + slope * E seconds; both are learned from the steps that ran, for S
within a power of two. A guess is worth the chance that it and all guesses before it are right. Guesses are taken, the
likeliest first, as long as each brings more tokens a second than the step has without it. Where arithmetic decides,
the slope is steep and no guess is taken.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

MOST_KEYS = 4096  # adapters whose acceptance is remembered
FORGETTING = 0.95  # weight of the past, for each guess checked: about twenty count
PRIOR_GUESSES = 4.0
PRIOR_CHANCE = (0.25, 0.35, 0.5, 0.65, 0.8)  # by length of match: below 2, below 4, below 8, below 16, longer
NUM_GRADES = len(PRIOR_CHANCE)
WINDOW = 16  # steps without guesses, and with them, that are remembered
DOUBT_COST = 0.9  # what is left of a slope after a look that found it too steep
DOUBT_CHANCE = 0.97  # what is left of a chance's distance from its prior after a look that found it too small
FEWEST_STEPS = 3  # of each kind, before a slope is believed

Grade = int  # source * NUM_GRADES + class of the match


def grade(source: int, match: int) -> Grade:
    """Return the class of a guess made from a match of so many tokens in a source (0: own text, 1: phrases)."""
    return source * NUM_GRADES + min(match.bit_length(), NUM_GRADES) - 1


class Acceptance:
    """The share of guesses that were right, by adapter and grade, in the recent past."""

    def __init__(self, sources: int = 2) -> None:
        self._size = sources * NUM_GRADES
        self._chances: OrderedDict[str | None, list[float]] = OrderedDict()
        self._weights: dict[str | None, list[float]] = {}

    def chances(self, adapter: str | None) -> Sequence[float]:
        """Return the chance of a guess by grade; it may be changed only by `note`."""
        found = self._chances.get(adapter)
        if found is None:
            found = self._chances[adapter] = list(PRIOR_CHANCE) * (self._size // NUM_GRADES)
            self._weights[adapter] = [PRIOR_GUESSES] * self._size
            if len(self._chances) > MOST_KEYS:
                dropped, _ = self._chances.popitem(last=False)
                del self._weights[dropped]
        return found

    def note(self, adapter: str | None, source: int, match: int, num_guesses: int, num_right: int) -> None:
        """Learn from a draft: guesses behind the first wrong one say nothing."""
        self.chances(adapter)
        chances, weights = self._chances[adapter], self._weights[adapter]
        for place in range(min(num_right + 1, num_guesses)):
            at = grade(source, match + place)
            weight = weights[at] * FORGETTING + 1.0
            chances[at] += ((place < num_right) - chances[at]) / weight
            weights[at] = weight

    def doubt(self, adapter: str | None) -> None:
        """Bring chances nearer to where they began, as no guess has confirmed them."""
        chances = self._chances.get(adapter, [])
        for at in range(len(chances)):
            prior = PRIOR_CHANCE[at % NUM_GRADES]
            chances[at] = prior + DOUBT_CHANCE * (chances[at] - prior)


class _Timing:
    """The last steps of one size: seconds of those without guesses, and guesses and seconds of the others."""

    __slots__ = ("base", "guessed", "last", "plain", "slope", "trust")

    def __init__(self) -> None:
        self.plain: deque[float] = deque(maxlen=WINDOW)
        self.guessed: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self.last = 0  # guesses of the newest step
        self.trust = 1.0  # share of the slope that is believed
        self.base, self.slope = 1.0, 0.0

    def add(self, guesses: int, seconds: float) -> None:
        self.last = guesses
        if guesses:
            self.guessed.append((guesses, seconds))
            self.trust = 1.0
        else:
            self.plain.append(seconds)
        if self.known:
            self.base = max(1e-9, _median(self.plain))
            self.slope = max(0.0, _median([(took - self.base) / count for count, took in self.guessed]))

    @property
    def known(self) -> bool:
        return len(self.plain) >= FEWEST_STEPS and len(self.guessed) >= FEWEST_STEPS


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


class StepCosts:
    """Seconds of a step by its decodes and guesses, learned from the steps that ran. Medians, as the clock of a busy
    machine tells more than the step took, now and then."""

    def __init__(self) -> None:
        self._timings: dict[int, _Timing] = {}  # by bit length of the number of decodes

    def note(self, decodes: int, guesses: int, seconds: float) -> None:
        """Learn from a step of decodes and their guesses alone."""
        self._timings.setdefault(decodes.bit_length(), _Timing()).add(guesses, seconds)

    def known(self, decodes: int) -> bool:
        """Return True if the slope of steps of so many decodes is known."""
        timing = self._timings.get(decodes.bit_length())
        return timing is not None and timing.known

    def doubt(self, decodes: int) -> None:
        """Take a slope for less, as no step has confirmed it: in the end it is tried again."""
        if self.known(decodes):
            self._timings[decodes.bit_length()].trust *= DOUBT_COST

    def of(self, decodes: int) -> tuple[float, float]:
        """Return base and slope of steps of so many decodes. A slope that is not known is tried: it is 0 after a step
        without guesses, and endless after a step with them, since only unlike steps tell it."""
        timing = self._timings.get(decodes.bit_length())
        if timing is None:
            return 1.0, 0.0
        if not timing.known:
            return 1.0, math.inf if timing.last else 0.0
        return timing.base, timing.slope * timing.trust


def choose(worths: Sequence[Sequence[float]], decodes: int, base: float, slope: float, most: int) -> list[int]:
    """Return how many guesses of each draft pay, at most `most` in all.

    `worths` has for each draft the chances that its first, second, … guess counts, which fall along the draft.
    """
    if slope * decodes >= base:  # not even a guess that is sure pays
        return [0] * len(worths)
    rows = [(worth, draft) for draft, each in enumerate(worths) for worth in each]
    rows.sort(reverse=True)
    taken, tokens, seconds = [0] * len(worths), float(decodes), base
    for worth, draft in rows[:most]:
        if worth * seconds <= slope * tokens:
            break
        taken[draft] += 1
        tokens += worth
        seconds += slope
    return taken
