"""The task bank: each task's Hessians on disk beside the checkpoint, so that adding a task runs only that task.

An entry is a folder named by a hash of all that decides its content: base, adapter, data, calibration settings and the
type it was computed in. Another base or other data is another entry; none is ever read for another's sake. A layer's
file is written whole or not at all, so a killed run resumes with what it had.

A Hessian is symmetric: the upper triangle is kept. In "float32" as it is; in "float16" as correlations with a
single-precision diagonal, half the size.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inlaid.tensorfiles import write_tensors

PRECISIONS = ("float32", "float16")
TILE = 256  # rows taken at a time
_ENTRY = re.compile(rf"[0-9a-f]{{32}}-({'|'.join(PRECISIONS)})")
_LAYER = re.compile(r"layer-\d{3,}\.safetensors|\.layer-\d{3,}\.safetensors\.\d+\.tmp")


class BankError(ValueError):
    """An entry cannot be read; the message says which."""


def entry_key(**facts: Any) -> str:
    """Return the name of the entry that these facts decide."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class Bank:
    """All entries below one folder."""

    def __init__(self, path: Path, precision: str = "float32") -> None:
        if precision not in PRECISIONS:
            raise BankError(f"the bank keeps {' or '.join(PRECISIONS)}, not {precision!r}")
        self.path, self.precision = path, precision

    def entry(self, key: str) -> Entry:
        return Entry(self.path / f"{key}-{self.precision}", self.precision)

    def rename(self, key: str, new_key: str) -> None:
        """Let an entry that was kept under another key be found under `new_key`."""
        source, target = self.entry(key).path, self.entry(new_key).path
        if source.is_dir() and not target.exists():
            source.rename(target)

    def keep_only(self, keys: set[str]) -> None:
        """Drop the entries of tasks that are gone. What else lies in the folder is left alone."""
        names = {f"{key}-{self.precision}" for key in keys}
        for folder in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            if folder.name not in names and _ENTRY.fullmatch(folder.name) and folder.is_dir():
                _drop(folder)


class Entry:
    """One task's Hessians, by layer and site."""

    def __init__(self, path: Path, precision: str) -> None:
        self.path, self.precision = path, precision

    def has(self, layer: int) -> bool:
        return self._file(layer).exists()

    def complete(self, num_layers: int) -> bool:
        return all(self.has(layer) for layer in range(num_layers))

    def write(self, layer: int, hessians: dict[str, Tensor], members: dict[str, list[str]], tokens: float) -> None:
        """Keep a layer. What is read back is what every aggregation sees, from the first run on."""
        tensors: dict[str, Tensor] = {}
        for site, hessian_KK in hessians.items():
            tensors |= {f"{site}/{part}": tensor for part, tensor in _encode(hessian_KK, self.precision).items()}
        metadata = {"members": json.dumps(members), "tokens": repr(tokens)}
        self.path.mkdir(parents=True, exist_ok=True)
        write_tensors(self._file(layer), tensors, metadata)

    def members(self, layer: int) -> dict[str, list[str]]:
        """Return the linears of each site."""
        members: dict[str, list[str]] = json.loads(self._metadata(layer)["members"])
        return members

    def tokens(self, layer: int) -> float:
        return float(self._metadata(layer)["tokens"])

    def read(self, layer: int, site: str, device: torch.device) -> Tensor:
        try:
            with safe_open(str(self._file(layer)), framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(f"{site}/")]  # noqa: SIM118 (not a dict)
                parts = {name.rsplit("/", 1)[1]: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise BankError(
                f"{self._file(layer)} cannot be read ({error}); delete it, it will be made again"
            ) from error
        return _decode({part: tensor.to(device) for part, tensor in parts.items()})

    def _metadata(self, layer: int) -> dict[str, str]:
        try:
            with safe_open(str(self._file(layer)), framework="pt") as file:
                metadata: dict[str, str] = file.metadata()
                return metadata
        except (SafetensorError, OSError) as error:
            raise BankError(
                f"{self._file(layer)} cannot be read ({error}); delete it, it will be made again"
            ) from error

    def _file(self, layer: int) -> Path:
        return self.path / f"layer-{layer:03d}.safetensors"


def _drop(folder: Path) -> None:
    """Remove an entry's files, and the folder if nothing else is in it."""
    for file in folder.iterdir():
        if _LAYER.fullmatch(file.name):
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _encode(hessian_KK: Tensor, precision: str) -> dict[str, Tensor]:
    hessian_KK = hessian_KK.float()
    if precision == "float32":
        return {"triangle": _upper(hessian_KK)}
    diagonal_K = hessian_KK.diagonal().clamp(min=0).contiguous()
    deviation_K = diagonal_K.sqrt()
    inverse_K = torch.where(deviation_K > 0, 1 / deviation_K, torch.zeros_like(deviation_K))
    correlations_KK = hessian_KK * inverse_K[:, None] * inverse_K[None, :]
    return {"correlations": _upper(correlations_KK.half()), "diagonal": diagonal_K}


def _decode(parts: dict[str, Tensor]) -> Tensor:
    if "triangle" in parts:
        return _symmetric(parts["triangle"])
    deviation_K = parts["diagonal"].sqrt()
    hessian_KK = _symmetric(parts["correlations"].float()) * torch.outer(deviation_K, deviation_K)
    hessian_KK.diagonal().copy_(parts["diagonal"])
    return hessian_KK


def bank_path(out: Path) -> Path:
    """Return the bank of a quantized folder: it lies beside it, so that replacing the folder does not move it."""
    return out.with_name(out.name + ".bank")


def _upper(matrix_KK: Tensor) -> Tensor:
    """Rows of the upper triangle end to end, without an index the size of the matrix."""
    return torch.cat(
        [
            rows.masked_select(_right_of_diagonal(rows))
            for rows in (matrix_KK[i : i + TILE, i:] for i in _tiles(matrix_KK))
        ]
    )


def _symmetric(triangle: Tensor) -> Tensor:
    size = int(((8 * len(triangle) + 1) ** 0.5 - 1) / 2)
    matrix_KK = triangle.new_empty(size, size)
    start = 0
    for i in _tiles(matrix_KK):
        rows, tile = matrix_KK[i : i + TILE, i:], matrix_KK[i : i + TILE, i : i + TILE]
        count = rows.numel() - len(rows) * (len(rows) - 1) // 2
        rows.masked_scatter_(_right_of_diagonal(rows), triangle[start : start + count])
        start += count
        tile.copy_(tile.triu() + tile.triu(1).T)
        matrix_KK[i + TILE :, i : i + TILE] = matrix_KK[i : i + TILE, i + TILE :].T
    return matrix_KK


def _tiles(matrix_KK: Tensor) -> range:
    return range(0, len(matrix_KK), TILE)


def _right_of_diagonal(rows: Tensor) -> Tensor:
    return torch.ones_like(rows, dtype=torch.bool).triu()
