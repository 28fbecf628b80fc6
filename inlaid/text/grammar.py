"""Structured output: the tokens that a constraint allows next, and those that bad words forbid. The engine compiles a
constraint when a request arrives (and refuses bad ones); the runner asks for masks. The only file that imports
llguidance.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from inlaid.engine.refusal import Refusal, Refused
from inlaid.engine.request import Grammar
from inlaid.text.params import check_grammar, num_chars

_MOST_KEPT = 64 << 20  # bytes of compiled constraints, as measured: so many for each, and for each of its characters
_BYTES_EACH, _BYTES_A_CHAR = 100 << 10, 400
_WHITE_SPACE = r"[ ]?|\r?\n[ \t]{0,32}"  # between two marks of JSON: a blank, or a new line and its indentation
_TOO_MUCH = "the constraint is more than the grammar library can take: make it smaller or simpler"


class GrammarState:
    """One request's place in its grammar; follows the request's outputs."""

    def __init__(self, matcher: Any, known_tokens: int, vocab_size: int, end_bits: np.ndarray) -> None:
        self._matcher = matcher
        self._num_consumed = 0
        self._known_words, self._num_words = _words(known_tokens), _words(vocab_size)
        self._end_bits = end_bits
        self.fault: str | None = None  # why the grammar could not go on: its output is not what was asked for
        self._drafted: dict[int, np.ndarray] = {}  # masks behind the guesses of a draft, by how many come before

    def mask(self, outputs: Sequence[int], num_guesses: int = 0) -> np.ndarray:
        """Return, as int32 bits, the tokens that may follow these outputs; when the text is complete, only the end. A
        grammar that outgrows the library's limits ends its own output there, with a fault, and no other request's. With
        `num_guesses`, the mask behind so many guesses of the draft that `prepare` has seen last."""
        if num_guesses:
            return self._drafted[num_guesses]
        self._consume(outputs)
        bits = self._bits()
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]  # what follows is the library's whole state
            self.fault = f"the constraint cannot be followed after {len(outputs)} tokens: {reason}"
            return self._end_bits
        return bits

    def forced(self, outputs: Sequence[int]) -> list[int]:
        """Return the tokens that spell what must follow these outputs."""
        self._consume(outputs)
        return [] if self._matcher.is_error() else list(self._matcher.compute_ff_tokens())

    def prepare(self, outputs: Sequence[int], draft: Sequence[int]) -> int:
        """Return how many guesses at the tokens after these outputs the grammar allows, and keep the masks behind them.
        On a copy of the matcher: what a wrong guess would lead to, even an error, is no state of the answer."""
        self._consume(outputs)
        self._drafted.clear()
        if self._matcher.is_error() or self._matcher.validate_tokens(list(draft[:1])) < 1:
            return 0
        own, self._matcher = self._matcher, self._matcher.deep_copy()
        try:
            for place, guess in enumerate(draft, 1):
                if self._matcher.validate_tokens([guess]) < 1 or not self._matcher.consume_token(guess):
                    return place - 1
                bits = self._bits()
                if self._matcher.is_error():
                    return place - 1
                self._drafted[place] = bits
        finally:
            self._matcher = own
        return len(draft)

    def _consume(self, outputs: Sequence[int]) -> None:
        for token in outputs[self._num_consumed :]:
            self._matcher.consume_token(token)
            self._num_consumed += 1

    def _bits(self) -> np.ndarray:
        bits = np.zeros(self._known_words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return bits[: self._num_words]

    @property
    def complete(self) -> bool:
        """True when the outputs so far may end here."""
        return bool(self._matcher.is_accepting())


def _estimate(grammar: Grammar) -> int:
    """Return about how many bytes a compiled constraint takes."""
    return _BYTES_EACH + _BYTES_A_CHAR * num_chars(grammar)


class GrammarCompiler:
    """Constraints compiled for one tokenizer; compiled ones are kept for the next request."""

    def __init__(self, folder: Path, vocab_size: int, eos_ids: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise _refused("structured output needs llguidance: pip install 'llguidance>=1.3,<2'") from None
        file = folder / "tokenizer.json"
        if not file.exists():
            raise _refused(f"structured output needs {file}, which the model does not have")
        self._library = llguidance
        self._vocab_size = vocab_size
        text = _without_padding(file)
        self._known_tokens = max(vocab_size, _largest_id(text) + 1)
        self._tokenizer = llguidance.LLTokenizer(text, n_vocab=self._known_tokens, eos_token=list(eos_ids) or None)
        self._end_bits = token_bits(tuple(eos_ids), vocab_size)
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._kept_bytes = 0  # of them, by estimate
        self._lock = threading.Lock()  # several threads compile

    def state(self, grammar: Grammar) -> GrammarState:
        """Return a fresh state. Refused: the constraint is not a valid one."""
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._compile(grammar)
        with self._lock:
            self._keep(grammar, matcher)
        return GrammarState(matcher.deep_copy(), self._known_tokens, self._vocab_size, self._end_bits)

    def _keep(self, grammar: Grammar, matcher: Any) -> None:
        """Keep what was compiled, in the place of what nobody asked for longest. What would fill half is not kept."""
        if _estimate(grammar) > _MOST_KEPT // 2:
            return
        if grammar not in self._compiled:
            self._kept_bytes += _estimate(grammar)
        self._compiled[grammar] = matcher
        self._compiled.move_to_end(grammar)
        while self._kept_bytes > _MOST_KEPT:
            oldest, _ = self._compiled.popitem(last=False)
            self._kept_bytes -= _estimate(oldest)

    def _compile(self, grammar: Grammar) -> Any:
        try:
            return self._compile_checked(grammar)
        except Refused as error:
            if "panicked at" not in str(error):
                raise
            raise _refused(_TOO_MUCH) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust; no Exception, and no class that can be imported
                raise
            raise _refused(_TOO_MUCH) from None

    def _compile_checked(self, grammar: Grammar) -> Any:
        matcher_class = self._library.LLMatcher
        try:
            source = _source(matcher_class, grammar)
        except Refused:
            raise
        except ValueError as error:
            raise _refused(f"the constraint is not valid: {error}") from error
        fault = matcher_class.validate_grammar(source, self._tokenizer)
        if fault and not fault.startswith("WARNING"):
            raise _refused(f"the constraint is not valid: {fault}")
        matcher = matcher_class(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise _refused(f"the constraint is not valid: {matcher.get_error()}")
        first = GrammarState(matcher.deep_copy(), self._known_tokens, self._vocab_size, self._end_bits)
        first.mask(())
        if first.fault is not None:  # no first token is possible
            raise _refused(first.fault)
        return matcher


@lru_cache(maxsize=64)
def token_bits(tokens: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Return a mask that allows just these tokens."""
    bits = np.zeros(_words(vocab_size), dtype=np.uint32)
    for token in tokens:
        bits[token // 32] |= np.uint32(1 << token % 32)
    return bits.view(np.int32)


def completing(outputs: Sequence[int], words: Sequence[tuple[int, ...]]) -> set[int]:
    """Return the tokens that would complete one of these words after these outputs."""
    return {word[-1] for word in words if len(word) == 1 or (tuple(outputs[-len(word) + 1 :]) == word[:-1])}


def _refused(message: str) -> Refused:
    return Refused(Refusal(message))


def _words(num_tokens: int) -> int:
    return -(-num_tokens // 32)


def _source(matcher_class: Any, grammar: Grammar) -> str:
    """Return a constraint in the library's own form."""
    given = [name for name in grammar.__struct_fields__ if getattr(grammar, name) not in (None, False)]
    if len(given) != 1:
        names = ", ".join(grammar.__struct_fields__)
        raise _refused(f"a constraint has exactly one of {names}; got {given}")
    check_grammar(grammar)
    if grammar.json_object:
        return str(matcher_class.grammar_from_json_schema(_written('{"type": "object"}')))
    if grammar.json_schema is not None:
        return str(matcher_class.grammar_from_json_schema(_written(grammar.json_schema)))
    if grammar.regex is not None:
        return str(matcher_class.grammar_from_regex(grammar.regex))
    if grammar.lark is not None:
        return str(matcher_class.grammar_from_lark(_as_lark(grammar.lark)))
    if not grammar.choice or not all(grammar.choice):
        raise _refused("a choice needs at least one text, and none of them empty")
    return str(matcher_class.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in grammar.choice)))


def _as_lark(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except Exception as error:
        raise _refused(f"the grammar is neither Lark nor GBNF: {error}") from error


def _written(schema: str) -> str:
    """Return a schema that says how much white space its JSON may have: a model must not fill the answer with it."""
    try:
        decoded = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise _refused(f"the schema is not valid JSON: {error}") from error
    if decoded is True:
        decoded = {}
    if not isinstance(decoded, dict):
        return schema
    how = decoded.get("x-guidance", {})
    if isinstance(how, dict) and not {"whitespace_pattern", "whitespace_flexible"} & how.keys():
        decoded["x-guidance"] = {**how, "whitespace_pattern": _WHITE_SPACE}
    return json.dumps(decoded)


def _without_padding(file: Path) -> str:
    """Return the tokenizer's own file without what would pad or cut the library's probes."""
    text = json.loads(file.read_text(encoding="utf-8"))
    return json.dumps({**text, "padding": None, "truncation": None})


def _largest_id(text: str) -> int:
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*ids, *(token["id"] for token in tokenizer.get("added_tokens") or [])], default=-1)
