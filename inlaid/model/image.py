"""A weight image: a model's weights in their final layout, in one file that other engines of the machine map instead of
reading the checkpoint and packing it. The file lies in memory and does not change once it is written.

Layout: the header's length in 8 bytes; the header, as msgpack; the tensors, each at a multiple of `ALIGNMENT` bytes
behind the header. Weights on a GPU are not written.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import torch

from inlaid.kernels.backend import MODULES, Gemm
from inlaid.kernels.cpu import DensePacked
from inlaid.kernels.packed import CodesPacked, HalfPacked
from inlaid.model.spec import module_path
from inlaid.model.transformer import SIBLINGS, Transformer

ALIGNMENT = 64
HEAD = "lm_head"
_LENGTH = struct.Struct("<Q")
_LAYOUTS: Mapping[str, type[Any]] = MappingProxyType(
    {layout.__name__: layout for layout in (CodesPacked, DensePacked, HalfPacked)}
)


class ImageError(ValueError):
    """A weight image cannot be written or used; the message says why."""


class ImageKey(msgspec.Struct, frozen=True):
    """The facts that an image and the engine that takes it must have in common."""

    inlaid: str
    base: str  # version
    dtype: str
    linear_backend: str


class Place(msgspec.Struct, frozen=True):
    """A tensor in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes behind the header


class Part(msgspec.Struct, frozen=True):
    """A packed weight: its backend and the fields of its layout."""

    backend: str
    layout: str
    values: dict[str, Place | int | None]


class Header(msgspec.Struct, frozen=True):
    """The content of a file. `adapters` are records of what writes them, whose tensors `beside` names."""

    key: ImageKey
    tensors: dict[str, Place]
    parts: dict[str, list[Part]]
    beside: dict[str, Place] = {}
    adapters: bytes = b""


class _Layout:
    """Tensors, one behind the other."""

    def __init__(self) -> None:
        self.size = 0
        self.tensors: list[tuple[int, torch.Tensor]] = []

    def add(self, tensor: torch.Tensor) -> Place:
        if tensor.device.type != "cpu":
            raise ImageError(f"weights on {tensor.device} are not written to an image")
        start = self.size
        self.tensors.append((start, tensor))
        self.size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        return Place(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start)

    def part(self, backend: Gemm, packed: Any) -> Part:
        layout = type(packed).__name__
        if _LAYOUTS.get(layout) is not type(packed):
            raise ImageError(f"weights of the backend {backend.name!r} are not written to an image")
        values = {each.name: getattr(packed, each.name) for each in fields(packed)}
        placed = {k: self.add(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        return Part(backend.name, layout, placed)


def write_image(
    path: str,
    key: ImageKey,
    model: Transformer,
    adapters: bytes = b"",
    beside: Mapping[str, torch.Tensor] | None = None,
) -> int:
    """Write a model into a file that exists and is empty; return its bytes. ImageError: it cannot be written."""
    layout = _Layout()
    tensors, parts = _contents(model)
    header = Header(
        key,
        {name: layout.add(tensor) for name, tensor in tensors.items()},
        {name: [layout.part(*part) for part in made] for name, made in parts.items()},
        {name: layout.add(tensor) for name, tensor in (beside or {}).items()},
        adapters,
    )
    encoded = msgspec.msgpack.encode(header)
    first = _first(len(encoded))
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.truncate(descriptor, first + layout.size)
        for start, tensor in layout.tensors:
            _write_all(descriptor, tensor.contiguous().view(-1).view(torch.uint8).numpy().data, first + start)
        _write_all(descriptor, memoryview(encoded), _LENGTH.size)
        os.pwrite(descriptor, _LENGTH.pack(len(encoded)), 0)  # last: a reader sees a whole file or an empty header
    finally:
        os.close(descriptor)
    return first + layout.size


def _contents(model: Transformer) -> tuple[dict[str, torch.Tensor], dict[str, Sequence[tuple[Gemm, Any]]]]:
    """Return a model's tensors and packed weights by the names that a checkpoint has for them; siblings that are fused
    are called by the first."""
    tensors = {"model.embed_tokens.weight": model.embedding.weight_VD, "model.norm.weight": model.norm.weight_D}
    parts: dict[str, Sequence[tuple[Gemm, Any]]] = {HEAD: [(model.head.linear, model.head.packed)]}
    for layer, block in enumerate(model.blocks):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = block.attention_norm.weight_D
        tensors[f"{prefix}.post_attention_layernorm.weight"] = block.mlp_norm.weight_D
        if (norms := block.attention.head_norms) is not None:
            tensors[f"{prefix}.self_attn.q_norm.weight"] = norms.q_weight_C
            tensors[f"{prefix}.self_attn.k_norm.weight"] = norms.k_weight_C
        linears = (block.attention.qkv, block.attention.output, block.gate_up, block.down)
        for (first, last), linear in zip(SIBLINGS, linears, strict=True):
            paths = [module_path(layer, module) for module in MODULES[first:last]]
            parts[paths[0]] = linear.parts
            if linear.bias_N is not None:
                assert linear.site is not None
                starts = accumulate(linear.site.widths, initial=0)
                for path, start, width in zip(paths, starts, linear.site.widths, strict=False):
                    tensors[f"{path}.bias"] = linear.bias_N[start : start + width]
    return tensors, parts


def _first(header: int) -> int:
    """Return where the tensors begin."""
    return -(-(_LENGTH.size + header) // ALIGNMENT) * ALIGNMENT


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


class WeightImage:
    """An image that is mapped. Its tensors are views of the mapping; a write to one would be private to this process.
    It takes a checkpoint's place for the loader of weights."""

    linears: tuple[str, ...] = ()

    def __init__(self, path: str) -> None:
        """Map a file. OSError, ImageError: it cannot be used."""
        self.path = Path(path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size).ljust(_LENGTH.size, b"\0"))
            if not 0 < length <= size - _LENGTH.size:
                raise ImageError(f"{path} is not a whole weight image")
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        try:
            self._header = msgspec.msgpack.decode(mapped[_LENGTH.size : _LENGTH.size + length], type=Header)
        except msgspec.MsgspecError as error:
            raise ImageError(f"{path} is not a weight image: {error}") from error
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)[_first(length) :]

    @property
    def key(self) -> ImageKey:
        return self._header.key

    @property
    def dense(self) -> Iterable[str]:
        """Names of the tensors that are not packed."""
        return self._header.tensors.keys()

    @property
    def adapters(self) -> bytes:
        return self._header.adapters

    def __contains__(self, name: str) -> bool:
        return name in self._header.tensors

    def tensor(self, name: str) -> torch.Tensor:
        return self._view(self._header.tensors[name])

    def beside(self, name: str) -> torch.Tensor:
        """Return a tensor that is no part of the model."""
        return self._view(self._header.beside[name])

    def parts(self, path: str, backends: Iterable[Gemm]) -> list[tuple[Gemm, Any]]:
        """Return the packed weights of siblings by the first's path, with their backends among those given."""
        named = {backend.name: backend for backend in backends}
        made: list[tuple[Gemm, Any]] = []
        for part in self._header.parts[path]:
            if part.backend not in named:
                raise ImageError(f"{path} was packed for the backend {part.backend!r}, which is not used here")
            values = {k: self._view(v) if isinstance(v, Place) else v for k, v in part.values.items()}
            made.append((named[part.backend], _LAYOUTS[part.layout](**values)))
        return made

    def _view(self, place: Place) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, place.dtype)
        size = dtype.itemsize
        for length in place.shape:
            size *= length
        return self._bytes[place.start : place.start + size].view(dtype).view(place.shape)
