"""Single tokens of the demo's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.text.tokenizer import Tokenizer, TooManyTokens

DEMO = Path(__file__).parents[2] / "models" / "demo" / "base"
TOKENIZER = Tokenizer(DEMO)


@given(st.text(max_size=200), st.booleans())
def test_encoding_without_offsets_gives_the_same_tokens(text: str, special: bool) -> None:
    assert TOKENIZER.encode(text, special) == TOKENIZER._fast.encode(text, add_special_tokens=special).ids


def test_token_bytes_make_up_the_text() -> None:
    text = "a b é語🙂 end"
    assert b"".join(TOKENIZER.token_bytes(token) for token in TOKENIZER.encode(text, False)) == text.encode()


def test_the_tokens_of_a_text_that_has_too_many_are_not_kept() -> None:
    with pytest.raises(TooManyTokens, match=r"^13$") as refused:
        TOKENIZER.encode("the cat " * 4, False, most=3)
    frame = refused.value.__traceback__
    while frame is not None:
        assert "encoding" not in frame.tb_frame.f_locals
        frame = frame.tb_next
