"""Single tokens of the demo's tokenizer."""

from __future__ import annotations

from pathlib import Path

from inlaid.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "models" / "demo" / "base"
TOKENIZER = Tokenizer(DEMO)


def test_token_bytes_make_up_the_text() -> None:
    text = "a b é語🙂 end"
    assert b"".join(TOKENIZER.token_bytes(token) for token in TOKENIZER.encode(text, False)) == text.encode()
