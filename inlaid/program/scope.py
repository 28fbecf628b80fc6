"""A body of nodes after its references are resolved: order, what each node needs, and which nodes are equal or dead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

import msgspec

from inlaid.program.nodes import Best, Branch, Element, Function, Generate, Join, Map, Split, Text
from inlaid.program.refused import ProgramError
from inlaid.program.template import Reference, Template, parse_reference, parse_template


@dataclass
class Compiled:
    """One node, with its templates parsed."""

    element: Element
    needs: tuple[Reference, ...] = ()  # before it can be evaluated
    later: tuple[Reference, ...] = ()  # that it may need then: the sides of a branch
    prompt: Template | None = None  # of a call or a text
    turns: tuple[tuple[str, Template], ...] = ()  # roles and contents
    body: Scope | None = None  # of a map
    least: int = 0  # tokens that a call's prompt has whatever its holes hold

    @property
    def name(self) -> str:
        """The node's name."""
        return self.element.name


@dataclass
class Scope:
    """The nodes of a program or of a map's body, each behind those that it refers to."""

    given: tuple[str, ...]  # inputs, or the name of the element
    nodes: dict[str, Compiled]
    parent: Scope | None = None
    label: str = ""  # the names of the maps around it
    equal: dict[str, str] = field(default_factory=dict)  # a node that is merged: the one that stands for it
    live: frozenset[str] = frozenset()

    def home(self, name: str) -> Scope | None:
        """Return the scope that has a name; None: no scope has it."""
        scope: Scope | None = self
        while scope is not None and name not in scope.nodes and name not in scope.given:
            scope = scope.parent
        return scope

    def find(self, name: str) -> Compiled | None:
        """Return a node that is visible here; None for inputs, elements and unknown names."""
        scope = self.home(name)
        return None if scope is None else scope.nodes.get(name)

    def everywhere(self) -> Iterator[tuple[Scope, Compiled]]:
        """Iterate over the nodes of this scope and of the bodies within."""
        for node in self.nodes.values():
            yield self, node
            if node.body is not None:
                yield from node.body.everywhere()


def compiled(element: Element) -> Compiled:
    """Parse a node's templates and list what it refers to; a map's body is left out."""
    match element:
        case Generate():
            return _call(element)
        case Text(template=text):
            template = parse_template(text)
            return Compiled(element, template.holes, prompt=template)
        case Join(of=of) | Split(of=of):
            return Compiled(element, (parse_reference(of),))
        case Best(of=of, by=by):
            return Compiled(element, (parse_reference(of), parse_reference(by)))
        case Branch(when=when, then=then, otherwise=otherwise):
            sides = tuple(parse_reference(side) for side in (then, otherwise) if side is not None)
            return Compiled(element, (parse_reference(when.value),), sides)
        case Map(over=over):
            return Compiled(element, () if isinstance(over, int) else (parse_reference(over),))
        case Function(arguments=arguments):
            return Compiled(element, tuple(map(parse_reference, arguments)))
    raise AssertionError(element)


def _call(element: Generate) -> Compiled:
    if (element.prompt is None) == (element.messages is None):
        raise ProgramError(f"{element.name!r} must have either a prompt or messages", element.name)
    prompt = None if element.prompt is None else parse_template(element.prompt)
    turns = tuple((turn.role, parse_template(turn.content)) for turn in element.messages or ())
    holes = (prompt.holes if prompt is not None else ()) + tuple(hole for _, part in turns for hole in part.holes)
    if element.continues is not None:
        holes += (parse_reference(element.continues),)
    return Compiled(element, holes, prompt=prompt, turns=turns)


def make_scope(
    elements: Sequence[Element], given: Sequence[str], parent: Scope | None = None, label: str = ""
) -> Scope:
    """Compile a body: parse its nodes, resolve their names, and put them in order."""
    scope = Scope(tuple(given), {}, parent, label)
    for name in given:
        _check_name(name, parent)
    for element in elements:
        name = element.name
        _check_name(name, parent)
        if name in scope.nodes or name in scope.given:
            raise ProgramError(f"the name {name!r} is given twice", name)
        scope.nodes[name] = _at(name, lambda element=element: compiled(element))
    for name, node in scope.nodes.items():
        if isinstance(node.element, Map):
            element = node.element
            node.body = make_scope(element.nodes, (element.item,), scope, f"{label}{name}[].")
            if element.result not in node.body.nodes:
                raise ProgramError(f"map {name!r} has no node {element.result!r} to be its result", name)
    for name, node in scope.nodes.items():
        for reference in (*node.needs, *node.later):
            if scope.home(reference.name) is None:
                raise ProgramError(f"{name!r} refers to {reference.name!r}, which is no input and no node here", name)
    scope.nodes = _ordered(scope)
    return scope


