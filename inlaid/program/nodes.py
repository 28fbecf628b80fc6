"""The nodes of a program. They are its JSON form too: the library builds them, and the server decodes them.

A node has a name, by which other nodes refer to its value. Nodes of a map's body see their own body and all around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inlaid.engine.request import SamplingParams

TEMPLATE = "text with holes: {name}, {name.field}; {{ and }} are braces"

Test = Literal["equals", "contains", "starts_with", "ends_with", "less", "greater", "empty", "failed"]


class Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="kind"):
    """The part that all nodes have."""

    name: str


class Turn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Meta(description=TEMPLATE)]


class Generate(Node, frozen=True, kw_only=True, tag="generate"):
    """One call of the model, by a prompt as it is or by messages in the model's chat template. Its value is the
    answer's text.

    With `continues` the prompt is the tokens of another call's prompt and answer, and this text or these messages
    behind them.
    """

    prompt: Annotated[str, Meta(description=TEMPLATE)] | None = None
    messages: tuple[Turn, ...] | None = None
    adapter: Annotated[str, Meta(description="none: the base")] | None = None
    params: SamplingParams = SamplingParams()
    continues: Annotated[str, Meta(description="the name of a call with the same adapter")] | None = None
    deadline: Annotated[float, Meta(description="seconds from its start to have the answer in")] | None = None


class Text(Node, frozen=True, kw_only=True, tag="text"):
    """A text made of others."""

    template: Annotated[str, Meta(description=TEMPLATE)]


class Join(Node, frozen=True, kw_only=True, tag="join"):
    """The elements of a list as one text."""

    of: str
    separator: str = "\n"


class Split(Node, frozen=True, kw_only=True, tag="split"):
    """The parts of a text between separators, without spaces around them and without empty ones."""

    of: str
    separator: str = "\n"


class Best(Node, frozen=True, kw_only=True, tag="best"):
    """The element of one list whose element of another is the largest number. Of a text, its first number counts. The
    first of equals is taken. An element that failed, or whose text has no number, is left out."""

    of: str
    by: str


class Condition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A comparison of a value. `less` and `greater` compare numbers; of a text, its first number counts. `empty` and
    `failed` take no `against`."""

    value: str
    test: Test
    against: str | float | bool | None = None
    negated: bool = False


class Branch(Node, frozen=True, kw_only=True, tag="branch"):
    """The value of one of two nodes, by a condition. Without `otherwise` and if the condition is false: null."""

    when: Condition
    then: str
    otherwise: str | None = None


class Map(Node, frozen=True, kw_only=True, tag="map"):
    """A body for each element of a list, or for each number below a count; the value is the list of its results."""

    over: Annotated[str | int, Meta(description="a list by its name, or a count")]
    item: Annotated[str, Meta(description="the name of the element in the body")] = "item"
    nodes: tuple[AnyNode, ...]
    result: Annotated[str, Meta(description="the node of the body whose value counts")]


AnyNode = Generate | Text | Join | Split | Best | Branch | Map


@dataclass(frozen=True)
class Function:
    """A Python function of other values. It has no JSON form."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[str, ...]


Element = AnyNode | Function
