"""Calls: what a program asks the engine for, one by one, and how their words become tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import msgspec

from inlaid.engine.kv_cache import Key
from inlaid.engine.request import FinishReason, NewRequest, SamplingParams
from inlaid.program.evaluate import Cell
from inlaid.program.nodes import Generate
from inlaid.program.refused import ProgramError
from inlaid.program.target import Target
from inlaid.text.stream import Answer

Words = str | list[dict[str, str]]  # a prompt, or messages
_MARK = "inlaid continues here"  # stands for the answer where a chat template writes it out


@dataclass(eq=False)
class Call:
    """One call: a node's, for one execution and one element."""

    cell: Cell
    element: Generate
    adapter: str | None
    params: SamplingParams
    words: Words
    before: Call | None = None  # that it continues
    id: str = ""
    prompt: list[int] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)  # the conversation up to here
    answer: Answer = field(default_factory=Answer)
    salt: str = ""  # KV is shared among calls of one salt
    keys: list[Key] = field(default_factory=list)  # of the prompt's whole blocks
    equals: Call | None = None  # that was made instead
    started: bool = False

    @property
    def where(self) -> str:
        """The call's name for people."""
        return self.cell.where

    @property
    def number(self) -> int:
        """The execution that it belongs to."""
        return self.cell.frame.path[0]

    @property
    def made(self) -> Call:
        """The call that was made: this one, or the one that it equals."""
        return self.equals or self

    @property
    def most_tokens(self) -> int:
        """The tokens that it may take."""
        return len(self.prompt) + self.params.max_tokens

    @property
    def num_tokens(self) -> int:
        """The tokens that it has taken."""
        return len(self.prompt) + len(self.answer.tokens)

    def request(self, request_id: str, tenant: str, priority: int, now: float) -> NewRequest:
        """Return the engine's request."""
        self.id = request_id
        return NewRequest(
            id=request_id,
            prompt=self.prompt,
            params=self.params,
            adapter=self.adapter,
            tenant=tenant,
            priority=priority,
            deadline=None if self.element.deadline is None else now + self.element.deadline,
            cache_salt=self.salt,
        )


def make_call(cell: Cell, words: Words, target: Target, seed: int) -> Call:
    """Return a call of a node. One that samples without a seed of its own gets one that depends on its place alone, so
    that the answer is the same whatever runs beside it."""
    element = cell.node.element
    assert isinstance(element, Generate)
    params = element.params
    if not params.greedy and params.seed is None:
        place = f"{seed}:{'.'.join(map(str, cell.frame.path))}:{cell.where}"
        params = msgspec.structs.replace(
            params, seed=int.from_bytes(blake2b(place.encode(), digest_size=7).digest(), "big")
        )
    adapter = None if element.adapter is None else target.adapters[element.adapter]
    before = None
    if element.continues is not None:
        continued = cell.frame.find(element.continues)
        assert continued is not None
        before = continued.call
    return Call(cell, element, adapter, params, words, before)


def encode(call: Call, target: Target) -> tuple[list[int], list[dict[str, str]]]:
    """Return the tokens of a call's prompt and its conversation so far. Refused: they do not fit or are not valid."""
    encoder = target.encoder
    before = call.before
    if isinstance(call.words, str):
        if before is None:
            return encoder.text(call.words), []
        return continued_tokens(before) + encoder.text(call.words, add_special_tokens=False), []
    if before is None:
        return encoder.conversation(call.words), call.words
    history = [*before.messages, {"role": "assistant", "content": before.made.answer.text}, *call.words]
    marked = [*before.messages, {"role": "assistant", "content": _MARK}, *call.words]
    template = encoder.tokenizer.template
    first, found, rest = template.render(marked).partition(_MARK)
    if not found or first != template.render(before.messages):
        raise ProgramError(
            f"{call.where} cannot continue {before.where}: the model's chat template rewrites earlier messages; put "
            "the whole conversation into messages instead"
        )
    return continued_tokens(before) + encoder.text(rest, add_special_tokens=False), history


def continued_tokens(before: Call) -> list[int]:
    """Return the tokens that a continuation starts from: prompt and answer, without the token that ended the answer."""
    answer = before.made.answer
    ended = answer.finish_reason is FinishReason.STOP and not isinstance(answer.stop_reason, str)
    return before.prompt + (answer.tokens[:-1] if ended else answer.tokens)


def equality(call: Call) -> tuple[Any, ...]:
    """Return what two calls have in common whose answers must be equal."""
    return call.adapter, tuple(call.prompt), msgspec.json.encode(call.params), call.element.deadline


def salt_of(call: Call, number: int, keep_kv: bool, share_prefixes: bool, secret: str) -> str:
    """Return the salt that lets a call find just the KV that the options allow: all there is (none), that of the calls
    that it continues, or none at all (a salt of its own)."""
    own = f"{secret}-{number}"
    if call.before is None:
        return "" if share_prefixes else own
    if not keep_kv:
        return own
    return call.before.made.salt
