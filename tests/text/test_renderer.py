"""Chat templates as text: what transformers writes, and what a template may not do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from inlaid.text.renderer import Renderer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "é": ["<", "&"]}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "é", "n": [1, None, 2.5]}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " what? \n", "name": None},
    {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": "<b>", "tool_call_id": "1"},
    {"role": "assistant", "content": "It is so. "},
]
TEMPLATES = {
    "a loop": "{{ bos_token }}{% for m in messages %}\n  {{ m.role }}:{{ m['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    "tools": "{% if tools %}{{ tools | tojson }}{{ tools | tojson(indent=2) }}{% endif %}{{ documents }}",
    "no tools": "{{ tools is none }} {{ documents is none }} {{ nothing is defined }}",
    "calls": "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function | tojson(sort_keys=true) }}"
    "{% endfor %}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }};{% endfor %}",
    "keys": "{% for m in messages %}{{ m.keys() | list }}{% endfor %}",
    "a namespace": "{% set n = namespace(last='', self=1) %}{% for m in messages %}{% set n.last = m.role %}"
    "{% endfor %}{{ n.last }}{{ n.self }}{{ dict(a=1) | tojson }}{{ dict.fromkeys('ab', 0) }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ loop.index }}{{ m.content }}"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "options": "{{ enable_thinking }}{{ bos_token }}{{ kind }}",
    "a date": "{{ strftime_now('%Y') | length }}",
    "a macro": "{%- macro say(m) -%}\n[{{ m.content | tojson }}]\n{%- endmacro %}{{ say(messages[0]) }}",
}
REFUSED = {
    "raised": ("{{ raise_exception('no ' + messages[0].role) }}", "no system"),
    "no template": ("{% if %}", "Expected an expression"),
    "the interpreter": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "by way of a function": ("{{ raise_exception.__globals__.x }}", "unsafe"),
    "by way of dict": ("{{ dict.__class__.x }}", "unsafe"),
    "by way of a namespace": ("{% set n = namespace(__class__=1) %}", "underscore"),
    "a name set later": ("{% set n = namespace() %}{% set n._x = 1 %}", "underscore"),
    "changing a message": ("{{ messages.append(1) }}", "is unsafe"),
    "changing a call": ("{{ messages[2].tool_calls[0].update(a=1) }}", "is unsafe"),
}


def oracle(template: Any, messages: Any, tools: Any = None, **options: Any) -> str:
    """Write a conversation out as transformers does."""
    model: Any = SimpleNamespace(chat_template=template, special_tokens_map=SPECIAL)
    model.get_chat_template = PreTrainedTokenizerBase.get_chat_template.__get__(model)
    return str(PreTrainedTokenizerBase.apply_chat_template(model, messages, tools=tools, tokenize=False, **options))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_written_as_transformers_writes_it(name: str) -> None:
    template = TEMPLATES[name]
    for tools in (None, TOOLS):
        for options in ({}, {"add_generation_prompt": True, "enable_thinking": False, "bos_token": "<x>", "kind": [1]}):
            made = Renderer(template, SPECIAL).render(CHAT, tools, options)
            assert made == oracle(template, CHAT, tools, **options)


@pytest.mark.parametrize("template", ["a loop", "generation"])
@pytest.mark.parametrize("end", ["", " ", "\n\n", "x"])
def test_a_final_message_is_continued_as_transformers_does(template: str, end: str) -> None:
    chat = [*CHAT[:-1], {"role": "assistant", "content": "It is" + end}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    made = Renderer(TEMPLATES[template], SPECIAL).render(chat, None, options)
    assert made == oracle(TEMPLATES[template], chat, **options)
    assert chat[-1]["content"] == "It is" + end


def test_one_of_several_templates_is_chosen_as_transformers_does() -> None:
    several = {"default": "d{{ tools is none }}", "tool_use": "t", "rag": "r"}
    for tools in (None, TOOLS):
        assert Renderer(several, SPECIAL).render(CHAT, tools, {}) == oracle(several, CHAT, tools)
    with pytest.raises(ValueError, match=r"none of the model's chat templates is the default: rag, tool_use"):
        Renderer({"tool_use": "t", "rag": "r"}, {}).render(CHAT, None, {})


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_template_may_not_do_is_refused(kind: str) -> None:
    template, why = REFUSED[kind]
    with pytest.raises(ValueError, match=why):
        Renderer(template, SPECIAL).render(CHAT, None, {})


def test_conversations_that_cannot_be_written_out_are_refused() -> None:
    renderer = Renderer("{{ messages | length }}", {})
    with pytest.raises(ValueError, match="no messages"):
        renderer.render([], None, {})
    with pytest.raises(TypeError, match="a tool must be an object"):
        renderer.render(CHAT, ["look"], {})
    with pytest.raises(ValueError, match="does not write the final message out"):
        renderer.render(CHAT, None, {"continue_final_message": True})
    with pytest.raises(ValueError, match="whose content is a text"):
        renderer.render([{"role": "assistant", "content": None}], None, {"continue_final_message": True})


def test_null_content_reaches_the_template() -> None:
    chat = [{"role": "assistant", "content": None, "name": None}]
    assert Renderer("{{ messages[0] }}", {}).render(chat, None, {}) == "{'role': 'assistant', 'content': None}"
