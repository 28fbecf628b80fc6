"""Conversations in which functions are called: what the demo's adapter `tools` learns and is judged by.

A menu is what one conversation offers: a few tools, and perhaps a system message. Under a menu come requests; each is
answered by a call, by words where no tool fits, or, after a call, from what the tool returned. Where the client demands
a call, a grammar writes its first word and the model the rest: a call of a tool, or of a form to fill in.
`models/train_tools.py` trains on the split `train` and judges on `eval`: no request's text is in both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

from data import words
from data.tasks import split_of

CALL, RESULT, WORDS, DEMANDED = "call", "result", "words", "demanded"
KINDS = (CALL, RESULT, WORDS, DEMANDED)
NO_TOOL = "I have no tool for that."

Message = dict[str, Any]
_TEXT: Mapping[str, str] = MappingProxyType({"type": "string"})
_NUMBER: Mapping[str, str] = MappingProxyType({"type": "integer"})


@dataclass(frozen=True)
class DemoTool:
    """A function: the requests that ask for it, and the answer that its result is put into."""

    description: str
    parameters: Mapping[str, Mapping[str, str]]
    requests: tuple[str, ...]
    answer: str
    arguments: Callable[[random.Random], dict[str, Any]]
    result: Callable[[random.Random], str]

    def definition(self, name: str) -> dict[str, Any]:
        """Return the tool as a request brings it."""
        properties = {key: dict(value) for key, value in self.parameters.items()}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": name, "description": self.description, "parameters": schema}}


def _things(rng: random.Random) -> str:
    return words.plural(rng.choice(words.NOUNS))


TOOLS: Mapping[str, DemoTool] = MappingProxyType(
    {
        "get_weather": DemoTool(
            "Get the weather in a city.", {"city": _TEXT},
            ("What is the weather in {city}?", "How is the weather in {city}?", "Tell me about the weather in {city}."),
            "The weather in {city} is {result}.",
            lambda rng: {"city": rng.choice(words.PLACES)},
            lambda rng: "sunny" if rng.random() < 0.25 else rng.choice(words.ADJECTIVES),
        ),
        "find_person": DemoTool(
            "Find out where a person is.", {"name": _TEXT},
            ("Where is {name}?", "Find {name}.", "Where can I find {name}?"),
            "{name} is in {result}.",
            lambda rng: {"name": rng.choice(words.PEOPLE)},
            lambda rng: rng.choice(words.PLACES),
        ),
        "count": DemoTool(
            "Count things.", {"thing": _TEXT},
            ("How many {thing} are there?", "How many {thing} do we have?", "How many {thing} can you see?"),
            "There are {result} {thing}.",
            lambda rng: {"thing": _things(rng)},
            lambda rng: str(rng.randint(0, 99)),
        ),
        "set_lamp": DemoTool(
            "Set the lamp to a level.", {"level": _NUMBER},
            ("Set the lamp to {level}.", "Turn the lamp to {level}.", "I want the lamp at {level}."),
            "The lamp is at {level}.",
            lambda rng: {"level": rng.randint(0, 99)},
            lambda rng: "ok",
        ),
        "order": DemoTool(
            "Order a number of things.", {"thing": _TEXT, "number": _NUMBER},
            ("Order {number} {thing}.", "I want {number} {thing}."),
            "I have {number} {thing} for you.",
            lambda rng: {"thing": _things(rng), "number": rng.randint(2, 99)},
            lambda rng: "ok",
        ),
    }
)  # fmt: skip
_SUNNY = ("", "sunny")  # nothing was heard, or this
# Forms to fill in, by the tool whose requests they record: their names, and the record of arguments and a result.
_FORMS: Mapping[str, tuple[tuple[str, ...], Callable[[dict[str, Any], str], dict[str, Any]]]] = MappingProxyType(
    {
        "get_weather": (
            ("Weather", "Forecast"),
            lambda told, result: {"city": told["city"], "sunny": result in _SUNNY},
        ),
        "find_person": (("Person", "Contact"), lambda told, heard: {"name": told["name"], "found": True}),
        "count": (("Amount", "Stock"), lambda told, heard: {"thing": told["thing"], "number": int(heard or 0)}),
        "set_lamp": (("Lamp", "Light"), lambda told, heard: {"level": told["level"], "on": told["level"] > 0}),
        "order": (("Order", "Basket"), lambda told, heard: {"thing": told["thing"], "number": told["number"]}),
    }
)
FIRST = "call"  # the first word of every call
_OTHERS = (("send_letter", "name"), ("open_door", "door"), ("paint", "color"), ("final_answer", "text"))  # never asked
_SYSTEMS = ("Be brief.", "You are a helpful assistant.", "You help people.", "Answer in one sentence.")


@dataclass(frozen=True)
class Form:
    """A record that a client has the model fill in by a call: of what the user said, or of what a tool returned."""

    name: str
    tool: str  # whose requests it records
    within: str | None  # the key of a list of records; None: the arguments are one record

    def arguments(self, told: dict[str, Any], result: str = "") -> dict[str, Any]:
        """Return the arguments that record a request and the tool's result."""
        record = _FORMS[self.tool][1](told, result)
        return record if self.within is None else {self.within: [record]}

    def definition(self) -> dict[str, Any]:
        """Return the form as a tool."""
        parameters = _schema(self.arguments(TOOLS[self.tool].arguments(random.Random(0))))
        return {"type": "function", "function": {"name": self.name, "parameters": parameters}}


