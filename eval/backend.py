"""Questions to a model and its answers, the same for every backend: the engine, a live server by URL, or transformers
and peft as the oracle. `answer` drives any of them; they are in `engine`, `server` and `oracle`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from inlaid.kv_format import AUTO


@dataclass(frozen=True)
class Ask:
    """Continue these tokens greedily with this adapter (None: the base alone)."""

    prompt: tuple[int, ...]
    adapter: str | None
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graded:
    """For each token of a given continuation: its log probability, and whether greedy decoding would choose it."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]

    @property
    def accepted(self) -> int:
        """Return how many tokens greedy decoding has in common with the continuation."""
        return next((index for index, chosen in enumerate(self.greedy) if not chosen), len(self.greedy))


class Backend(Protocol):
    """One base with its adapters. Tokens in, tokens out: every backend gets the same prompts."""

    drafts: bool
    """Set where it can go on from given tokens exactly, so that the reference may serve as a draft."""
    refused: dict[str, str]
    """Adapters that could not be loaded, and why."""

    def generate(self, asks: Sequence[Ask]) -> list[list[int] | str]:
        """Return what greedy decoding says without the token that ended it: tokens, or text if tokens are not known."""
        ...

    def grade(self, asks: Sequence[Ask], continuations: Sequence[Sequence[int]]) -> list[Graded]:
        """Grade each continuation's tokens under teacher forcing; max_tokens and stop play no part."""
        ...

    def close(self) -> None: ...


OpenBackend = Callable[[Path, Mapping[str, Path], str], Backend]
"""A base's folder, adapters by name and the form of keys and values (`inlaid/kv_format.py`) to a backend."""


class BackendError(RuntimeError):
    """The model cannot be run; the message says what would help."""


def check_full(kv: str, name: str) -> None:
    """Refuse keys and values of 8 bits for a backend that has none."""
    if kv != AUTO.name:
        raise BackendError(f"the backend {name} has no {kv} keys and values; leave out variants that end with +kv-{kv}")
