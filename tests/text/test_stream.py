"""Text as tokens come: whole characters only, and stop strings found wherever tokens
end. The same text however it is cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from inlaid.engine.request import FinishReason, Output, SamplingParams, TokenLogprobs
from inlaid.text.stream import Piece, TextStream
from inlaid.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "models" / "demo" / "base"
TOKENIZER = Tokenizer(DEMO)
TEXTS = st.text(alphabet="ab éß語🙂\n,\u200d", max_size=30)
TOKENS = st.integers(0, TOKENIZER.vocab_size - 1)


def outputs(tokens: list[int], cuts: list[int]) -> list[Output]:
    """Return the tokens as an engine might hand them out."""
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    parts = [tokens[a:b] for a, b in pairwise(edges)]
    last = len(parts) - 1
    return [
        Output(id="r", tokens=part, finish_reason=FinishReason.LENGTH if n == last else None)
        for n, part in enumerate(parts)
    ]


def read(tokens: list[int], cuts: list[int], params: SamplingParams, prompt: list[int]) -> list[Piece]:
    stream = TextStream(TOKENIZER, prompt, params)
    made = []
    for output in outputs(tokens, cuts):
        made.append(stream.take(output))
        if made[-1].finish_reason is not None:
            break
    return made


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@given(st.lists(TOKENS, max_size=25), st.lists(st.integers(0, 25), max_size=25))
def test_any_tokens_in_any_pieces_give_the_text_of_all(tokens: list[int], cuts: list[int]) -> None:
    prompt = TOKENIZER.encode("ab")
    whole = TOKENIZER.decode(prompt + tokens)[len("ab") :]
    assert joined(read(tokens, cuts, SamplingParams(), prompt)) == whole


@given(TEXTS, TEXTS)
def test_no_piece_ends_within_a_character(prompt: str, text: str) -> None:
    tokens = TOKENIZER.encode(text, False)
    stream = TextStream(TOKENIZER, TOKENIZER.encode(prompt), SamplingParams())
    shown = ""
    for token in tokens:
        shown += stream.take(Output(id="r", tokens=[token])).text
        assert text.startswith(shown)
    assert shown == text


def cut_at_first_stop(text: str, stops: list[str], keep: bool) -> tuple[str, str | None]:
    """Cut at the stop that ends first, and of those the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if keep else text[: end - len(stop)]), stop
    return text, None


@given(
    st.text(alphabet="abé🙂", max_size=20),
    st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 40), max_size=20),
    st.booleans(),
)
def test_stop_strings_cut_at_the_same_place(text: str, stops: list[str], cuts: list[int], keep: bool) -> None:
    tokens = TOKENIZER.encode(text, False)
    params = SamplingParams(stop=tuple(stops), include_stop_str_in_output=keep)
    pieces = read(tokens, cuts, params, [])
    wanted, stop = cut_at_first_stop(text, stops, keep)
    one_by_one = read(tokens, list(range(len(tokens))), params, [])
    assert [token for piece in pieces for token in piece.tokens] == [t for piece in one_by_one for t in piece.tokens]
    assert joined(pieces) == wanted
    assert pieces[-1].stop_reason == stop
    assert pieces[-1].finish_reason is (FinishReason.LENGTH if stop is None else FinishReason.STOP)


def test_an_answer_ends_with_the_token_that_completes_a_stop_string() -> None:
    """Its tokens and log probabilities too, though the engine has made more by then."""
    tokens = TOKENIZER.encode("a b c d", False)
    stop = TOKENIZER.token_text(tokens[1])
    logprobs = [TokenLogprobs(token, -1.0, 1, []) for token in tokens]
    output = Output(id="r", tokens=tokens, logprobs=logprobs, finish_reason=FinishReason.LENGTH)
    piece = TextStream(TOKENIZER, [], SamplingParams(stop=(stop,))).take(output)
    assert (piece.text, piece.tokens, piece.logprobs) == (TOKENIZER.token_text(tokens[0]), tokens[:2], logprobs[:2])
    assert (piece.finish_reason, piece.stop_reason) == (FinishReason.STOP, stop)


def test_stop_strings_wait_for_min_tokens() -> None:
    tokens = TOKENIZER.encode("a b a b a b", False)
    one_by_one = list(range(len(tokens)))
    pieces = read(tokens, one_by_one, SamplingParams(stop=("b",), min_tokens=3), [])
    assert sum(len(piece.tokens) for piece in pieces) > 3
    assert joined(pieces).count("b") >= 1


def test_a_stop_token_is_not_shown_unless_asked_for() -> None:
    a, b = TOKENIZER.encode("a", False)[0], TOKENIZER.encode("b", False)[0]
    end = Output(id="r", tokens=[a, b], finish_reason=FinishReason.STOP, stop_token=b)
    params = SamplingParams(stop_token_ids=(b,))
    piece = TextStream(TOKENIZER, [], params).take(end)
    assert (piece.text, piece.stop_reason) == ("a", b)
    shown = SamplingParams(stop_token_ids=(b,), include_stop_str_in_output=True)
    assert TextStream(TOKENIZER, [], shown).take(end).text == "ab"


def test_endless_half_characters_are_let_go_in_the_end() -> None:
    half = next(t for t in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(t) == "語".encode()[:1])
    stream = TextStream(TOKENIZER, [], SamplingParams())
    shown = "".join(stream.take(Output(id="r", tokens=[half])).text for _ in range(200))
    assert 150 <= len(shown) <= 200
