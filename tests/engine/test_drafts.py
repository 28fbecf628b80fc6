"""Drafts from texts: what is found, whose text it may be from, and how much memory it takes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.config import SpeculationConfig
from inlaid.engine.account import Account
from inlaid.engine.drafts import BYTES_PER_TOKEN, LEAST_MATCH, OwnText, PhraseBook, Phrases, as_text
from inlaid.engine.request import FinishReason, Request, SamplingParams
from inlaid.engine.speculation import PHRASES, Speculation, TextDrafter
from tests.examples import examples

MANY = 1 << 22  # bytes


def request(
    tokens: list[int], outputs: list[int] | None = None, adapter: str | None = "a", tenant: str = "t", **more: Any
) -> Request:
    return Request(
        id="r", prompt=tokens, params=SamplingParams(), adapter=adapter, adapter_name=adapter,
        account=Account(tenant, 0), arrival=0.0, tokens=[*tokens, *(outputs or [])], limit=1000,
        finish_reason=FinishReason.STOP, **more,
    )  # fmt: skip


def tokens(text: str) -> list[int]:
    return list(map(ord, text))


def found(request: Request, most: int) -> tuple[str, int]:
    """Look once in a request's own text."""
    guesses, match = OwnText(request).find(most)
    return as_text(guesses), match


def read(book: PhraseBook, request: Request, most: int) -> tuple[str, int]:
    """Look once in the answers that a request may see."""
    return book.reader(request).find(book, most)


@examples(80)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 60))
def test_own_text_is_copied_from_behind_an_earlier_place_with_the_same_tokens(
    text: list[int], most: int, known: int
) -> None:
    """Look at the text all at once, or token by token from some place on."""
    grown = request(text[:known])
    own = OwnText(grown)
    for token in text[known:]:
        own.find(most)
        grown.tokens.append(token)
    guesses, match = own.find(most)
    tail = text[-LEAST_MATCH:]
    earlier = [at for at in range(len(text) - LEAST_MATCH) if text[at : at + LEAST_MATCH] == tail]
    assert bool(guesses) == bool(earlier)
    if guesses:
        assert match >= LEAST_MATCH
        places = [at for at in range(match, len(text)) if text[at - match : at] == text[-match:]]
        assert any(text[at : at + most] == guesses for at in places)


def test_a_longer_match_further_back_is_better_than_the_latest() -> None:
    assert found(request(tokens("abcdX....cdY....abcd")), 1) == ("X", 4)


def test_own_text_follows_the_request() -> None:
    grown = request(tokens("one two "))
    own = OwnText(grown)
    grown.tokens += tokens("one ")
    assert own.find(3) == (tokens("two"), 4)
    grown.tokens += tokens("t")
    assert own.find(2) == (tokens("wo"), 5), "the match goes on"
    grown.tokens += tokens("one")
    assert own.find(2) == (tokens(" t"), 3), "a match that does not is left"


def test_phrases_are_found_by_their_latest_longest_match_and_end_where_the_answer_ended() -> None:
    book = PhraseBook("tenant", MANY)
    for answer in ("the answer is 42", "the answer is 43"):
        book.learn(request([1]), answer)

    def after(tail: str, most: int) -> tuple[str, int]:
        return read(book, request(tokens(tail)), most)

    assert after("so the answer is ", 4) == ("43", 6)
    assert after("??he", 6) == (" answe", 2)
    assert after("??w", 4) == ("er i", 1)
    assert after("is 42", 4)[0] == "", "the answer ended there"
    assert after("XYZ", 4) == ("", 0)


@examples(60)
@given(st.lists(st.text("ab", min_size=2, max_size=20), min_size=1, max_size=4), st.text("abc", max_size=30))
def test_what_is_read_follows_a_match_of_the_length_that_is_told(answers: list[str], text: str) -> None:
    """A match is followed token by token; what is copied always stood behind the same tokens."""
    book, grown = PhraseBook("tenant", MANY), request([])
    for answer in answers:
        book.learn(request([1]), answer)
    reader = book.reader(grown)
    for known in range(len(text) + 1):
        copied, match = reader.find(book, 5)
        if copied:
            wanted = text[known - match : known] + copied
            assert any(wanted in answer for answer in answers)
        grown.tokens += tokens(text[known : known + 1])


