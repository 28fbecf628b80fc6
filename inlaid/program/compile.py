"""`compile_program`: checks a program for one model and makes its plan. What cannot run is refused by its node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inlaid.engine.refusal import Refused
from inlaid.program.nodes import Branch, Condition, Element, Generate, Map, Split
from inlaid.program.options import Options
from inlaid.program.plan import Plan
from inlaid.program.refused import ProgramError
from inlaid.program.scope import Compiled, Scope, make_scope, mark_live, merge_equal, references
from inlaid.program.target import Target
from inlaid.text.params import check

MAX_NODES = 10_000
MAX_NESTED = 8  # maps within maps
MAX_COUNT = 65_536  # elements of a map over a count
MAX_SEPARATOR = 1024


def compile_program(
    nodes: Sequence[Element],
    inputs: Sequence[str],
    outputs: Sequence[str] | None,
    target: Target,
    options: Options | None = None,
) -> Plan:
    """Check a program and return its plan. Without outputs, those nodes count that no other refers to."""
    options = options or Options()
    if not nodes:
        raise ProgramError("the program has no nodes")
    _check_size(nodes)
    root = make_scope(nodes, inputs)
    for scope, node in root.everywhere():
        try:
            _check(scope, node, target)
        except ProgramError as error:
            raise error if error.refusal.param else ProgramError(str(error), node.name) from None
        except Refused as error:
            raise ProgramError(f"{node.name!r}: {error}", node.name) from error
    wanted = list(root.nodes) if outputs is None else list(outputs)
    if outputs is None:
        used = {name for node in root.nodes.values() for name in references(node)}
        wanted = [element.name for element in nodes if element.name not in used]
    for name in wanted:
        if name not in root.nodes:
            raise ProgramError(f"the output {name!r} is not a node of the program", name)
    mark_live(root, wanted)
    if options.merge_equal:
        merge_equal(root, target.adapters)
    return Plan(root, tuple(dict.fromkeys(wanted)), target, options)


def _check_size(nodes: Sequence[Element]) -> None:
    """Bound the nodes and their nesting before anything looks through them."""
    level, count, depth = list(nodes), 0, 0
    while level:
        count += len(level)
        if count > MAX_NODES:
            raise ProgramError(f"the program has more than {MAX_NODES} nodes")
        if depth > MAX_NESTED:
            raise ProgramError(f"maps are nested more than {MAX_NESTED} deep")
        level = [inner for node in level if isinstance(node, Map) for inner in node.nodes]
        depth += 1


def _check(scope: Scope, node: Compiled, target: Target) -> None:
    match node.element:
        case Generate() as element:
            _check_call(scope, node, element, target)
        case Branch(when=when):
            _check_condition(when)
        case Map(over=int(count)) if not 0 <= count <= MAX_COUNT:
            raise ProgramError(f"map {node.name!r} is over {count}; it must be from 0 to {MAX_COUNT}")
        case Split(separator=separator) if not 0 < len(separator) <= MAX_SEPARATOR:
            raise ProgramError(f"the separator of {node.name!r} must have 1 to {MAX_SEPARATOR} characters")


def _check_call(scope: Scope, node: Compiled, element: Generate, target: Target) -> None:
    if element.adapter is not None and element.adapter not in target.adapters:
        known = ", ".join(sorted(target.adapters)[:16]) or "none"
        raise ProgramError(f"{node.name!r} names adapter {element.adapter!r}, which is not served; known: {known}")
    if element.params.logprobs is not None or element.params.prompt_logprobs is not None:
        raise ProgramError(f"{node.name!r} asks for log probabilities, which a program does not return")
    if element.params.max_tokens < 1:
        raise ProgramError(f"max_tokens of {node.name!r} is {element.params.max_tokens}; it must be at least 1")
    if element.deadline is not None and not 0 < element.deadline <= 86_400:
        raise ProgramError(f"deadline of {node.name!r} is {element.deadline} s; it must be above 0 and at most a day")
    if element.messages is not None and not target.encoder.tokenizer.template.exists:
        raise ProgramError(f"{node.name!r} has messages, but the model has no chat template; give a prompt")
    check(element.params, target.encoder.vocab_size)
    if element.continues is not None:
        _check_continuation(scope, element, target)
    node.least, most = least_tokens(scope, node, target), target.encoder.max_model_len
    if node.least + element.params.max_tokens > most:
        raise ProgramError(
            f"{node.name!r} cannot fit: its fixed text has {node.least} tokens and its answer up to "
            f"{element.params.max_tokens}, but the context holds {most}"
        )


def _check_continuation(scope: Scope, element: Generate, target: Target) -> None:
    assert element.continues is not None
    before = scope.find(element.continues)
    if before is None or not isinstance(before.element, Generate):
        raise ProgramError(f"{element.name!r} continues {element.continues!r}, which is no call")
    names = [None if name is None else target.adapters.get(name) for name in (element.adapter, before.element.adapter)]
    if names[0] != names[1]:
        raise ProgramError(
            f"{element.name!r} continues {element.continues!r} with another adapter; KV of one adapter is of no use to "
            "another: put the texts into a prompt instead"
        )
    if element.messages is not None and before.element.messages is None:
        raise ProgramError(f"{element.name!r} has messages, but continues {element.continues!r}, which has a prompt")


def least_tokens(scope: Scope, node: Compiled, target: Target) -> int:
    """Return the tokens that a call's prompt has whatever its holes hold: where a hole is left out, two tokens may
    become one. The call that it continues was looked at before."""
    element = node.element
    assert isinstance(element, Generate)
    before = None if element.continues is None else scope.find(element.continues)
    own = len(fixed_tokens(node, target)) - len(node.needs)
    return max(1, own) + (before.least if before is not None else 0)


def fixed_tokens(node: Compiled, target: Target) -> list[int]:
    """Return the tokens of a call's text without its holes."""
    if node.prompt is not None:
        return target.encoder.text("".join(node.prompt.literals))
    messages: list[dict[str, Any]] = [
        {"role": role, "content": "".join(content.literals)} for role, content in node.turns
    ]
    return target.encoder.conversation(messages)


def _check_condition(when: Condition) -> None:
    against = when.against
    if when.test in ("empty", "failed"):
        if against is not None:
            raise ProgramError(f"the test {when.test!r} takes no 'against'")
    elif when.test in ("less", "greater"):
        if isinstance(against, bool) or not isinstance(against, (int, float)):
            raise ProgramError(f"the test {when.test!r} needs a number in 'against'")
    elif when.test != "equals" and not isinstance(against, str):
        raise ProgramError(f"the test {when.test!r} needs a text in 'against'")
    elif when.test == "equals" and against is None:
        raise ProgramError("the test 'equals' needs a value in 'against'; use 'empty' for null")
