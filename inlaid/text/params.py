"""The sampling parameters that make sense. `check` runs for every request of the server and of LLM, so that a bad value
is refused by its name before it reaches the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from inlaid.engine.refusal import Refusal, Refused
from inlaid.engine.request import Grammar, SamplingParams
from inlaid.text.nesting import check_depth

MAX_LOGPROBS = 100
MAX_LOGPROB_ENTRIES = 500_000  # of one request's prompts, or of one answer; each takes some 100 bytes of JSON
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_BIASES = 2048
MAX_BAD_WORDS = 1024  # each word has up to two spellings
MAX_BAD_WORD_CHARS = 65_536  # of all bad words together
MAX_GRAMMAR_CHARS = 200_000
MAX_PRIORITY = 2**31  # either way
_HOW = "x-guidance"  # where a schema says how its JSON is written

# name: (least, most); both allowed
RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "temperature": (0, 100),
        "top_p": (0, 1),
        "top_k": (-1, 2**31 - 1),
        "min_p": (0, 1),
        "presence_penalty": (-2, 2),
        "frequency_penalty": (-2, 2),
        "repetition_penalty": (0.01, 100),  # logits are divided by it, and stay finite
        "max_tokens": (0, 2**31 - 1),
        "min_tokens": (0, 2**31 - 1),
        "logprobs": (0, MAX_LOGPROBS),
        "prompt_logprobs": (0, MAX_LOGPROBS),
        "seed": (-(2**63), 2**63 - 1),
    }
)
POSITIVE = ("top_p",)  # zero is not allowed


def check(params: SamplingParams, vocab_size: int) -> None:
    """Refuse the first value that makes no sense."""
    for name, (least, most) in RANGES.items():
        _check_range(name, getattr(params, name), least, most)
    if params.min_tokens > params.max_tokens:
        raise _refused("min_tokens", f"min_tokens {params.min_tokens} is above max_tokens {params.max_tokens}")
    _check_stops(params)
    if len(params.logit_bias) > MAX_BIASES:
        raise _refused("logit_bias", f"logit_bias has {len(params.logit_bias)} entries; at most {MAX_BIASES}")
    for name in ("stop_token_ids", "allowed_token_ids"):
        if (count := len(getattr(params, name))) > vocab_size:
            raise _refused(name, f"{name} has {count} tokens; the vocabulary has {vocab_size}")
    check_tokens("stop_token_ids", params.stop_token_ids, vocab_size)
    check_tokens("logit_bias", params.logit_bias, vocab_size)
    check_tokens("allowed_token_ids", params.allowed_token_ids, vocab_size)
    if params.grammar is not None:
        check_grammar(params.grammar)
    if params.allowed_token_ids and params.grammar is not None:
        raise _refused("allowed_token_ids", "allowed_token_ids and a grammar exclude each other")
    if len(params.bad_words) > MAX_BAD_WORDS or not all(params.bad_words):
        raise _refused("bad_words", f"bad_words must be at most {MAX_BAD_WORDS}, each of at least one token")
    for word in params.bad_words:
        check_tokens("bad_words", word, vocab_size)
    if params.allowed_token_ids and {(token,) for token in params.allowed_token_ids} <= set(params.bad_words):
        raise _refused("bad_words", "bad_words leave none of the allowed_token_ids")
    for token, bias in params.logit_bias.items():
        if not -100 <= bias <= 100:
            raise _refused("logit_bias", f"logit_bias of token {token} is {bias}; it must be from -100 to 100")


def _check_range(name: str, value: float | None, least: float, most: float) -> None:
    if value is None:
        return
    if not least <= value <= most or (value == 0 and name in POSITIVE):  # NaN is in no range
        allowed = f"above {least} and at most {most}" if name in POSITIVE else f"from {least} to {most}"
        raise _refused(name, f"{name} is {value}; it must be {allowed}")


def _check_stops(params: SamplingParams) -> None:
    if len(params.stop) > MAX_STOPS:
        raise _refused("stop", f"stop has {len(params.stop)} strings; at most {MAX_STOPS}")
    for stop in params.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise _refused("stop", f"a stop string has {len(stop)} characters; it must have 1 to {MAX_STOP_CHARS}")


def check_tokens(name: str, tokens: Collection[int], vocab_size: int) -> None:
    """Refuse token ids that the vocabulary does not have."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        token = next(token for token in tokens if not 0 <= token < vocab_size)
        raise _refused(name, f"{name} has token {token}; the vocabulary has 0 to {vocab_size - 1}")


def num_chars(grammar: Grammar) -> int:
    """Count the characters of a constraint."""
    texts = (grammar.json_schema, grammar.regex, grammar.lark, *(grammar.choice or ()))
    return sum(len(text) + 1 for text in texts if text is not None)


def check_grammar(grammar: Grammar) -> None:
    """Refuse a constraint that is too long to be compiled."""
    if num_chars(grammar) > MAX_GRAMMAR_CHARS:
        raise Refused(Refusal(f"the constraint is longer than {MAX_GRAMMAR_CHARS} characters"))


def schema_grammar(name: str, schema: str | dict[str, Any], white_space: str | None = None) -> Grammar:
    """Return the constraint to a JSON schema, given as text or decoded. `white_space` is the pattern of what may stand
    between two marks of the JSON; empty: nothing; None: the grammar's default, or what the schema says itself."""
    check_depth(name, schema)
    if white_space is not None:
        schema = {**_decoded(name, schema), _HOW: _written(white_space)}
    return Grammar(json_schema=schema if isinstance(schema, str) else msgspec.json.encode(schema).decode())


def _written(white_space: str) -> dict[str, Any]:
    return {"whitespace_pattern": white_space} if white_space else {"whitespace_flexible": False}


def _decoded(name: str, schema: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(schema, dict):
        return schema
    try:
        return msgspec.json.decode(schema, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise _refused(name, f"{name} is not a JSON schema that is an object: {error}") from error


def answer_params(params: SamplingParams, answer: int) -> SamplingParams:
    """Return the parameters of one of n answers: each has a seed of its own, the first the one asked for."""
    if params.greedy or params.seed is None or answer == 0:
        return params
    seed = (params.seed + answer + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(params, seed=seed)


def _refused(param: str, message: str) -> Refused:
    return Refused(Refusal(message, param=param))
