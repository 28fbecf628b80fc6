"""The constructed languages: unique words, the order and affixes their descriptions promise."""

from __future__ import annotations

import random

import pytest

from data.languages import BACK_VOWELS, LANGUAGES
from data.sentences import NounPhrase, Sentence, Speaker

PLAIN = Sentence(
    NounPhrase("the", None, "fox", False), "see", True, NounPhrase("a", None, "hen", False),
    "often", "near", NounPhrase("my", None, "road", False),
)  # fmt: skip


def test_english() -> None:
    assert PLAIN.english() == "the fox often saw a hen near my road."
    assert NounPhrase("a", "old", "story", True).english() == "some old stories"
    assert NounPhrase("a", "old", "story", False).english() == "an old story"


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_word_has_its_own_translation(name: str) -> None:
    lexicon = LANGUAGES[name].lexicon
    assert len(set(lexicon.values())) == len(lexicon) > 300


@pytest.mark.parametrize("name", LANGUAGES)
def test_word_order(name: str) -> None:
    language = LANGUAGES[name]
    said = language.say(PLAIN).rstrip(".").split()
    stems = {"S": "fox", "V": "see!", "O": "hen", "D": "often", "P": "road"}
    places = {letter: _index(said, language.lexicon[stem]) for letter, stem in stems.items()}
    assert "".join(sorted(places, key=places.__getitem__)) == language.order


def _index(said: list[str], stem: str) -> int:
    return next(index for index, word in enumerate(said) if stem in word)


def test_vowel_harmony_follows_the_last_vowel() -> None:
    velar = LANGUAGES["velar"]
    for stem in velar.lexicon.values():
        last = [letter for letter in stem if letter in velar.vowels][-1]
        assert velar.affixed(stem, "-ak/ek") == stem + ("ak" if last in BACK_VOWELS else "ek")
    assert velar.affixed("kor", "za") == "zakor"


def test_plural_past_and_case_all_show() -> None:
    one, many = (
        Sentence(PLAIN.subject, "see", True, NounPhrase("a", None, "hen", plural), None, None, None)
        for plural in (False, True)
    )
    future = Sentence(PLAIN.subject, "see", False, PLAIN.object, None, None, None)
    for language in LANGUAGES.values():
        assert len({language.say(one), language.say(many), language.say(future)}) == 3


def test_a_meaning_is_said_differently_everywhere() -> None:
    sentence = Speaker("anyone", 0.5).sentence(random.Random(1))
    assert len({language.say(sentence) for language in LANGUAGES.values()}) == len(LANGUAGES)
