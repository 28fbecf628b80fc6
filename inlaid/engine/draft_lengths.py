"""Lengths of drafts that pay: how likely a guess is right, and which guesses to take at the price of a step's rows.

A guess is worth the chance that it and all guesses before it are right. Guesses are taken, the likeliest first, as long
as tokens a second grow. `draft_costs.py` knows the price.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from inlaid.engine.draft_costs import Curve

MOST_KEYS = 4096  # adapters whose acceptance is remembered
FORGETTING = 0.95  # weight of the past, for each guess checked: about twenty count
FORGETTING_OF_ALL = 0.99  # the same for all adapters together: about a hundred
PRIOR_GUESSES = 4.0
PRIOR_CHANCE = (0.25, 0.35, 0.5, 0.65, 0.8)  # by length of match: below 2, below 4, below 8, below 16, longer
NUM_GRADES = len(PRIOR_CHANCE)
MOST_MATCHING = 128  # tokens: a longest match, and a longest draft behind it
CLASSES = tuple(max(0, min(match.bit_length(), NUM_GRADES) - 1) for match in range(MOST_MATCHING))
DOUBT = 0.97  # what is left of a chance's distance from its prior after a look that found it too small
LEAST_MORE = 0.01  # tokens a second that a step's guesses must add, as a share

Grade = int  # source * NUM_GRADES + class of the match


def grade(source: int, match: int) -> Grade:
    """Return the class of a guess made from a match of so many tokens in a source (0: own text, 1: phrases)."""
    return source * NUM_GRADES + CLASSES[match]


class Acceptance:
    """The share of guesses that were right, by adapter and grade, in the recent past. An adapter that is new begins
    with the share of all."""

    def __init__(self, sources: int = 2) -> None:
        self._size = sources * NUM_GRADES
        self._prior = list(PRIOR_CHANCE) * sources
        self._of_all, self._weights_of_all = list(self._prior), [PRIOR_GUESSES] * self._size
        self._chances: OrderedDict[str | None, list[float]] = OrderedDict()
        self._weights: dict[str | None, list[float]] = {}

    def chances(self, adapter: str | None) -> Sequence[float]:
        """Return the chance of a guess by grade; it may be changed only by `note`."""
        found = self._chances.get(adapter)
        if found is None:
            found = self._chances[adapter] = list(self._of_all)
            self._weights[adapter] = [PRIOR_GUESSES] * self._size
            if len(self._chances) > MOST_KEYS:
                dropped, _ = self._chances.popitem(last=False)
                del self._weights[dropped]
        return found

    def note(self, adapter: str | None, source: int, match: int, num_guesses: int, num_right: int) -> None:
        """Learn from a draft: guesses behind the first wrong one say nothing."""
        self.chances(adapter)
        own = self._chances[adapter], self._weights[adapter], FORGETTING
        for chances, weights, forgetting in (own, (self._of_all, self._weights_of_all, FORGETTING_OF_ALL)):
            for place in range(min(num_right + 1, num_guesses)):
                at = grade(source, match + place)
                weight = weights[at] * forgetting + 1.0
                chances[at] += ((place < num_right) - chances[at]) / weight
                weights[at] = weight

    def doubt(self, adapter: str | None) -> None:
        """Bring chances nearer to where they began, as no guess has confirmed them."""
        chances = self._chances.get(adapter, [])
        for at in range(len(chances)):
            prior = self._prior[at]
            chances[at] = prior + DOUBT * (chances[at] - prior)


def least_worth(decodes: int, curve: Curve, floor: float) -> float:
    """Return what a guess must be worth to be taken at all: less pays in no company."""
    return floor if curve.few else max(floor, curve.slope * decodes / curve.look)


def choose(worths: Sequence[Sequence[float]], decodes: int, curve: Curve, most: int) -> list[int]:
    """Return how many guesses of each draft pay, at most `most` in all.

    `worths` has for each draft the chances that its first, second, … guess counts, which fall along the draft.
    """
    taken = [0] * len(worths)
    rows = [(worth, draft) for draft, each in enumerate(worths) for worth in each]
    rows.sort(reverse=True)
    tokens, slope, price, num_few = float(decodes), curve.slope, curve.of, len(curve.few)
    best, count = (1.0 + LEAST_MORE) * decodes / curve.look, 0
    for number, (worth, _) in enumerate(rows[: max(0, most)], 1):
        seconds = price(number)
        tokens += worth
        if tokens > best * seconds:
            best, count = tokens / seconds, number
        elif number > num_few and worth * seconds <= slope * tokens:
            break
    for _, draft in rows[:count]:
        taken[draft] += 1
    return taken
