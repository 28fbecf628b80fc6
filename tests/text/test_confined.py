"""Chat templates that take too much: each is refused for its own conversation, and the next one is written out."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from inlaid.server.errors import reported
from inlaid.text.confined import Confined, TemplateError, TemplateStuck
from inlaid.text.tokenizer import Tokenizer
from tests.text.test_template import DEMO

CHAT = [{"role": "user", "content": "hello"}]
HOSTILE = {  # nothing constant: that would be computed, and refused, as the template is compiled
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one long operation": "{% set n = kind | length * 10 ** 5 %}{{ [0] * n + [1] in [[0] * n + [2]] * 1000 }}",
    "doubling": "{% set n = namespace(x=bos_token) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a product": "{{ bos_token * 10 ** 10 }}",
    "a wide number": "{{ '%1000000000d' | format(kind | length) }}",
    "a long text": "{{ bos_token * 10 ** 6 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "half a character": "{{ raise_exception('\\ud800') }}",
}
REASONS = {
    "nested loops": "it takes more than 0.3 s of CPU time",
    "one long operation": "it takes more than 0.3 s of CPU time, or fails in another way that ends its process",
    "doubling": "it takes more than 512 MiB of memory",
    "a product": "it takes more than 512 MiB of memory",
    "a wide number": "it takes more than 512 MiB of memory",
    "a long text": "it writes 3000006 characters, more than the context can hold",
    "recursion": "maximum recursion depth exceeded",
    "half a character": "\\ud800",
}


@pytest.fixture(scope="module")
def confined() -> Iterator[Confined]:
    cases = "".join(f"{{% if kind == {kind!r} %}}{text}{{% endif %}}" for kind, text in HOSTILE.items())
    made = Confined(cases + "{{ messages[0].content }}!", {"bos_token": "<s>"}, max_chars=100_000, max_seconds=0.3)
    yield made
    made.close()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_that_takes_too_much_is_refused(confined: Confined, kind: str) -> None:
    with pytest.raises(TemplateError) as refused:
        confined.render(CHAT, None, {"kind": kind})
    assert str(refused.value).startswith(REASONS[kind])
    assert confined.render(CHAT, None, {}) == "hello!"


def test_a_process_without_time_is_no_fault_of_the_conversation(
    confined: Confined, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert confined.render(CHAT, None, {}) == "hello!"
    [process] = confined._idle.queue
    monkeypatch.setattr("inlaid.text.confined._PATIENCE", 0.1)
    os.kill(process._process.pid, signal.SIGSTOP)
    with pytest.raises(TemplateStuck, match=r"has not answered within 0\.1 s; try again") as stuck:
        confined.render(CHAT, None, {})
    assert reported(stuck.value, "").status == 503
    monkeypatch.undo()
    assert confined.render(CHAT, None, {}) == "hello!"


def test_the_demos_conversations_are_written_as_in_process() -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    conversations: list[Any] = [CHAT, [*CHAT, {"role": "assistant", "content": "é"}, {"role": "user", "content": "\n"}]]
    open_, closed = Tokenizer(DEMO).template, Tokenizer(DEMO).template
    closed.confine(10_000)
    for messages in conversations:
        for options in ({}, {"add_generation_prompt": False}, {"enable_thinking": False}):
            assert closed.render(messages, tools, options) == open_.render(messages, tools, options)
    with pytest.raises(ValueError, match="the chat template refuses these messages"):
        closed.render([{"role": "pirate", "content": "arr"}])
    closed.close()
