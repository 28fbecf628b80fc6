"""Meanings: what a sentence says, apart from any language, and how English says it.

`languages` says the same meanings in the constructed languages; `families` uses the English alone.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from data import words


class Zipf:
    """Draws items with probability 1 / rank**exponent, the ranking being a permutation of its own seed."""

    def __init__(self, items: Sequence[str], seed: str, exponent: float) -> None:
        self.items = list(items)
        random.Random(seed).shuffle(self.items)
        weights = [1.0 / rank**exponent for rank in range(1, len(self.items) + 1)]
        self.cumulative = list(itertools.accumulate(weights))

    def draw(self, rng: random.Random) -> str:
        return self.items[bisect.bisect(self.cumulative, rng.random() * self.cumulative[-1])]


@dataclass(frozen=True)
class NounPhrase:
    determiner: str
    adjective: str | None
    noun: str
    is_plural: bool

    def english(self) -> str:
        noun = words.plural(self.noun) if self.is_plural else self.noun
        named = f"{self.adjective} {noun}" if self.adjective else noun
        return f"{self._english_determiner(named[0])} {named}"

    def _english_determiner(self, next_letter: str) -> str:
        if self.is_plural:
            return {"a": "some", "this": "these"}.get(self.determiner, self.determiner)
        return "an" if self.determiner == "a" and next_letter in "aeiou" else self.determiner


@dataclass(frozen=True)
class Sentence:
    subject: NounPhrase
    verb: str
    is_past: bool
    object: NounPhrase
    adverb: str | None
    preposition: str | None
    place: NounPhrase | None

    def english(self) -> str:
        verb = PAST[self.verb] if self.is_past else f"will {self.verb}"
        parts = [self.subject.english(), self.adverb, verb, self.object.english()]
        if self.preposition and self.place:
            parts += [self.preposition, self.place.english()]
        return " ".join(part for part in parts if part) + "."


PAST = MappingProxyType(dict(words.VERBS))


class Speaker:
    """Makes up sentences; each speaker prefers words of its own, so tasks differ in what they exercise."""

    def __init__(self, seed: str, exponent: float) -> None:
        self.nouns = Zipf(words.NOUNS, f"{seed}/nouns", exponent)
        self.verbs = Zipf(list(PAST), f"{seed}/verbs", exponent)
        self.adjectives = Zipf(words.ADJECTIVES, f"{seed}/adjectives", exponent)
        self.adverbs = Zipf(words.ADVERBS, f"{seed}/adverbs", exponent)
        self.prepositions = Zipf(words.PREPOSITIONS, f"{seed}/prepositions", exponent)

    def noun_phrase(self, rng: random.Random) -> NounPhrase:
        adjective = self.adjectives.draw(rng) if rng.random() < 0.6 else None
        return NounPhrase(rng.choice(words.DETERMINERS), adjective, self.nouns.draw(rng), rng.random() < 0.35)

    def sentence(self, rng: random.Random) -> Sentence:
        has_place = rng.random() < 0.6
        return Sentence(
            subject=self.noun_phrase(rng),
            verb=self.verbs.draw(rng),
            is_past=rng.random() < 0.6,
            object=self.noun_phrase(rng),
            adverb=self.adverbs.draw(rng) if rng.random() < 0.5 else None,
            preposition=self.prepositions.draw(rng) if has_place else None,
            place=self.noun_phrase(rng) if has_place else None,
        )
