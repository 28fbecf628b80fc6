"""The model that a program is compiled for, as far as compiling needs to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from inlaid.text.encoder import RequestEncoder


@dataclass(frozen=True)
class Target:
    """A model's tokenizer and limits, and the adapters that calls may name."""

    encoder: RequestEncoder
    block_size: int  # tokens of a KV block
    adapters: Mapping[str, str | None]  # names that calls may use: the adapter of each, None for the base
