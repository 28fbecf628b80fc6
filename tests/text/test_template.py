"""Chat templates: what they are given and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlaid.engine.refusal import Refused
from inlaid.text.template import plain_message
from inlaid.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "models" / "demo" / "base"


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    with pytest.raises(Refused, match="unknown role: pirate"):
        Tokenizer(DEMO).template.render([{"role": "pirate", "content": "arr"}])


def test_an_option_that_is_no_option_is_refused() -> None:
    with pytest.raises(Refused, match="self"):
        Tokenizer(DEMO).template.render([{"role": "user", "content": "a"}], None, {"self": 1})


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'a:' + m['content'] }}", "a:"),  # cannot take null
        ("{{ 'a:' }}{{ m['content'] }}", "a:"),  # would write None
        ("{{ 'calls' if m['content'] is none else m['content'] }}", "calls"),  # tells calls by it
        ("{{ 'None' if m['content'] is none else 'no' }}", "None"),
        ("{{ m['content'] or 'nothing' }}", "nothing"),
        ("{{ 'key' if 'content' in m else 'no key' }}", "key"),
    ],
)
def test_an_answer_of_calls_alone_reaches_the_template(template: str, text: str) -> None:
    whole = "{% for m in messages %}" + template + "{% endfor %}"
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        plain = plain_message({**message, "tool_calls": [CALL]})
        assert Tokenizer(DEMO, whole).template.render([plain]) == text


def test_a_message_becomes_what_templates_expect() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    message = plain_message({"role": "developer", "content": parts, "tool_calls": [call]})
    assert (message["role"], message["content"]) == ("system", "one\ntwo")
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": [1]}
    broken = {"id": "1", "function": {"name": "f", "arguments": "{not json"}}
    assert (
        plain_message({"role": "assistant", "tool_calls": [broken]})["tool_calls"][0]["function"] == broken["function"]
    )
    with pytest.raises(Refused, match="'image_url'"):
        plain_message({"role": "user", "content": [{"type": "image_url", "image_url": {}}]})
