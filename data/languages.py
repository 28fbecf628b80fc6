"""Six constructed languages: each a sound system, a lexicon, a word order and affix rules.

`tasks` makes the six translation tasks of them. Everything follows from the language's name, so a lexicon is
never stored: `LANGUAGES["velar"].say(sentence)` is the reference translation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from data import words
from data.sentences import PAST, NounPhrase, Sentence

BACK_VOWELS = "aou"


@dataclass(frozen=True)
class Language:
    """`order` places Subject, Verb, Object, Place and aDverb; affixes beginning with '-' are suffixes, others
    prefixes; an affix 'x/y' is x after a word whose last vowel is a, o or u, and y otherwise (vowel harmony)."""

    name: str
    onsets: str
    vowels: str
    codas: str
    order: str
    adjective_first: bool
    plural: str
    past: str
    future: str
    object_case: str
    place_after_noun: bool
    plural_verb: str = ""
    doubles_for_plural: bool = False

    @cached_property
    def lexicon(self) -> dict[str, str]:
        """English stem -> word of this language; unique, two syllables for common parts of speech."""
        rng = random.Random(f"lexicon/{self.name}")
        taken: set[str] = set()
        small = (*words.DETERMINERS, *words.PREPOSITIONS)
        lexicon = {stem: self._coin(rng, 1, taken) for stem in small}
        stems = (*words.NOUNS, *(f"{verb}!" for verb in PAST), *words.ADJECTIVES, *words.ADVERBS)
        return lexicon | {stem: self._coin(rng, 2, taken) for stem in stems}

    def _coin(self, rng: random.Random, num_syllables: int, taken: set[str]) -> str:
        onsets, codas = self.onsets.split(), self.codas.split()
        while True:
            syllables = [rng.choice(onsets) + rng.choice(self.vowels) for _ in range(num_syllables)]
            word = "".join(syllables) + (rng.choice(codas) if rng.random() < 0.5 else "")
            if word not in taken:
                taken.add(word)
                return word

    def affixed(self, word: str, affix: str) -> str:
        if not affix:
            return word
        if not affix.startswith("-"):
            return affix + word
        back, _, front = affix[1:].partition("/")
        last_vowel = [letter for letter in word if letter in self.vowels][-1]
        return word + (back if last_vowel in BACK_VOWELS or not front else front)

    def noun_phrase(self, phrase: NounPhrase, case: str = "") -> list[str]:
        noun = self.lexicon[phrase.noun]
        if phrase.is_plural:
            noun = noun[:2] + noun if self.doubles_for_plural else self.affixed(noun, self.plural)
        named = [self.affixed(noun, case)]
        if phrase.adjective:
            adjective = self.lexicon[phrase.adjective]
            named = [adjective, *named] if self.adjective_first else [*named, adjective]
        return [self.lexicon[phrase.determiner], *named]

    def place(self, sentence: Sentence) -> list[str]:
        if not sentence.preposition or not sentence.place:
            return []
        preposition, phrase = self.lexicon[sentence.preposition], self.noun_phrase(sentence.place)
        return [*phrase, preposition] if self.place_after_noun else [preposition, *phrase]

    def say(self, sentence: Sentence) -> str:
        verb = self.affixed(self.lexicon[f"{sentence.verb}!"], self.past if sentence.is_past else self.future)
        if sentence.subject.is_plural:
            verb = self.affixed(verb, self.plural_verb)
        parts = {
            "S": self.noun_phrase(sentence.subject),
            "V": [verb],
            "O": self.noun_phrase(sentence.object, self.object_case),
            "P": self.place(sentence),
            "D": [self.lexicon[sentence.adverb]] if sentence.adverb else [],
        }
        return " ".join(word for letter in self.order for word in parts[letter]) + "."


_ALL = (
    Language(
        "velar", "k g h kr gr w", "aeiou", "k g n r", "SOPDV", True, "-ak/ek", "-ta/te", "-mu/mi", "-n", True
    ),
    Language(
        "mirun", "m r l n s y", "aiue", "n m s", "VSDOP", False, "-ru/ri", "e", "o", "-l", False,
        plural_verb="-sa/se",
    ),
    Language(
        "tolvek", "t d v l st tr", "oeiu", "k t l p", "OVSDP", True, "-ov/ev", "za", "po", "-m", False,
        plural_verb="-t",
    ),
    Language(
        "ashani", "sh n h j ch b", "aiou", "n sh", "PSDOV", False, "", "-ga/gi", "-ho/hi", "-wa/we", True,
        doubles_for_plural=True,
    ),
    Language(
        "quorin", "qu r n f th p", "oiae", "n r x", "DVOSP", False, "i", "-du/de", "-lo/le", "-s", False,
        plural_verb="u",
    ),
    Language(
        "zembel", "z b d mb nd l", "eauo", "l b z", "SDVPO", True, "ba", "-zo/ze", "-na/ne", "-ku/ki", True,
        plural_verb="wa",
    ),
)  # fmt: skip
LANGUAGES = MappingProxyType({language.name: language for language in _ALL})
