"""Plan: a compiled program, and how it looks before and after fusion, as text, DOT or SVG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from inlaid.program.nodes import Function, Generate, Map
from inlaid.program.options import Options
from inlaid.program.scope import Compiled, Scope, references
from inlaid.program.target import Target

_BOX_WIDTH, _BOX_HEIGHT, _GAP = 170, 44, 36  # of a drawing, in pixels


@dataclass(frozen=True)
class Plan:
    """A program that has been checked for a model."""

    root: Scope
    outputs: tuple[str, ...]
    target: Target
    options: Options

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return self.root.given

    def show(self) -> str:
        """Return the graph before and after fusion as text."""
        calls = sum(isinstance(node.element, Generate) for _, node in self.root.everywhere())
        inputs, outputs = ", ".join(self.inputs) or "none", ", ".join(self.outputs)
        lines = [f"program: {calls} calls; inputs: {inputs}; outputs: {outputs}"]
        for scope, node in self.root.everywhere():
            needs = ", ".join(dict.fromkeys(map(str, (*node.needs, *node.later)))) or "nothing"
            lines.append(f"  {scope.label}{node.name} = {_about(node)}, needs {needs}")
        lines += ["", "fused:" if self.options.fuse_decode else "fused, the calls of one adapter at a time:"]
        lines += [f"  {line}" for line in self._after()]
        return "\n".join(lines)

    def _after(self) -> Iterator[str]:
        levels: dict[int, list[str]] = {}
        for label, node, level in self._computed():
            if isinstance(node.element, Generate):
                levels.setdefault(level, []).append(f"{label}{node.name} [{node.element.adapter or 'base'}]")
        for level in sorted(levels):
            yield f"wave {level}, at once: {', '.join(levels[level])}"
        for scope, node in self.root.everywhere():
            name = f"{scope.label}{node.name}"
            if self.options.drop_dead and node.name not in scope.live:
                yield f"dropped: {name}, which no output needs"
            elif node.name in scope.equal:
                yield f"merged: {name} is {scope.label}{scope.equal[node.name]}"
            elif isinstance(node.element, Generate) and node.element.continues and self.options.keep_kv:
                yield f"kept: {name} starts from the KV of {node.element.continues}"
            if node.later and self.options.drop_dead:
                yield f"taken when known: {name} computes one of {', '.join(map(str, node.later))}"
        if self.options.share_prefixes:
            yield from self._shared()

    def _shared(self) -> Iterator[str]:
        """Name the calls of one adapter whose prompts begin with the same fixed text. Prefixes that appear at run time
        are shared too; those of two adapters never are."""
        groups: dict[tuple[str | None, str], list[str]] = {}
        for label, node, _ in self._computed():
            element = node.element
            if not isinstance(element, Generate) or element.continues is not None:
                continue
            parts = node.prompt.parts if node.prompt is not None else node.turns[0][1].parts
            if parts and isinstance(parts[0], str):
                groups.setdefault((element.adapter, parts[0]), []).append(f"{label}{node.name}")
        for (adapter, text), names in groups.items():
            if len(names) > 1:
                yield f"shared: {', '.join(names)} [{adapter or 'base'}] begin with the same {len(text)} characters"

    def _computed(self) -> Iterator[tuple[str, Compiled, int]]:
        """Iterate over the nodes that are left after fusion, with their wave: the most calls that one waits for."""
        yield from _levels(self.root, dict.fromkeys(self.inputs, 0), self.options.drop_dead)

    def dot(self) -> str:
        """Return the graph in Graphviz's language; what fusion takes away is dashed."""
        lines = ["digraph program {", "  rankdir=TB; node [shape=box];"]
        kept = {f"{label}{node.name}" for label, node, _ in self._computed()}
        for name in self.inputs:
            lines.append(f'  "{name}" [shape=ellipse];')
        for scope, node in self.root.everywhere():
            name = f"{scope.label}{node.name}"
            style = "" if name in kept else ", style=dashed"
            lines.append(f'  "{name}" [label="{name}\\n{_about(node)}"{style}];')
            for source in _sources(scope, node):
                lines.append(f'  "{source}" -> "{name}";')
        return "\n".join([*lines, "}"])

    def svg(self) -> str:
        """Return a drawing: the inputs above, then wave by wave; what fusion takes away is dashed at the bottom."""
        rows: dict[int, list[tuple[str, str, str]]] = {0: [(name, "input", "#eef") for name in self.inputs]}
        levels = {f"{label}{node.name}": level for label, node, level in self._computed()}
        last = max(levels.values(), default=0) + 1
        for scope, node in self.root.everywhere():
            name = f"{scope.label}{node.name}"
            colour = "#dfd" if isinstance(node.element, Generate) else "#fff"
            rows.setdefault(2 * levels.get(name, last) + (colour == "#fff"), []).append((name, _about(node), colour))
        places: dict[str, tuple[int, int]] = {}
        for row, key in enumerate(sorted(rows)):
            for column, (name, _, _) in enumerate(rows[key]):
                places[name] = (_GAP + column * (_BOX_WIDTH + _GAP), _GAP + row * (_BOX_HEIGHT + _GAP))
        width = max((x for x, _ in places.values()), default=0) + _BOX_WIDTH + _GAP
        height = max((y for _, y in places.values()), default=0) + _BOX_HEIGHT + _GAP
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
        for scope, node in self.root.everywhere():
            parts += [_line(places[source], places[f"{scope.label}{node.name}"]) for source in _sources(scope, node)]
        for boxes in rows.values():
            for name, about, colour in boxes:
                dashed = "" if name in levels or about == "input" else ' stroke-dasharray="4"'
                parts.append(_box(places[name], name, about, colour, dashed))
        return "\n".join([*parts, "</svg>"])

    def write(self, file: str | Path) -> None:
        """Write the drawing to a file: .svg or .dot."""
        path = Path(file)
        if path.suffix not in (".svg", ".dot"):
            raise ValueError(f"{path} has no form that is known: .svg or .dot")
        path.write_text(self.svg() if path.suffix == ".svg" else self.dot(), encoding="utf-8")


