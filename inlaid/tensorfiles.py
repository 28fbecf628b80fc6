"""Reading and writing of safetensors files. Nothing in a file is trusted: its header is checked against its length
before a tensor is used. Checkpoints and adapters are read through this module. Files are written whole or not at all.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from inlaid.files import atomic_file, open_unblocked, read_bounded, write_atomically

MAX_HEADER_BYTES = 100_000_000
_DTYPES = MappingProxyType({
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
})  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and what would fix it."""


def header_of(file: Path) -> dict[str, Any]:
    """Read a safetensors header and check it against the file's length. CheckpointError: the file is cut or missing."""
    try:
        with open_unblocked(file) as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, file.stat().st_size - 8):
                raise CheckpointError(f"{file} is cut short or is not a safetensors file; fetch it again")
            header: dict[str, Any] = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        whole = 8 + length + int(end)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is named in the index but does not exist; fetch it again") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{file} is cut short or is not a safetensors file; fetch it again") from error
    if file.stat().st_size != whole:
        raise CheckpointError(f"{file} is {file.stat().st_size} bytes, not {whole}; fetch it again")
    return header


class Stages:
    """Reader of tensors into the memory of a device, with a staging buffer for each thread that reads.

    A buffer that is used again needs no new pages; page faults of a mapped file take several times as long as the copy.
    For a GPU the buffer is pinned, so that copies run at the speed of the bus.
    """

    def __init__(self, device: torch.device, size: int = 32 << 20) -> None:
        self.device, self._size = device, size
        self._own = threading.local()
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}

    def read(self, file: Path, name: str, otherwise: Callable[[str], Tensor]) -> Tensor:
        """Read one tensor; `otherwise` reads the types that are not in _DTYPES."""
        if file not in self._headers:
            header = header_of(file)
            whole = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            self._headers[file] = file.stat().st_size - whole, header
        data, header = self._headers[file]
        entry = header[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            return otherwise(name).to(self.device)
        try:
            (start, end), wanted = entry["data_offsets"], math.prod(entry["shape"]) * dtype.itemsize
            if wanted != end - start or start < 0:
                raise CheckpointError(f"{file}: {name} has {end - start} bytes, not the {wanted} of its shape")
            made = torch.empty(entry["shape"], dtype=dtype, device=self.device)
        except TypeError as error:
            raise CheckpointError(f"{file}: what its header says of {name} makes no sense; fetch it again") from error
        if start < end:
            self._fill(made.view(-1).view(torch.uint8), file, data + start)
        return made

    def _fill(self, target: Tensor, file: Path, start: int) -> None:
        if not hasattr(self._own, "stage"):
            self._own.stage = torch.empty(self._size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        stage: Tensor = self._own.stage
        with file.open("rb", buffering=0) as handle:
            handle.seek(start)
            at = 0
            while at < len(target):
                count = handle.readinto(stage[: len(target) - at].numpy().data)
                if not count:
                    raise CheckpointError(f"{file} was cut short while it was read; fetch it again")
                target[at : at + count].copy_(stage[:count])
                at += count


def tensors_in(data: bytearray | memoryview) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in memory as views of `data`.

    `safetensors.torch.load` would copy each tensor and hold the interpreter lock meanwhile. CheckpointError: the bytes
    are no safetensors file, tensors overlap, or bytes are left over.
    """
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise CheckpointError("its header is not whole")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop("__metadata__", None)
        entries = sorted((*entry["data_offsets"], name, entry) for name, entry in header.items())
        at, tensors = 0, {}
        for start, end, name, entry in entries:
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            count = math.prod(shape)
            if start != at or min(shape, default=0) < 0 or end - start != count * dtype.itemsize:
                raise CheckpointError(f"{name} does not lie where it should")
            if 8 + length + end > len(data):
                raise CheckpointError(f"{name} is not whole")
            first, at = 8 + length + start, end
            if count == 0:
                tensors[name] = torch.empty(shape, dtype=dtype)
            elif first % dtype.itemsize:
                tensors[name] = torch.frombuffer(bytearray(data[first : first + end - start]), dtype=dtype).view(shape)
            else:
                tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=first).view(shape)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"its header makes no sense: {error!r}") from None
    if 8 + length + at != len(data):
        raise CheckpointError("it is longer than its header says")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, without a copy of it in memory. OSError: it could not be written."""
    with atomic_file(path) as temporary:
        try:
            save_file({name: tensor.cpu() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            code = int(found[1]) if found else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file of a model folder."""
    try:
        value = json.loads(read_bounded(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; give the folder of a Hugging Face model") from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def tensor_files(folder: Path) -> dict[str, str]:
    """Map tensor names to files, read from the headers of the files."""
    named = folder / "model.safetensors.index.json"
    if named.exists():
        files = _named_in(named)
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file; other formats are not read, convert it first")
    return {name: file for file in files for name in header_of(folder / file)}


def _named_in(index: Path) -> list[str]:
    """Return the files that an index names. CheckpointError: one of them is not beside it."""
    named = read_json(index).get("weight_map")
    values: list[Any] = list(named.values()) if isinstance(named, dict) else [None]
    if not all(isinstance(value, str) and value == Path(value).name for value in values):
        raise CheckpointError(f"{index} must have a weight_map from tensors to names of files beside it")
    return sorted(set(values))


def write_index(folder: Path) -> None:
    """Write model.safetensors.index.json over all the safetensors files of a folder."""
    weight_map: dict[str, str] = {}
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in header_of(file).items():
            weight_map[name] = file.name
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=1).encode())
