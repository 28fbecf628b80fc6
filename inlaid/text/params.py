"""Which sampling parameters make sense. The server calls `check` for every request and so does LLM, so that a bad value
is refused with its name before it reaches the engine.
"""

from __future__ import annotations

import math

from inlaid.engine.request import SamplingParams

MAX_LOGPROBS = 100
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_BIASES = 2048
MAX_BAD_WORDS = 1024  # each word has up to two spellings

# name: (least, most); both allowed
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, 100),
    "max_tokens": (0, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "seed": (-(2**63), 2**63 - 1),
}
POSITIVE = ("top_p", "repetition_penalty")  # zero is not allowed


class ParamError(ValueError):
    """A parameter is out of range; `param` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def check(params: SamplingParams, vocab_size: int) -> None:
    """Raise ParamError for the first value that makes no sense."""
    for name, (least, most) in RANGES.items():
        _check_range(name, getattr(params, name), least, most)
    if params.min_tokens > params.max_tokens:
        raise ParamError("min_tokens", f"min_tokens {params.min_tokens} is above max_tokens {params.max_tokens}")
    _check_stops(params)
    _check_tokens("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_tokens("logit_bias", params.logit_bias, vocab_size)
    _check_tokens("allowed_token_ids", params.allowed_token_ids, vocab_size)
    if params.allowed_token_ids and params.grammar is not None:
        raise ParamError("allowed_token_ids", "allowed_token_ids and a grammar exclude each other")
    if len(params.bad_words) > MAX_BAD_WORDS or not all(params.bad_words):
        raise ParamError("bad_words", f"bad_words must be at most {MAX_BAD_WORDS}, each of at least one token")
    for word in params.bad_words:
        _check_tokens("bad_words", word, vocab_size)
    if params.allowed_token_ids and {(token,) for token in params.allowed_token_ids} <= set(params.bad_words):
        raise ParamError("bad_words", "bad_words leave none of the allowed_token_ids")
    if len(params.logit_bias) > MAX_BIASES:
        raise ParamError("logit_bias", f"logit_bias has {len(params.logit_bias)} entries; at most {MAX_BIASES}")
    for token, bias in params.logit_bias.items():
        if not -100 <= bias <= 100:
            raise ParamError("logit_bias", f"logit_bias of token {token} is {bias}; it must be from -100 to 100")


def _check_range(name: str, value: float | None, least: float, most: float) -> None:
    if value is None:
        return
    if not math.isfinite(value) or not least <= value <= most or (value == 0 and name in POSITIVE):
        allowed = f"above {least} and at most {most}" if name in POSITIVE else f"from {least} to {most}"
        raise ParamError(name, f"{name} is {value}; it must be {allowed}")


def _check_stops(params: SamplingParams) -> None:
    if len(params.stop) > MAX_STOPS:
        raise ParamError("stop", f"stop has {len(params.stop)} strings; at most {MAX_STOPS}")
    for stop in params.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ParamError("stop", f"a stop string has {len(stop)} characters; it must have 1 to {MAX_STOP_CHARS}")


def _check_tokens(name: str, tokens: object, vocab_size: int) -> None:
    for token in tokens:  # type: ignore[attr-defined]
        if not 0 <= token < vocab_size:
            raise ParamError(name, f"{name} has token {token}; the vocabulary has 0 to {vocab_size - 1}")