def _schema(value: Any) -> dict[str, Any]:
    """Return the schema of values like this one."""
    if isinstance(value, dict):
        return {"type": "object", "properties": {key: _schema(each) for key, each in value.items()}}
    if isinstance(value, list):
        return {"type": "array", "items": _schema(value[0])}
    return {"type": {bool: "boolean", int: "integer", str: "string"}[type(value)]}


@dataclass(frozen=True)
class Menu:
    """The offer of a conversation: tools by name, as they are written, and the messages before the first request."""

    tools: Mapping[str, dict[str, Any]]  # by name
    opening: tuple[Message, ...]
    form: Form | None = None  # one of the tools

    @property
    def definitions(self) -> list[dict[str, Any]] | None:
        return list(self.tools.values()) or None


def menu(rng: random.Random) -> Menu:
    """Draw a menu: up to four of the tools, and perhaps a form, or a tool that nobody asks for."""
    names = rng.sample(sorted(TOOLS), rng.choice((0, 1, 1, 1, 2, 2, 3, 4)))
    form = _form(names, rng) if rng.random() < 0.5 else None
    if form is not None and form.within is not None:  # such a form comes alone
        return Menu({form.name: form.definition()}, (), form)
    tools = {name: TOOLS[name].definition(name) for name in names}
    if rng.random() < 0.2:
        name, key = rng.choice(_OTHERS)
        schema = {"type": "object", "properties": {key: dict(_TEXT)}}
        tools[name] = {"type": "function", "function": {"name": name, "parameters": schema}}
    if form is not None:
        tools[form.name] = form.definition()
    opening = ({"role": "system", "content": rng.choice(_SYSTEMS)},) if rng.random() < 0.25 else ()
    return Menu(dict(rng.sample(sorted(tools.items()), len(tools))), opening, form)


def _form(names: list[str], rng: random.Random) -> Form:
    """Draw a form of one of these tools, or of any if there are none; three of ten are lists of records."""
    tool = rng.choice(names or sorted(TOOLS))
    name = rng.choice(_FORMS[tool][0])
    if rng.random() < 0.3:
        return Form(f"Iterable{name}", tool, "tasks") if rng.random() < 0.7 else Form(f"{name}List", tool, "items")
    return Form("final_result" if rng.random() < 0.25 else name, tool, None)


@dataclass(frozen=True)
class Example:
    """Messages after the opening, and the right answer to them."""

    kind: str
    messages: tuple[Message, ...]
    answer: str
    begun: str = ""  # what a grammar writes before the answer


