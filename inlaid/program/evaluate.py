"""Evaluation of a program's nodes for given inputs: which values are wanted, known, and wait for which others.

Only what somebody wants is evaluated. Calls and functions are handed out, and their values handed back. Nothing here
knows of engines, and nothing recurses: a graph may be as deep as it likes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from inlaid.program.nodes import Best, Branch, Function, Generate, Join, Map, Split, Text
from inlaid.program.options import Limits, Options
from inlaid.program.refused import ProgramError
from inlaid.program.scope import Compiled, Scope
from inlaid.program.template import Reference, parse_reference
from inlaid.program.values import BadValue, Failure, best, failure_in, field, fill, holds, list_of, text_of

MAX_TEXT = 50_000_000  # characters of one text, where no limit says less


class Frame:
    """One evaluation of a scope: of the whole program, or of a map's body for one element."""

    def __init__(self, scope: Scope, given: Mapping[str, Any], parent: Frame | None, path: tuple[int, ...], where: str):
        self.scope = scope
        self.given = given
        self.parent = parent
        self.path = path  # the number of the execution, then of the elements
        self.where = where
        self.cells: dict[str, Cell] = {}

    def cell(self, name: str) -> Cell:
        """Return the cell of one of this scope's nodes, made at first use."""
        name = self.scope.equal.get(name, name)
        found = self.cells.get(name)
        if found is None:
            found = self.cells[name] = Cell(self, self.scope.nodes[name])
        return found

    def find(self, name: str) -> Cell | None:
        """Return the cell of a node by its name; None: it is an input or an element."""
        frame = self._home(name)
        return None if name in frame.given else frame.cell(name)

    def value(self, name: str) -> Any:
        """Return a value that is known by now."""
        frame = self._home(name)
        return frame.given[name] if name in frame.given else frame.cell(name).value

    def _home(self, name: str) -> Frame:
        frame: Frame | None = self
        while frame is not None and name not in frame.given and name not in frame.scope.nodes:
            frame = frame.parent
        assert frame is not None, f"{name} was resolved when the program was compiled"
        return frame


class Cell:
    """The value of one node in one frame."""

    __slots__ = ("call", "done", "elements", "frame", "node", "pending", "stage", "value", "waiters", "wanted")

    def __init__(self, frame: Frame, node: Compiled) -> None:
        self.frame = frame
        self.node = node
        self.wanted = self.done = False
        self.value: Any = None
        self.pending = 0  # cells that it waits for
        self.waiters: list[Cell] = []
        self.stage = 0  # branches and maps are evaluated twice
        self.elements: list[Cell] = []  # of a map
        self.call: Any = None  # the Call that makes the value

    @property
    def where(self) -> str:
        """The name for people: facts[3].fact."""
        return f"{self.frame.where}{self.node.name}"