def _check_name(name: str, parent: Scope | None) -> None:
    _at(name, lambda: parse_reference(name))
    if "." in name:
        raise ProgramError(f"a name has no dot: {name!r}", name)
    if parent is not None and parent.home(name) is not None:
        raise ProgramError(f"the name {name!r} is one of the body around it too; choose another", name)


def _at(name: str, make: Any) -> Any:
    """Add the node's name to an error of its templates."""
    try:
        return make()
    except ProgramError as error:
        raise error if error.refusal.param else ProgramError(f"{name!r}: {error}", name) from None


def references(node: Compiled) -> set[str]:
    """Return all names that a node refers to, those of a map's body to outer values included."""
    names = {reference.name for reference in (*node.needs, *node.later)}
    if node.body is not None:
        own = {*node.body.given, *node.body.nodes}
        names |= {name for inner in node.body.nodes.values() for name in references(inner)} - own
    return names


def _ordered(scope: Scope) -> dict[str, Compiled]:
    """Return the nodes, each behind those it refers to. ProgramError: they go round in a circle."""
    graph = {name: sorted(references(node) & scope.nodes.keys()) for name, node in scope.nodes.items()}
    try:
        return {name: scope.nodes[name] for name in TopologicalSorter(graph).static_order()}
    except CycleError as error:
        circle = list(reversed(error.args[1]))
        raise ProgramError(f"the nodes go round in a circle: {' -> '.join(circle)}", circle[0]) from None


def mark_live(scope: Scope, wanted: Sequence[str]) -> None:
    """Find what the wanted nodes need, in this body and in those within."""
    live: set[str] = set()
    left = list(wanted)
    while left:
        name = left.pop()
        if name in scope.nodes and name not in live:
            live.add(name)
            left += references(scope.nodes[name])
    scope.live = frozenset(live)
    for node in scope.nodes.values():
        if node.body is not None and isinstance(node.element, Map):
            mark_live(node.body, [node.element.result] if node.name in live else [])


def merge_equal(scope: Scope, adapters: Mapping[str, str | None]) -> None:
    """Find nodes that must have the value of another, and let the first of them stand for all."""
    seen: dict[Any, str] = {}
    for name, node in scope.nodes.items():
        if node.body is not None:
            merge_equal(node.body, adapters)
        signature = _signature(scope, node, adapters)
        if signature is not None and (first := seen.setdefault(signature, name)) != name:
            scope.equal[name] = first


def determined(element: Generate) -> bool:
    """Tell whether a call's prompt determines its answer: greedy, or with a seed of its own."""
    return element.params.greedy or element.params.seed is not None


def _signature(scope: Scope, node: Compiled, adapters: Mapping[str, str | None]) -> Any:
    """Return what determines a node's value besides the values it refers to; None: nothing that is known here."""
    element = node.element
    parts = _parts(scope, node.prompt)
    names = tuple(_canonical(scope, reference) for reference in (*node.needs, *node.later))
    match element:
        case Generate():
            if not determined(element):
                return None
            turns = tuple((role, _parts(scope, content)) for role, content in node.turns)
            adapter = None if element.adapter is None else adapters[element.adapter]
            params = msgspec.json.encode(element.params)
            return "call", parts, turns, names, adapter, element.continues is None, params, element.deadline
        case Text():
            return "text", parts
        case Join(separator=separator):
            return "join", names, separator
        case Split(separator=separator):
            return "split", names, separator
        case Best():
            return "best", names
        case Branch(when=when):
            return "branch", names, when.test, when.against, type(when.against), when.negated
    return None


def _parts(scope: Scope, template: Template | None) -> tuple[Any, ...]:
    if template is None:
        return ()
    return tuple(part if isinstance(part, str) else _canonical(scope, part) for part in template.parts)


def _canonical(scope: Scope, reference: Reference) -> Reference:
    home = scope.home(reference.name)
    assert home is not None
    return Reference(home.equal.get(reference.name, reference.name), reference.fields)
