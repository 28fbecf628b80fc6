"""Settings of a program: the short-cuts that its execution takes, and the bounds that it stays within."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Short-cuts. None of them changes a token of a result; each can be switched off to measure what it is worth."""

    fuse_decode: bool = True  # calls of all adapters share batches; off: one adapter's calls at a time
    merge_equal: bool = True  # equal calls whose answer is determined are made once
    drop_dead: bool = True  # only what the outputs need is computed, and of a branch the side that is taken
    keep_kv: bool = True  # a continuation starts from the KV of the call that it continues
    share_prefixes: bool = True  # a call waits while another of its adapter computes their common prefix
    max_in_flight: Annotated[int, Meta(ge=0)] = 0  # most calls at a time; 0: any number; 1: one after another


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on one execution; 0: none."""

    max_calls: int = 0  # calls of the model
    max_tokens: int = 0  # tokens of all prompts and answers; an answer counts with its max_tokens until it ends
    max_values: int = 0  # values computed, of nodes and of elements of lists
    max_chars: int = 0  # characters of all texts made by nodes
    seconds: float = 0.0  # after which what is not done fails