class Evaluation:
    """All executions of one run."""

    def __init__(
        self,
        options: Options,
        limits: Limits,
        on_call: Callable[[Cell, str | list[dict[str, str]]], None],
        on_function: Callable[[Cell, Function, list[Any]], None],
        on_value: Callable[[Cell], None],
        on_elements: Callable[[Cell], None],
    ) -> None:
        self._eager = not options.drop_dead
        self._limits = limits
        self._on_call = on_call
        self._on_function = on_function
        self._on_value = on_value
        self._on_elements = on_elements  # of a map, or the side that a branch takes
        self._ready: deque[Cell] = deque()
        self._num_values = 0
        self._num_chars = 0

    def start(self, scope: Scope, outputs: tuple[str, ...], inputs: Mapping[str, Any], number: int) -> Frame:
        """Begin one execution. ProgramError: inputs are missing or unknown."""
        if set(inputs) != set(scope.given):
            missing, unknown = sorted(set(scope.given) - set(inputs)), sorted(set(inputs) - set(scope.given))
            given = f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            raise ProgramError(f"the inputs must be {', '.join(scope.given) or 'none'}; {given}", "inputs")
        frame = Frame(scope, inputs, None, (number,), "")
        for name in scope.nodes if self._eager else outputs:
            self._want(frame.cell(name))
        return frame

    def advance(self) -> None:
        """Evaluate all that can be; calls and functions are handed out."""
        while self._ready:
            cell = self._ready.popleft()
            try:
                self._evaluate(cell)
            except BadValue as error:
                self.settle(cell, Failure(cell.where, str(error)))

    def settle(self, cell: Cell, value: Any) -> None:
        """Give a cell its value, and wake those that wait for it."""
        if cell.done:
            return
        cell.value, cell.done = value, True
        self._on_value(cell)
        for waiter in cell.waiters:
            waiter.pending -= 1
            if not waiter.pending:
                self._ready.append(waiter)
        cell.waiters = []

    def _want(self, cell: Cell) -> None:
        stack = [cell]
        while stack:
            wanted = stack.pop()
            if not wanted.wanted:
                wanted.wanted = True
                stack += self._await(wanted, self._cells(wanted.frame, wanted.node.needs))

    def _await(self, cell: Cell, others: list[Cell]) -> list[Cell]:
        """Let a cell wait for others, and return those of them that nobody has wanted yet."""
        missing = [other for other in others if not other.done]
        cell.pending = len(missing)
        for other in missing:
            other.waiters.append(cell)
        if not missing:
            self._ready.append(cell)
        return [other for other in missing if not other.wanted]

    def _cells(self, frame: Frame, references: tuple[Reference, ...]) -> list[Cell]:
        found = (frame.find(name) for name in dict.fromkeys(reference.name for reference in references))
        return [cell for cell in found if cell is not None]

    def _evaluate(self, cell: Cell) -> None:
        element, frame = cell.node.element, cell.frame
        self._count(1)
        if isinstance(element, Branch):
            return self._evaluate_branch(cell, element)
        if isinstance(element, Map):
            return self._evaluate_map(cell, element)
        values = {reference.name: frame.value(reference.name) for reference in cell.node.needs}
        if isinstance(element, Best):
            of, by = (field(values[each.name], each) for each in cell.node.needs)
            failed = next((value for value in (of, by) if isinstance(value, Failure)), None)
            return self.settle(cell, failed if failed is not None else best(of, by))
        if (failed := next(filter(None, map(failure_in, values.values())), None)) is not None:
            return self.settle(cell, failed)
        match element:
            case Generate():
                most = self._most_chars()
                if cell.node.prompt is not None:
                    return self._on_call(cell, fill(cell.node.prompt, values, most))
                turns = [{"role": role, "content": fill(text, values, most)} for role, text in cell.node.turns]
                return self._on_call(cell, turns)
            case Text():
                assert cell.node.prompt is not None
                value: Any = self._made(fill(cell.node.prompt, values, self._most_chars()))
            case Join(separator=separator):
                listed = list_of(self._only(cell, values), "join")
                value = self._made(separator.join(map(text_of, listed)))
            case Split(separator=separator):
                parts = (part.strip() for part in self._made(text_of(self._only(cell, values))).split(separator))
                value = [part for part in parts if part]
                self._count(len(value))
            case Function(arguments=arguments):
                given = [field(frame.value(each.name), each) for each in map(parse_reference, arguments)]
                return self._on_function(cell, element, given)
        return self.settle(cell, value)

    def _only(self, cell: Cell, values: dict[str, Any]) -> Any:
        (reference,) = cell.node.needs
        return field(values[reference.name], reference)

    def _evaluate_branch(self, cell: Cell, element: Branch) -> None:
        if cell.stage == 0:
            (reference,) = cell.node.needs
            value = field(cell.frame.value(reference.name), reference)
            failed = failure_in(value)
            if failed is not None and element.when.test != "failed":
                return self.settle(cell, failed)
            side = element.then if holds(element.when, failed or value) else element.otherwise
            if side is None:
                return self.settle(cell, None)
            chosen = parse_reference(side)
            cell.stage, cell.value = 1, chosen  # until its own value is known
            found = self._cells(cell.frame, (chosen,))
            cell.elements = [] if chosen.fields else found
            self._on_elements(cell)
            for other in self._await(cell, found):
                self._want(other)
            return None
        chosen = cell.value
        return self.settle(cell, field(cell.frame.value(chosen.name), chosen))

    def _evaluate_map(self, cell: Cell, element: Map) -> None:
        if cell.stage == 1:
            return self.settle(cell, [each.value for each in cell.elements])
        frame, scope = cell.frame, cell.node.body
        assert scope is not None
        items: list[Any] = list(range(element.over)) if isinstance(element.over, int) else []
        if not isinstance(element.over, int):
            (reference,) = cell.node.needs
            value = field(frame.value(reference.name), reference)
            if isinstance(value, Failure):
                return self.settle(cell, value)
            items = list_of(value, f"map {cell.node.name!r}")
        self._count(len(items))
        cell.stage = 1
        frames = [
            Frame(scope, {element.item: item}, frame, (*frame.path, number), f"{cell.where}[{number}].")
            for number, item in enumerate(items)
        ]
        cell.elements = [inner.cell(element.result) for inner in frames]
        self._on_elements(cell)
        for other in self._await(cell, cell.elements):
            self._want(other)
        for inner in frames if self._eager else ():
            for name in scope.nodes:
                self._want(inner.cell(name))
        return None

    # Bounds.

    def _count(self, number: int) -> None:
        self._num_values += number
        if self._limits.max_values and self._num_values > self._limits.max_values:
            raise BadValue(f"the program computes more than the {self._limits.max_values} values that it may")

    def _most_chars(self) -> int:
        most = self._limits.max_chars
        return max(0, most - self._num_chars) if most else MAX_TEXT

    def _made(self, text: str) -> str:
        self._num_chars += len(text)
        if self._limits.max_chars and self._num_chars > self._limits.max_chars:
            raise BadValue(f"the program makes more than the {self._limits.max_chars} characters of text that it may")
        return text
