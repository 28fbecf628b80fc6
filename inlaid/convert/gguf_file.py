"""The header of a GGUF file, and its tensors as fp32. The header is read here, because the package `gguf` takes
twenty seconds for the vocabulary of a small model; its kernels dequantize the tensors, whatever their type.

    magic "GGUF", version, number of tensors, number of fields
    fields   name, type, value
    tensors  name, shape (innermost first), type, offset from the end of the header
    data     at multiples of `general.alignment`
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

_NUMBERS = MappingProxyType({0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"})
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 24  # fields, tensors and elements of an array
_MAX_TENSOR_BYTES = 1 << 36


class ConvertError(ValueError):
    """A GGUF file that cannot become a model folder; the message says why and what would do."""


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's place in the file. The shape is outermost first, as in torch."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFFile:
    """An open GGUF file: `fields` by name, `tensors` by name, and `read`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ConvertError(f"{path} is not a GGUF file; fetch it again, or give a Hugging Face folder")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, OverflowError, ValueError, TypeError, RecursionError) as error:
            if isinstance(error, ConvertError):
                raise
            raise ConvertError(f"{path} is cut short or damaged: {error}; fetch it again") from error

    def _read_header(self) -> None:
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise ConvertError(f"{self.path} has version {version} of GGUF; versions 2 and 3 are read")
        num_tensors, num_fields = self._count(), self._count()
        self.fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self._string()
            self.fields[name] = self._value(self._number("I"))
        places = [self._place() for _ in range(num_tensors)]
        alignment = int(self.fields.get("general.alignment", 32))
        if alignment < 1:
            raise ConvertError(f"{self.path}: general.alignment is {alignment}; fetch the file again")
        start = -(-self._at // alignment) * alignment
        self.tensors = {each.name: GGUFTensor(each.name, each.shape, each.kind, start + each.offset) for each in places}

    def read(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return a tensor, dequantized to fp32."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        tensor = self.tensors[name]
        try:
            kind = GGMLQuantizationType(tensor.kind)
            shape = quant_shape_to_byte_shape(tensor.shape, kind)
        except (ValueError, KeyError) as error:
            raise ConvertError(f"{self.path}: {name} has a type that `gguf` does not know: {error}") from error
        size = math.prod(shape)
        if not 0 < size <= _MAX_TENSOR_BYTES or tensor.offset + size > len(self._data):
            raise ConvertError(f"{self.path} is cut short: it ends before {name} does; fetch it again")
        if kind == GGMLQuantizationType.F32 or kind == GGMLQuantizationType.F16:
            stored = np.float32 if kind == GGMLQuantizationType.F32 else np.float16
            flat = np.frombuffer(self._data, stored, math.prod(tensor.shape), tensor.offset)
            return flat.reshape(tensor.shape).astype(np.float32)
        raw = np.frombuffer(self._data, np.uint8, size, tensor.offset).reshape(shape)
        try:
            return np.asarray(dequantize(raw, kind), np.float32).reshape(tensor.shape)
        except NotImplementedError as error:
            raise ConvertError(f"{self.path}: `gguf` cannot dequantize {name}, of type {kind.name}") from error

    # the header, piece by piece

    def _number(self, code: str) -> Any:
        [value] = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _count(self) -> int:
        count = int(self._number("Q"))
        if count > _MAX_COUNT:
            raise ConvertError(f"{self.path} is damaged: it counts {count} entries; fetch it again")
        return count

    def _string(self) -> str:
        length = int(self._number("Q"))
        if self._at + length > len(self._data):
            raise ConvertError(f"{self.path} is cut short; fetch it again")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._number("I"), self._count()
            if inner in _NUMBERS:
                return self._numbers(inner, count)
            return [self._value(inner) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ConvertError(f"{self.path} has a field of the unknown type {kind}; fetch it again")
        return self._number(_NUMBERS[kind])

    def _numbers(self, kind: int, count: int) -> list[Any]:
        code = f"<{count}{_NUMBERS[kind]}"
        values = list(struct.unpack_from(code, self._data, self._at))
        self._at += struct.calcsize(code)
        return values

    def _place(self) -> GGUFTensor:
        name, num_dims = self._string(), self._number("I")
        if num_dims > 4:
            raise ConvertError(f"{self.path}: {name} has {num_dims} dimensions; fetch the file again")
        shape = tuple(int(self._number("Q")) for _ in range(num_dims))[::-1]
        return GGUFTensor(name, shape, self._number("I"), int(self._number("Q")))