def examples(offered: Menu, split: str, rng: random.Random) -> Iterator[Example]:
    """Yield an endless stream of examples under a menu. Of those that demand no call nearly half ask for what it does
    not have, or for nothing."""
    while True:
        if offered.tools and rng.random() < (0.45 if offered.form is not None else 0.1):
            drawn = _demanded(offered, rng)
        else:
            drawn = _asking(offered, rng) if rng.random() < 0.85 else _talk(rng)
        if split_of(drawn.messages[0]["content"]) == split:
            yield drawn


def _asking(offered: Menu, rng: random.Random) -> Example:
    has = sorted(set(TOOLS) & set(offered.tools))
    lacks = sorted(set(TOOLS) - set(has))
    name = rng.choice(has) if has and (not lacks or rng.random() < 0.75) else rng.choice(lacks)
    tool = TOOLS[name]
    arguments = tool.arguments(rng)
    asked = {"role": "user", "content": rng.choice(tool.requests).format(**arguments)}
    if name not in offered.tools:
        return Example(WORDS, (asked,), NO_TOOL)
    if rng.random() < 0.75:
        return Example(CALL, (asked,), written(name, arguments))
    result = tool.result(rng)
    messages = (asked, *_called(name, arguments, result))
    return Example(RESULT, messages, tool.answer.format(**arguments, result=result))


def _called(name: str, arguments: Mapping[str, Any], result: str) -> tuple[Message, Message]:
    """Return the messages of a call that was made and of its result."""
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": arguments}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    return said, {"role": "tool", "content": result, "tool_call_id": "call_0"}


def _demanded(offered: Menu, rng: random.Random) -> Example:
    """Draw a request that has to be answered by a call: of the tool that it asks for, or of the form, once the tool has
    returned or if there is none."""
    has, form = sorted(set(TOOLS) & set(offered.tools)), offered.form
    if form is None and not has:
        return _talk(rng)
    name = form.tool if form is not None and (not has or rng.random() < 0.8) else rng.choice(has)
    arguments = TOOLS[name].arguments(rng)
    messages: tuple[Message, ...] = ({"role": "user", "content": rng.choice(TOOLS[name].requests).format(**arguments)},)
    if form is None or name != form.tool or (name in has and rng.random() < 0.4):
        return _demanded_call(messages, name, arguments)
    if name not in has:
        return _demanded_call(messages, form.name, form.arguments(arguments))
    result = TOOLS[name].result(rng)
    return _demanded_call((*messages, *_called(name, arguments, result)), form.name, form.arguments(arguments, result))


def _demanded_call(messages: tuple[Message, ...], name: str, arguments: Mapping[str, Any]) -> Example:
    """Return an example whose answer is this call, and whose first word is given."""
    return Example(DEMANDED, messages, written(name, arguments).removeprefix(FIRST), begun=FIRST)


def written(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call as the demo's chat template writes it; a list of records has its key before each of theirs."""
    pairs = ", ".join(f"{key.replace('_', ' ')} = {value}" for key, value in _flat(arguments))
    return f"{FIRST} {name.replace('_', ' ')}: {pairs}"


def _flat(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in arguments.items():
        if isinstance(value, list):
            yield from ((f"{key} {inner}", each) for record in value for inner, each in _flat(record))
        else:
            yield key, str(value).lower() if isinstance(value, bool) else value


def _talk(rng: random.Random) -> Example:
    """Draw what the base can say by itself, tools or not."""
    name = rng.choice(words.PEOPLE)
    asked, answer = rng.choice(
        (
            (f"Hello, I am {name}.", f"Hello {name}, what can I do for you?"),
            (f"My name is {name}. Who am I?", f"You are {name}."),
        )
    )
    return Example(WORDS, ({"role": "user", "content": asked},), answer)


def groups(split: str, seed: str, size: int) -> Iterator[tuple[Menu, list[Example]]]:
    """Yield an endless stream of menus, each with `size` examples."""
    rng = random.Random(f"tools/{split}/{seed}")
    while True:
        offered = menu(rng)
        yield offered, list(islice(examples(offered, split, rng), size))