def _levels(scope: Scope, known: dict[str, int], drop_dead: bool) -> Iterator[tuple[str, Compiled, int]]:
    levels = dict(known)
    for name, node in scope.nodes.items():
        level = max((levels[other] for other in references(node) if other in levels), default=0)
        if (drop_dead and name not in scope.live) or name in scope.equal:
            levels[name] = levels.get(scope.equal.get(name, ""), level)
            continue
        if isinstance(node.element, Generate):
            level += 1
        if node.body is not None:
            inner = list(_levels(node.body, {**levels, **dict.fromkeys(node.body.given, level)}, drop_dead))
            level = max((deeper for _, _, deeper in inner), default=level)
            yield from inner
        levels[name] = level
        yield scope.label, node, level


def _about(node: Compiled) -> str:
    element = node.element
    if isinstance(element, Generate):
        kind = "chat" if element.messages is not None else "generate"
        return f"{kind}({element.adapter or 'base'}, up to {element.params.max_tokens} tokens)"
    if isinstance(element, Map):
        return f"map(over {element.over}, result {element.result})"
    return "function" if isinstance(element, Function) else type(element).__name__.lower()


def _sources(scope: Scope, node: Compiled) -> list[str]:
    """Return the labelled names of the inputs and nodes that a node refers to; elements of maps are left out."""
    found = []
    for name in sorted(references(node)):
        home = scope.home(name)
        if home is not None and (name in home.nodes or home.parent is None):
            found.append(f"{home.label}{name}")
    return found


def _line(start: tuple[int, int], end: tuple[int, int]) -> str:
    x1, y1, x2, y2 = start[0] + _BOX_WIDTH // 2, start[1] + _BOX_HEIGHT, end[0] + _BOX_WIDTH // 2, end[1]
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#888"/>'


def _box(place: tuple[int, int], name: str, about: str, colour: str, dashed: str) -> str:
    x, y = place
    return (
        f'<rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" fill="{colour}" stroke="#444"{dashed}/>'
        f'<text x="{x + 6}" y="{y + 18}" font-size="13">{escape(name)}</text>'
        f'<text x="{x + 6}" y="{y + 35}" font-size="10" fill="#555">{escape(about)}</text>'
    )
