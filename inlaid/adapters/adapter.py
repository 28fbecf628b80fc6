"""The nouns of the adapter package: an adapter in host memory, the place of each of its matrices, and the one error
that says why an adapter cannot be used. `peft.py` makes adapters; serving, quantizing and evaluating use them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlaid.kernels.backend import MODULES
from inlaid.model.spec import ModelSpec, module_path

ALIGNMENT = 64  # elements; each matrix starts at a multiple, so that a kernel may load wide words
# Sites of the embedding and the head, which no table of the device holds: rows that are replaced, and low rank.
EMBEDDING_ROWS, HEAD_ROWS, EMBEDDING, HEAD = -4, -3, -2, -1
_MAX_MESSAGE = 2000  # characters of a message: names from files may be of any length


class AdapterError(ValueError):
    """An adapter cannot be served right; the message says why. Text from files is escaped in it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Escape what a line of a log cannot hold, lone surrogates and line ends among it, and cut a text that is too
    long.
    """
    text = text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@dataclass(frozen=True)
class AdapterEntry:
    """One adapted linear: where A [rank, K] and B [N, rank] lie in the adapter's flat tensor, and what follows them:
    the scale and the bias [N] of the linear's outputs, each 0 where there is none.

    Where rows of the embedding or the head are replaced, the rank is 0, and A is `num_rows` rows for `tokens`, or for
    all tokens where none is named."""

    site: int
    a_start: int
    b_start: int
    end: int
    rank: int
    scale: float
    out_scale: int = 0
    out_bias: int = 0
    num_rows: int = 0
    tokens: tuple[int, ...] = ()

    @property
    def fits_one_base(self) -> bool:
        """True if it was computed for the weights of one base, as DoRA's scales are."""
        return self.out_scale > 0

    @property
    def changes_outputs(self) -> bool:
        return bool(self.out_scale or self.out_bias)

    def factors(self, flat: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return A and B as views of `flat`; `shape` is the linear's (outputs, inputs)."""
        outputs, inputs = shape
        a_RK = flat[self.a_start : self.a_start + self.rank * inputs].view(self.rank, inputs)
        b_NR = flat[self.b_start : self.b_start + outputs * self.rank].view(outputs, self.rank)
        return a_RK, b_NR


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter in host memory, in the compute type. `identity` is the hash of its files. For a group of
    devices `flat` holds each one's part, one behind the other, and the entries are those of a part."""

    identity: str
    path: str
    flat: torch.Tensor
    entries: tuple[AdapterEntry, ...]
    check_seconds: float = 0.0  # of reading it: what was not spent on its files

    @property
    def fits_one_base(self) -> bool:
        """True if a part of it was computed for the weights of one base."""
        return any(entry.fits_one_base for entry in self.entries)

    @property
    def rank(self) -> int:
        return max(entry.rank for entry in self.entries)

    @property
    def num_elements(self) -> int:
        """The elements that it takes on a device."""
        return self.entries[-1].end


def site_path(site: int) -> str:
    """Return the module that a site number stands for."""
    if site < 0:
        return "model.embed_tokens" if site in (EMBEDDING, EMBEDDING_ROWS) else "lm_head"
    return module_path(site // len(MODULES), MODULES[site % len(MODULES)])


def site_shape(spec: ModelSpec, site: int) -> tuple[int, int]:
    """Return (outputs, inputs) of what a site number stands for."""
    if site == EMBEDDING:
        return spec.hidden_size, spec.vocab_size
    if site == HEAD:
        return spec.vocab_size, spec.hidden_size
    return spec.module_shape(MODULES[site % len(MODULES)])
