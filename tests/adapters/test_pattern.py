"""Patterns mean what Python's `re` means by them, whatever is in them takes bounded time, and the rest is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.adapters.pattern import Effort, Pattern, PatternError
from tests.examples import examples

PATH = "model.layers.11.self_attn.q_proj"
ATOMS = (
    "a",
    "b",
    ".",
    "1",
    r"\d",
    r"\w",
    r"\.",
    "[ab]",
    "[^a]",
    "[a-c1]",
    r"\b",
    "^",
    "$",
    "_",
    r"\W",
    "[]a]",
    "",
    "{",
)
REPEATS = ("", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{,1}", "{1,}")
OPENINGS = ("", "?:", "?P<x>", "?=", "?!")


@st.composite
def patterns(draw: st.DrawFn) -> str:
    """Draw a pattern of up to eight pieces; some are none that `re` takes."""
    parts = [draw(st.sampled_from(ATOMS)) + draw(st.sampled_from(REPEATS)) for _ in range(draw(st.integers(1, 8)))]
    while len(parts) > 1:
        first, second = parts.pop(), parts.pop()
        joined = draw(st.sampled_from((first + second, f"{first}|{second}")))
        group = f"({draw(st.sampled_from(OPENINGS))}{joined}){draw(st.sampled_from(REPEATS))}"
        parts.insert(draw(st.integers(0, len(parts))), draw(st.sampled_from((joined, group))))
    return parts[0]


@given(patterns(), st.text("ab1._\n", max_size=8))
@examples(600)
def test_matches_as_re_does(pattern: str, text: str) -> None:
    """Also the ending of a path, in the form in which PEFT writes it."""
    try:
        whole, ending = re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return
    if re.search(r"[*+?}]\+", pattern):  # possessive, which ours is not
        return
    ours = Pattern(pattern)
    assert ours.full_match(text) == (whole.fullmatch(text) is not None)
    if "\n" not in text and "^" not in pattern:
        assert ours.match_ending(text) == (ending.match(text) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*layers\.[01]+\.(self_attn\.q_proj|mlp\.gate_proj)",
        r"^(?!.*(lm_head|visual)).*_proj$",
        r"(?:.*?(?:language|text).*?(?:k_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj)))",
        r"model\.layers\.(?P<number>[0-9]|1[0-9])\.self_attn\.[qkv]_proj",
    ],
)
def test_patterns_as_people_write_them(pattern: str) -> None:
    assert Pattern(pattern).full_match(PATH)
    assert re.fullmatch(pattern, PATH)


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(a|a)*b", r"(.*)*(.*)*(.*)*b", r"(?:a?){30}a{30}b", r"(\w+\s?)*!"])
def test_hostile_patterns_take_no_time(pattern: str) -> None:
    """Backtracking would try 2 ** 200 ways through each of these."""
    effort = Effort(200_000)
    assert not Pattern(pattern, effort).full_match("a" * 200)
    assert effort.left > 0


def test_work_is_bounded() -> None:
    pattern = Pattern("(?=(?=(?=.*a).*a).*a)(.*)*b", Effort(10_000))
    with pytest.raises(PatternError, match="take too long"):
        pattern.full_match("a" * 1000)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "missing"),
        (")", "unbalanced"),
        ("[a", "unterminated"),
        ("*a", "nothing to repeat"),
        ("a**", "multiple repeat"),
        ("a*+", "possessive"),
        ("a{3,2}", "min repeat"),
        ("[b-a]", "character range"),
        (r"(a)\1", "back-references"),
        (r"\q", r"escape \\q"),
        ("\\", "bad escape"),
        ("(?i)a", "only"),
        ("(?<!b)a", "only"),
        ("(?>a)", "only"),
        ("(" * 60 + ")" * 60, "50 deep"),
        ("a" * 70_000 + "*", "70001 characters"),
        ("(((a{99}){99}){99}){99}", "written out"),
        ("a{9999999}", "written out"),
    ],
)
def test_refused(pattern: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        Pattern(pattern)
