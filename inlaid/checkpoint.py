"""The contract between quantizing and serving: GPTQ tensors on disk, read and written in this module alone.

The format is AutoGPTQ's. A linear of K inputs and N outputs, quantized to `bits` in G groups of inputs, is
    qweight  int32  [K * bits / 32, N]   codes, packed along K
    qzeros   int32  [G, N * bits / 32]   zero points, packed along N
    scales   fp16   [G, N]
    g_idx    int32  [K]                  group of each input
    weight_KN[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])
Codes are a contiguous little-endian bit stream (32 codes of 3 bits fill three words). Files store zero points in one of
two ways: v1 ("gptq") stores zero - 1, v2 ("gptq_v2") the zero itself. In memory there is only the true zero; where a
v1 file stores all ones, the zero is 0 (arithmetic modulo 2**bits, as AutoGPTQ's own reader has it).

Legend: K inputs, N outputs, G groups.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inlaid import __version__
from inlaid.files import hash_file
from inlaid.progress import Bar
from inlaid.tensorfiles import CheckpointError, Stages, read_json, tensor_files

BITS = (2, 3, 4, 8)
ZERO_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class QuantSpec:
    """Format of a quantized linear. A group size of -1 means one group for all inputs."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise CheckpointError(f"{self.bits} bits: only {', '.join(map(str, BITS))} are supported")
        if self.group_size != -1 and self.group_size < 1:
            raise CheckpointError(f"group size {self.group_size}: give a positive number, or -1 for whole columns")

    def groups(self, inputs: int) -> int:
        """Return the number of groups of a linear with `inputs` inputs."""
        return 1 if self.group_size == -1 else -(-inputs // self.group_size)

    def why_not(self, inputs: int, outputs: int) -> str | None:
        """Return the reason for which a linear of this shape cannot be stored in this format, or None."""
        for size, what in ((inputs, "inputs"), (outputs, "outputs")):
            if size * self.bits % 32:
                return f"{size} {what} of {self.bits} bits do not fill whole 32-bit words"
        if self.group_size != -1 and inputs % self.group_size:
            return f"{inputs} inputs do not divide into groups of {self.group_size}"
        return None


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """One quantized linear, with true zeros. The spec describes these tensors, whatever a file's header said."""

    spec: QuantSpec
    qweight: Tensor  # int32 [K * bits / 32, N]
    qzeros: Tensor  # int32 [G, N * bits / 32]
    scales: Tensor  # fp16 [G, N]
    g_idx: Tensor  # int32 [K]

    def __post_init__(self) -> None:
        bits, groups = self.spec.bits, self.scales.shape[0]
        inputs, outputs = self.g_idx.shape[0], self.scales.shape[1]
        want = {
            "qweight": ((inputs * bits // 32, outputs), torch.int32, self.qweight),
            "qzeros": ((groups, outputs * bits // 32), torch.int32, self.qzeros),
            "scales": ((self.spec.groups(inputs), outputs), torch.float16, self.scales),
            "g_idx": ((inputs,), torch.int32, self.g_idx),
        }
        for name, (shape, dtype, tensor) in want.items():
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CheckpointError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape} as {self.spec} asks"
                )

    @property
    def bits(self) -> int:
        return self.spec.bits

    @property
    def group_size(self) -> int:
        return self.spec.group_size

    @property
    def in_features(self) -> int:
        return self.g_idx.shape[0]

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]


def pack(codes: Tensor, bits: int, dim: int = 0) -> Tensor:
    """Pack codes of `bits` bits into int32 words along `dim` (0 or 1), least significant bits first."""
    codes = codes.movedim(dim, 0).to(torch.int64)
    if codes.shape[0] * bits % 32:
        raise CheckpointError(f"{codes.shape[0]} codes of {bits} bits do not fill whole 32-bit words")
    per, words = _period(bits)
    blocks = codes.reshape(-1, per, codes.shape[1]) & (2**bits - 1)
    out = torch.zeros(blocks.shape[0], words, codes.shape[1], dtype=torch.int64, device=codes.device)
    for i in range(per):
        word, shift = divmod(i * bits, 32)
        out[:, word] |= (blocks[:, i] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            out[:, word + 1] |= blocks[:, i] >> (32 - shift)
    out = torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)
    return out.reshape(-1, codes.shape[1]).movedim(0, dim).contiguous()


def unpack(packed: Tensor, bits: int, dim: int = 0) -> Tensor:
    """Unpack int32 words into uint8 codes along `dim`: the inverse of `pack`."""
    packed = packed.movedim(dim, 0)
    per, words = _period(bits)
    blocks = packed.reshape(-1, words, packed.shape[1])
    mask = 2**bits - 1
    out = torch.empty(blocks.shape[0], per, packed.shape[1], dtype=torch.uint8, device=packed.device)
    for i in range(per):
        word, shift = divmod(i * bits, 32)
        value = blocks[:, word] >> shift  # sign bits come in from above; the mask drops them
        if shift + bits > 32:
            value = (value & ((1 << (32 - shift)) - 1)) | (blocks[:, word + 1] << (32 - shift))
        out[:, i] = (value & mask).to(torch.uint8)
    return out.reshape(-1, packed.shape[1]).movedim(0, dim).contiguous()


def holds_only(packed: Tensor, value: int, bits: int) -> bool:
    """Return True if every code of words packed along dim 1 is `value`, without unpacking them."""
    _, words = _period(bits)
    return bool((packed.reshape(packed.shape[0], -1, words) == _words_of(value, bits).to(packed.device)).all())


def _words_of(value: int, bits: int) -> Tensor:
    """Return the shortest run of whole words whose codes are all `value`."""
    return pack(torch.full((_period(bits)[0], 1), value), bits)[:, 0]


def _period(bits: int) -> tuple[int, int]:
    """Return the shortest run of whole codes that fills whole words: (codes, words)."""
    return (32, bits) if 32 % bits else (32 // bits, 1)


def dequantize(linear: QuantizedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight as [K, N]; each element is the exact product, rounded once to `dtype`."""
    codes_KN = unpack(linear.qweight, linear.bits).to(torch.int16)
    zeros_GN = unpack(linear.qzeros, linear.bits, dim=1).to(torch.int16)
    group_K = linear.g_idx.long()
    return (linear.scales.float()[group_K] * (codes_KN - zeros_GN[group_K])).to(dtype)


def from_codes(
    codes_KN: Tensor, zeros_GN: Tensor, scales_GN: Tensor, g_idx_K: Tensor, group_size: int, bits: int
) -> QuantizedLinear:
    """Pack the solver's result. Zeros are true zeros; the spec follows from the tensors."""
    groups = scales_GN.shape[0]
    in_order = torch.arange(len(g_idx_K), device=g_idx_K.device) // (len(g_idx_K) if groups == 1 else group_size)
    spec = QuantSpec(
        bits=bits,
        group_size=group_size,
        symmetric=bool((zeros_GN == 2 ** (bits - 1)).all()),
        act_order=not torch.equal(in_order, g_idx_K.long()),
    )
    return QuantizedLinear(
        spec, pack(codes_KN, bits), pack(zeros_GN, bits, dim=1), scales_GN.half(), g_idx_K.to(torch.int32)
    )


def shift_zeros(qzeros: Tensor, bits: int, by: int) -> Tensor:
    """Add `by` to every packed zero, modulo 2**bits."""
    return pack(unpack(qzeros, bits, dim=1).to(torch.int64) + by, bits, dim=1)


def to_tensors(name: str, linear: QuantizedLinear, zero_format: str = "gptq") -> dict[str, Tensor]:
    """Return the four tensors of a linear as a file stores them, by name."""
    stored = linear.qzeros if zero_format == "gptq_v2" else shift_zeros(linear.qzeros, linear.bits, -1)
    parts = {"qweight": linear.qweight, "qzeros": stored, "scales": linear.scales, "g_idx": linear.g_idx}
    # Cloned: linears solved together share g_idx, and a file must not.
    return {
        f"{name}.{part}": tensor.cpu().clone(memory_format=torch.contiguous_format) for part, tensor in parts.items()
    }


class Checkpoint:
    """A model folder, quantized or not, in one file or in shards.

    A tensor is read when it is asked for, into the memory of `device` if one is given (`g_idx` stays on the CPU).
    Several threads may read.
    """

    def __init__(self, path: str | Path, device: torch.device | None = None) -> None:
        self.path = Path(path)
        self._stages = None if device is None else Stages(device)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self.quantization = _quantization(self.path, self.config)
        self._file_of = tensor_files(self.path)
        self._handles: dict[str, Any] = {}
        names = self._file_of
        self.linears: tuple[str, ...] = tuple(n[: -len(".qweight")] for n in names if n.endswith(".qweight"))
        """Names of the quantized linears, e.g. "model.layers.0.self_attn.q_proj"."""
        parts = {f"{n}.{part}" for n in self.linears for part in ("qweight", "qzeros", "scales", "g_idx")}
        self.dense: tuple[str, ...] = tuple(n for n in names if n not in parts)
        """Names of every other tensor: embeddings, norms, biases, and linears left in 16 bit."""
        if self.linears and self.quantization is None:
            raise CheckpointError(
                f"{self.path} holds quantized tensors but neither config.json has a quantization_config nor is there a "
                "quantize_config.json; copy it from where the checkpoint came from"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def is_quantized(self) -> bool:
        return bool(self.linears)

    @property
    def zero_format(self) -> str:
        """Zero format that the metadata names; `linear` trusts the stored values first where they are unambiguous."""
        return str((self.quantization or {}).get("checkpoint_format") or "gptq")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def tensor(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """Read a tensor as it is stored, or a part of it and nothing else."""
        handle, file = self._handle(name), self.path / self._file_of[name]
        try:
            if part is not None:
                piece: Tensor = handle.get_slice(name)[part]
                return piece if self._stages is None else piece.to(self._stages.device)
            if self._stages is None:
                tensor: Tensor = handle.get_tensor(name)
                return tensor
            return self._stages.read(file, name, handle.get_tensor)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from error

    def _handle(self, name: str) -> Any:
        """Return the open file that holds a tensor."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        file = self._file_of[name]
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(str(self.path / file), framework="pt")
            return self._handles[file]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file} cannot be read ({error}); fetch it again") from error

    def linear(self, name: str, read: Callable[[str], Tensor] | None = None) -> QuantizedLinear:
        """Read a quantized linear, and resolve its zeros. `read` reads parts of its four tensors that make a linear
        too, in the place of `tensor`."""
        read = read or self.tensor
        if f"{name}.qweight" not in self._file_of:
            raise CheckpointError(f"{self.path}: {name} is not quantized in this checkpoint")
        assert self.quantization is not None
        qweight, stored, scales = (read(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
        group_size = int(self.quantization["group_size"])
        bits, g_idx = self._bits_and_groups(name, qweight, stored, scales, read)
        zeros = self._true_zeros(stored, bits)
        spec = QuantSpec(bits, group_size, True, False)
        inputs = g_idx.shape[0]
        if spec.groups(inputs) != scales.shape[0] or bool(((g_idx < 0) | (g_idx >= scales.shape[0])).any()):
            raise CheckpointError(
                f"{self.path}: {name} has {scales.shape[0]} groups for {inputs} inputs, "
                f"which a group size of {group_size} does not give, or its g_idx points outside them"
            )
        symmetric = holds_only(zeros, 2 ** (bits - 1), bits)
        in_order = torch.arange(inputs) // (inputs if group_size == -1 else group_size)
        act_order = not torch.equal(in_order, g_idx.long())
        return QuantizedLinear(
            QuantSpec(bits, group_size, symmetric, act_order), qweight, zeros, scales.half(), g_idx.to(torch.int32)
        )

    def fingerprint(self) -> str:
        """Hash the configuration and every stored byte: the base's version."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        files = sorted(set(self._file_of.values()))
        total = sum((self.path / file).stat().st_size for file in files)
        with Bar(total=total, desc="hashing weights", unit="B", unit_scale=True, delay=1, leave=False) as bar:
            for file in files:
                digest.update(file.encode())
                digest.update(hash_file(self.path / file, bar.update).encode())
        return digest.hexdigest()

    def _bits_and_groups(
        self, name: str, qweight: Tensor, stored: Tensor, scales: Tensor, read: Callable[[str], Tensor]
    ) -> tuple[int, Tensor]:
        """Return the bits, from the shapes (some writers vary them by module), and g_idx, from the file or in order."""
        assert self.quantization is not None
        bits = stored.shape[1] * 32 // scales.shape[1]
        if bits not in BITS:
            raise CheckpointError(f"{self.path}: {name} has codes of {bits} bits; 2, 3, 4 and 8 are supported")
        inputs = qweight.shape[0] * 32 // bits
        if f"{name}.g_idx" in self._file_of:
            g_idx = read(f"{name}.g_idx").cpu()
            if g_idx.shape != (inputs,):
                raise CheckpointError(f"{self.path}: {name} has g_idx {tuple(g_idx.shape)} for {inputs} inputs")
            return bits, g_idx
        group_size = int(self.quantization["group_size"])
        return bits, torch.arange(inputs, dtype=torch.int32) // (inputs if group_size == -1 else group_size)

    def _true_zeros(self, stored: Tensor, bits: int) -> Tensor:
        """Resolve v1 and v2 zeros: by the values where the checkpoint is symmetric, else by the metadata."""
        assert self.quantization is not None
        middle = 2 ** (bits - 1)
        if self.quantization.get("sym", False):
            if holds_only(stored, middle, bits):
                return stored
            if holds_only(stored, middle - 1, bits):
                words = _words_of(middle, bits).to(stored.device)
                return words.repeat(stored.shape[0], stored.shape[1] // len(words))
        return stored if self.zero_format == "gptq_v2" else shift_zeros(stored, bits, 1)


def quantization_config(
    spec: QuantSpec, damping: float, static_groups: bool, zero_format: str = "gptq"
) -> dict[str, Any]:
    """Make the metadata that readers of the format expect in config.json and quantize_config.json."""
    return {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "desc_act": spec.act_order,
        "static_groups": static_groups,
        "sym": spec.symmetric,
        "damp_percent": damping,
        "true_sequential": False,
        "lm_head": False,
        "checkpoint_format": zero_format,
        # Who made it, and then whose way of packing zero points this is: without the second GPTQModel refuses
        # asymmetric checkpoints, as writers before its release 0.9 lost a zero point of 0.
        "meta": {"quantizer": [f"inlaid:{__version__}", "gptqmodel:0.9.0"]},
    }


def _quantization(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the quantization's metadata, from config.json or quantize_config.json; None for a model without any."""
    found = config.get("quantization_config")
    if found is None and (path / "quantize_config.json").exists():
        found = read_json(path / "quantize_config.json")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: quantization_config is {found!r}; it must be an object")
    method = str(found.get("quant_method") or "gptq").lower()
    if method != "gptq" or found.get("is_marlin_format"):
        raise CheckpointError(
            f"{path} is quantized by {method!r} or repacked for one kernel; only GPTQ's format is read"
        )
    stored = found.get("checkpoint_format") or "gptq"
    if not isinstance(stored, str) or stored not in ZERO_FORMATS:
        raise CheckpointError(f"{path} stores checkpoint_format {stored!r}; readable are {', '.join(ZERO_FORMATS)}")
    for key in ("bits", "group_size"):
        if type(found.get(key)) is not int:
            raise CheckpointError(f"{path}: the quantization's metadata has no whole number {key!r}")
    return found
