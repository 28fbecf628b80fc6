"""Program: the builder that a user writes against. It only collects nodes; `compile` checks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from inlaid.engine.request import SamplingParams
from inlaid.program.compile import compile_program
from inlaid.program.local import Host, LocalPlan
from inlaid.program.nodes import (
    AnyNode,
    Best,
    Branch,
    Condition,
    Element,
    Function,
    Generate,
    Join,
    Map,
    Split,
    Text,
    Turn,
)
from inlaid.program.options import Options
from inlaid.program.refused import ProgramError
from inlaid.program.target import Target

Messages = str | Sequence[dict[str, str]]


class Body:
    """A list of nodes: a program's own, or that of a map. Each method adds a node and returns its name."""

    def __init__(self) -> None:
        self.nodes: list[Element] = []

    def generate(
        self,
        name: str,
        prompt: str,
        adapter: str | None = None,
        *,
        continues: str | None = None,
        deadline: float | None = None,
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> str:
        """Add a call with a prompt as it is. `sampling` are fields of SamplingParams."""
        return self._add(
            Generate(
                name=name,
                prompt=prompt,
                adapter=adapter,
                params=_params(params, sampling),
                continues=continues,
                deadline=deadline,
            )
        )

    def chat(
        self,
        name: str,
        messages: Messages,
        adapter: str | None = None,
        *,
        continues: str | None = None,
        deadline: float | None = None,
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> str:
        """Add a call with messages in the model's chat template; a text is one message of the user."""
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self._add(
            Generate(
                name=name,
                messages=msgspec.convert(list(given), tuple[Turn, ...]),
                adapter=adapter,
                params=_params(params, sampling),
                continues=continues,
                deadline=deadline,
            )
        )

    def text(self, name: str, template: str) -> str:
        """Add a text made of others."""
        return self._add(Text(name=name, template=template))

    def join(self, name: str, of: str, separator: str = "\n") -> str:
        """Add the elements of a list as one text."""
        return self._add(Join(name=name, of=of, separator=separator))

    def split(self, name: str, of: str, separator: str = "\n") -> str:
        """Add the parts of a text as a list."""
        return self._add(Split(name=name, of=of, separator=separator))

    def best(self, name: str, of: str, by: str) -> str:
        """Add the element of one list whose element of another is the largest number."""
        return self._add(Best(name=name, of=of, by=by))

    def branch(self, name: str, when: Condition, then: str, otherwise: str | None = None) -> str:
        """Add the value of one of two nodes, by a condition."""
        return self._add(Branch(name=name, when=when, then=then, otherwise=otherwise))

    def function(self, name: str, call: Callable[..., Any], *arguments: str) -> str:
        """Add the value of a Python function of other values. It runs on a thread."""
        return self._add(Function(name, call, arguments))

    @contextmanager
    def map(self, name: str, over: str | int, item: str = "item") -> Iterator[Body]:
        """Add a body for each element of a list, or for each number below a count. The last node that is added within
        is the result."""
        body = Body()
        yield body
        if not body.nodes:
            raise ProgramError(f"the body of map {name!r} has no node", name)
        nodes: Any = tuple(body.nodes)  # functions among them, which the struct itself does not check
        self._add(Map(name=name, over=over, item=item, nodes=nodes, result=body.nodes[-1].name))

    def _add(self, node: Element) -> str:
        self.nodes.append(node)
        return node.name


class Program(Body):
    """A graph of calls, and of what is between them."""

    def __init__(self, outputs: Sequence[str] | None = None) -> None:
        super().__init__()
        self.inputs: list[str] = []
        self.outputs = None if outputs is None else list(outputs)  # None: the nodes that no other refers to

    def input(self, name: str) -> str:
        """Add an input: any JSON value."""
        self.inputs.append(name)
        return name

    def compile(self, llm: Host, options: Options | None = None, **switches: Any) -> LocalPlan:
        """Check the program for a model and return its plan. `switches` are fields of Options."""
        chosen = msgspec.structs.replace(options or Options(), **switches)
        target = Target(llm.encoder, llm.block_size, {name: name for name in llm.adapters})
        return LocalPlan(compile_program(self.nodes, self.inputs, self.outputs, target, chosen), llm)

    def to_json(self) -> bytes:
        """Return the body of POST /v1/programs without the inputs' values."""
        outputs = {} if self.outputs is None else {"outputs": self.outputs}
        return msgspec.json.encode({"nodes": list(_plain(self.nodes)), **outputs})


def _plain(nodes: Sequence[Element]) -> Iterator[AnyNode]:
    for node in nodes:
        if isinstance(node, Function):
            raise ProgramError(f"{node.name!r} is a Python function, which has no JSON form", node.name)
        if isinstance(node, Map):
            list(_plain(node.nodes))
        yield node


def _params(params: SamplingParams | None, sampling: dict[str, Any]) -> SamplingParams:
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = (sampling["stop"],)
    return msgspec.structs.replace(params or SamplingParams(), **sampling)