def test_answers_that_were_dropped_are_not_read_on() -> None:
    book = PhraseBook("tenant", 400 * BYTES_PER_TOKEN)
    book.learn(request([1]), SECRET)
    grown = request(tokens("the password"))
    reader = book.reader(grown)
    assert reader.find(book, 3)[0] == " is"
    for _ in range(40):
        book.learn(request([1]), "0123456789")
    grown.tokens += tokens(" is")
    assert reader.find(book, 3) == ("", 0)


@examples(25)
@given(st.lists(st.text(alphabet="abc", max_size=90), max_size=30), st.integers(8, 60))
def test_phrases_stay_within_their_room_and_the_oldest_go_first(answers: list[str], room: int) -> None:
    phrases = Phrases()
    for answer in answers:
        phrases.add(answer, room)
        assert phrases.num_tokens <= room
        if 4 <= len(answer) <= room // 2 - 1:
            assert phrases.search(answer[:2]) is not None, "the newest answer is found"


@examples(25)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.text("pq", max_size=300)), max_size=40))
def test_the_book_stays_within_its_memory(learned: list[tuple[str, str, str]]) -> None:
    most = 400 * BYTES_PER_TOKEN
    book = PhraseBook("tenant", most)
    for adapter, tenant, answer in learned:
        book.learn(request([1], adapter=adapter, tenant=tenant), answer)
        assert book.num_bytes <= most


SECRET = "the password is swordfish"
WHO = {"tenant": "other"}, {"adapter": "b"}, {"cache_salt": "s"}


@pytest.mark.parametrize(
    ("scope", "differs", "seen"),
    [
        *((scope, {}, scope != "request") for scope in ("request", "tenant", "adapter")),
        *((scope, who, False) for scope in ("request", "tenant") for who in WHO),
        ("adapter", {"tenant": "other"}, True),
        ("adapter", {"adapter": "b"}, False),
        ("adapter", {"cache_salt": "s"}, False),
    ],
)
def test_whose_answers_may_draft_for_whom(scope: str, differs: dict[str, Any], seen: bool) -> None:
    drafter = TextDrafter(PhraseBook(scope, MANY))
    drafter.end(request([1], tokens(SECRET)))
    asks = request(tokens("what is the password"), tokens("the password is "), **differs)
    draft = drafter.draft(asks, 9)
    spelled = "" if draft is None else as_text(draft.tokens)
    assert ("swordfish" in spelled) == seen
    if seen:
        assert draft is not None
        assert draft.source == PHRASES


def test_by_default_no_text_of_one_tenant_drafts_for_another() -> None:
    """The same two requests, of which `adapter` lets the text through, show that the default keeps it."""
    shown = {}
    for given_scope in ({}, {"speculation_scope": "adapter"}):
        drafter = Speculation(SpeculationConfig(speculation="suffix", **given_scope)).drafter
        drafter.end(request([1], tokens(SECRET), tenant="owner"))
        draft = drafter.draft(request([2], tokens("the password is "), tenant="thief"), 9)
        shown[bool(given_scope)] = "" if draft is None else as_text(draft.tokens)
    assert shown == {False: "", True: "swordfish"}


def test_a_swapped_adapter_starts_anew() -> None:
    book = PhraseBook("tenant", MANY)
    book.learn(request([1], adapter="identity-1"), SECRET)
    assert read(book, request(tokens("the password is "), adapter="identity-2"), 4) == ("", 0)


def test_answers_that_were_broken_off_teach_nothing() -> None:
    drafter = TextDrafter(PhraseBook("tenant", MANY))
    broken = request([1], tokens(SECRET))
    broken.finish_reason = FinishReason.ABORT
    drafter.end(broken)
    assert drafter.book.num_bytes == 0
