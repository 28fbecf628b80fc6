"""Compiling: programs refused by the node at fault, plans shown and drawn, and the JSON form."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from inlaid.program import Condition, Program, ProgramError, compile_program
from inlaid.program.nodes import AnyNode, Map, Text
from inlaid.program.options import Options
from inlaid.program.target import Target
from inlaid.program.template import parse_template
from tests.program.fake_host import BLOCK, FakeHost

Build = Callable[[Program], object]

WRONG: list[tuple[str, str, Build]] = [
    ("adapter 'z', which is not served; known: a, b, c", "x", lambda p: p.generate("x", "hi", "z")),
    ("round in a circle: a -> b -> a", "a", lambda p: (p.text("a", "{b}"), p.text("b", "{a}"))),
    ("refers to 'nobody', which is no input", "x", lambda p: p.text("x", "{nobody}")),
    ("the name 'x' is given twice", "x", lambda p: (p.text("x", "1"), p.text("x", "2"))),
    ("prompt has 700 characters, more than 600 tokens", "x", lambda p: p.generate("x", "a" * 700, "a")),
    ("cannot fit: its fixed text has 2 tokens and its answer up to 600", "x",
     lambda p: p.generate("x", "hi", "a", max_tokens=600)),
    ("continues 'x' with another adapter", "y",
     lambda p: (p.generate("x", "hi", "a"), p.generate("y", "on", "b", continues="x"))),
    ("continues 't', which is no call", "y", lambda p: (p.text("t", "1"), p.generate("y", "on", "b", continues="t"))),
    ("has messages, but continues 'x', which has a prompt", "y",
     lambda p: (p.generate("x", "hi"), p.chat("y", "on", continues="x"))),
    ("top_p is 2", "x", lambda p: p.generate("x", "hi", top_p=2.0)),
    ("asks for log probabilities", "x", lambda p: p.generate("x", "hi", logprobs=1)),
    ("deadline of 'x' is -1", "x", lambda p: p.generate("x", "hi", deadline=-1)),
    ("a single '{'", "x", lambda p: p.text("x", "{")),
    ("'0' is not a reference", "x", lambda p: p.text("x", "{0}")),
    ("'a b' is not a reference", "a b", lambda p: p.text("a b", "1")),
    ("needs a number in 'against'", "x",
     lambda p: (p.text("a", "1"), p.branch("x", Condition(value="a", test="less", against="1"), "a"))),
    ("takes no 'against'", "x",
     lambda p: (p.text("a", "1"), p.branch("x", Condition(value="a", test="empty", against="1"), "a"))),
    ("must have 1 to 1024 characters", "x", lambda p: (p.text("a", "1"), p.split("x", "a", ""))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "node", "build"), WRONG)
def test_what_cannot_run_is_refused_by_its_node(message: str, node: str, build: Build) -> None:
    program = Program()
    build(program)
    with pytest.raises(ProgramError, match=re.escape(message)) as caught:
        program.compile(FakeHost())
    assert caught.value.refusal.param == node


def test_bodies_of_maps_are_checked_too() -> None:
    host = FakeHost()
    program = Program()
    with program.map("m", 2) as each:
        each.generate("x", "{item}", "z")
    with pytest.raises(ProgramError, match="adapter 'z'"):
        program.compile(host)
    shadow = Program()
    shadow.input("item")
    with shadow.map("m", 2) as each:
        each.text("x", "{item}")
    with pytest.raises(ProgramError, match="one of the body around it too"):
        shadow.compile(host)
    around = Program()
    with around.map("m", 2) as each:
        each.text("x", "{after}")
    around.text("after", "{m}")
    with pytest.raises(ProgramError, match="circle"):
        around.compile(host)
    deep: AnyNode = Text(name="t", template="1")
    for number in range(10):
        deep = Map(name=f"m{number}", over=1, item=f"i{number}", nodes=(deep,), result=deep.name)
    with pytest.raises(ProgramError, match="nested more than 8 deep"):
        compile_program([deep], [], None, Target(host.encoder, BLOCK, {}))


def example() -> Program:
    program = Program(["verdict", "all"])
    program.input("text")
    program.generate("draft", "translate {text}", "a", temperature=0, max_tokens=8)
    program.generate("again", "translate {text}", "a", temperature=0, max_tokens=8)
    program.generate("unused", "unused {text}", "c", temperature=0)
    program.generate("judged", "judge {again}", "b", temperature=0, max_tokens=4)
    program.generate("more", " and", "a", continues="draft", temperature=0, max_tokens=4)
    program.branch("verdict", Condition(value="judged", test="contains", against="bad"), "more", "draft")
    with program.map("all", 2) as each:
        each.chat("said", "say {item} of {draft}", "b", temperature=0)
    return program


def test_a_plan_shows_the_graph_before_and_after_fusion() -> None:
    shown = example().compile(FakeHost()).show()
    for line in (
        "program: 6 calls; inputs: text; outputs: verdict, all",
        "draft = generate(a, up to 8 tokens), needs text",
        "wave 1, at once: draft [a]",
        "wave 2, at once: more [a], all[].said [b], judged [b]",
        "merged: again is draft",
        "dropped: unused, which no output needs",
        "kept: more starts from the KV of draft",
        "taken when known: verdict computes one of more, draft",
    ):
        assert line in shown
    apart = example().compile(FakeHost(), merge_equal=False, drop_dead=False, keep_kv=False).show()
    assert not any(word in apart for word in ("merged:", "dropped:", "kept:"))


def test_a_plan_is_drawn(tmp_path: Path) -> None:
    plan = example().compile(FakeHost())
    plan.draw(str(tmp_path / "plan.svg"))
    drawing = ElementTree.parse(tmp_path / "plan.svg").getroot()
    texts = [each.text for each in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"text", "draft", "all[].said", "verdict"} <= set(texts)
    plan.draw(str(tmp_path / "plan.dot"))
    dot = (tmp_path / "plan.dot").read_text()
    assert '"draft" -> "more";' in dot
    assert re.search(r'"unused" \[.*style=dashed\]', dot)
    with pytest.raises(ValueError, match=r"\.svg or \.dot"):
        plan.draw("plan.png")


def test_the_json_form_is_the_program() -> None:
    program = example()
    body = msgspec.json.decode(program.to_json())
    nodes = msgspec.convert(body["nodes"], list[AnyNode])
    assert nodes == program.nodes
    assert body["outputs"] == ["verdict", "all"]
    program.function("f", len, "text")
    with pytest.raises(ProgramError, match="no JSON form"):
        program.to_json()


def test_fewer_calls_at_a_time_than_none_are_refused() -> None:
    """A program of -1 calls at a time made none, and never ended."""
    with pytest.raises(msgspec.ValidationError, match=r">= 0 - at `\$.max_in_flight`"):
        msgspec.json.decode(b'{"max_in_flight": -1}', type=Options)


def test_templates_have_holes_and_braces() -> None:
    template = parse_template("a {{b}} {c.d} {e}")
    assert [str(hole) for hole in template.holes] == ["c.d", "e"]
    assert template.literals == ("a {b} ", " ")
