"""Shards: the part of a model that each member of a tensor-parallel group has. What is here is pure but for the reader,
which reads a member's part of a checkpoint and nothing else.

q, k, v, gate and up are divided by outputs, o and down by inputs, the vocabulary by rows of the embedding and of the
head. Heads stay whole, and so do groups of quantized inputs. Where there are more members than key/value heads, several
members have a copy of the same one. All members' shards have the same shapes; the last rows of a vocabulary that does
not divide are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from inlaid.checkpoint import Checkpoint, QuantizedLinear, QuantSpec
from inlaid.config import ConfigError
from inlaid.kernels.backend import MODULES
from inlaid.model.spec import ModelSpec
from inlaid.tensorfiles import CheckpointError

BY_INPUTS = ("o_proj", "down_proj")  # their products are summed over the members
_BY_VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Shard:
    """The part of member `index` of `count`."""

    index: int
    count: int

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """Return the model that one member computes: its heads, and its part of the MLP's width."""
        return replace(
            spec,
            num_heads=spec.num_heads // self.count,
            num_kv_heads=max(1, spec.num_kv_heads // self.count),
            intermediate_size=spec.intermediate_size // self.count,
        )

    def vocab_rows(self, spec: ModelSpec) -> int:
        """Return the rows of a member's embedding and head."""
        return -(-spec.vocab_size // self.count)

    def vocabulary(self, spec: ModelSpec) -> range:
        """Return the token ids of this member."""
        rows = self.vocab_rows(spec)
        return range(min(self.index * rows, spec.vocab_size), min((self.index + 1) * rows, spec.vocab_size))

    def outputs(self, spec: ModelSpec, module: str) -> range:
        """Return this member's outputs of a linear of the whole model `spec`."""
        if module in BY_INPUTS:
            return range(spec.hidden_size)
        place = self.index * spec.num_kv_heads // self.count if module in ("k_proj", "v_proj") else None
        return self._range(self.spec(spec).module_shape(module)[0], place, spec.head_dim)

    def inputs(self, spec: ModelSpec, module: str) -> range:
        """Return this member's inputs of a linear of the whole model `spec`."""
        if module not in BY_INPUTS:
            return range(spec.hidden_size)
        return self._range(self.spec(spec).module_shape(module)[1])

    def _range(self, width: int, first_head: int | None = None, head_dim: int = 0) -> range:
        first = self.index * width if first_head is None else first_head * head_dim
        return range(first, first + width)


def why_not(spec: ModelSpec, quant: QuantSpec | None, count: int) -> str | None:
    """Return the reason for which a model cannot be divided among `count` members, or None. `quant` is the format of
    its linears, or None if they are not quantized."""
    heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.intermediate_size
    if heads % count:
        return f"its {heads} heads do not divide by {count}"
    if kv_heads % count and count % kv_heads:
        return f"its {kv_heads} key/value heads neither divide by {count} nor divide it"
    if width % count:
        return f"its MLP of width {width} does not divide by {count}"
    if quant is None or count == 1:
        return None
    shard = Shard(0, count)
    for module in MODULES:
        outputs, inputs = shard.outputs(spec, module), shard.inputs(spec, module)
        if module in BY_INPUTS:
            reason = _why_not_inputs(quant, module, spec.module_shape(module)[1], len(inputs))
        else:
            reason = _why_not_words(quant, module, len(outputs), "outputs")
        if reason is not None:
            return reason
    return None


def _why_not_inputs(quant: QuantSpec, module: str, whole: int, part: int) -> str | None:
    size = quant.group_size
    if size != -1 and part % size:
        groups = quant.groups(whole)
        return f"{module} has {groups} groups of {size} inputs, which do not divide by {whole // part}"
    return _why_not_words(quant, module, part, "inputs")


def _why_not_words(quant: QuantSpec, module: str, part: int, what: str) -> str | None:
    if part * quant.bits % 32:
        return f"{part} {what} of {module}, of {quant.bits} bits, do not fill whole 32-bit words"
    return None


def check_divides(spec: ModelSpec, quant: QuantSpec | None, count: int) -> None:
    """Raise ConfigError where a model cannot be divided among `count` members; it says which numbers would do."""
    reason = why_not(spec, quant, count)
    if reason is not None:
        fitting = [str(n) for n in range(1, spec.num_heads + 1) if why_not(spec, quant, n) is None]
        raise ConfigError(
            f"--tensor-parallel-size {count}: {reason}; this model can be divided by {', '.join(fitting)}"
        )


def quant_of(checkpoint: Checkpoint) -> QuantSpec | None:
    """Return the format of a checkpoint's quantized linears as its metadata names it."""
    found = checkpoint.quantization
    if not checkpoint.is_quantized or found is None:
        return None
    return QuantSpec(int(found["bits"]), int(found["group_size"]), True, False)


class ShardReader:
    """A checkpoint as one member reads it. It takes the checkpoint's place for the loader of weights; `spec` is the
    whole model's."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, shard: Shard) -> None:
        self.checkpoint, self.spec, self.shard = checkpoint, spec, shard

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def dense(self) -> tuple[str, ...]:
        return self.checkpoint.dense

    @property
    def linears(self) -> tuple[str, ...]:
        return self.checkpoint.linears

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def tensor(self, name: str) -> torch.Tensor:
        """Return this member's part of a tensor. A bias that is added once, after the sum, is the first member's; the
        others have zeros."""
        path, _, kind = name.rpartition(".")
        module = path.rpartition(".")[2]
        if module in _BY_VOCABULARY:
            return self._vocabulary(name)
        if module not in MODULES:
            return self.checkpoint.tensor(name)
        outputs, inputs = self.shard.outputs(self.spec, module), self.shard.inputs(self.spec, module)
        if kind == "bias":
            self._check_shape(name, (self.spec.module_shape(module)[0],))
            part = self.checkpoint.tensor(name, (_slice(outputs),))
            return torch.zeros_like(part) if module in BY_INPUTS and self.shard.index else part
        self._check_shape(name, self.spec.module_shape(module))
        return self.checkpoint.tensor(name, (_slice(outputs), _slice(inputs)))

    def linear(self, name: str) -> QuantizedLinear:
        """Return this member's part of a quantized linear, of whole groups of inputs."""
        module = name.rpartition(".")[2]
        bits = self._shape(f"{name}.qzeros")[1] * 32 // self._shape(f"{name}.scales")[1]
        group_size = int((self.checkpoint.quantization or {})["group_size"])
        found = self._shape(f"{name}.scales")[1], self._shape(f"{name}.qweight")[0] * 32 // bits
        if found != self.spec.module_shape(module):
            raise CheckpointError(f"{self.path}: {name} is {found}, the config says {self.spec.module_shape(module)}")
        spec = QuantSpec(bits, group_size, True, False)
        outputs, inputs = self.shard.outputs(self.spec, module), self.shard.inputs(self.spec, module)
        reason = (
            _why_not_inputs(spec, module, found[1], len(inputs))
            if module in BY_INPUTS
            else _why_not_words(spec, module, len(outputs), "outputs")
        )
        if reason is not None:
            raise CheckpointError(f"{self.path}: {name} cannot be divided by {self.shard.count}: {reason}")
        return self.checkpoint.linear(name, lambda part: self._quantized_part(part, bits, group_size, outputs, inputs))

    def _quantized_part(self, name: str, bits: int, group_size: int, outputs: range, inputs: range) -> torch.Tensor:
        groups = slice(None) if group_size == -1 else slice(inputs.start // group_size, inputs.stop // group_size)
        words = (slice(each.start * bits // 32, each.stop * bits // 32) for each in (inputs, outputs))
        input_words, output_words = words
        match name.rpartition(".")[2]:
            case "qweight":
                return self.checkpoint.tensor(name, (input_words, _slice(outputs)))
            case "qzeros":
                return self.checkpoint.tensor(name, (groups, output_words))
            case "scales":
                return self.checkpoint.tensor(name, (groups, _slice(outputs)))
        part = self.checkpoint.tensor(name, (_slice(inputs),)).cpu() - (groups.start or 0)
        count = (
            self._shape(f"{name.rpartition('.')[0]}.scales")[0] if groups.stop is None else groups.stop - groups.start
        )
        if bool(((part < 0) | (part >= count)).any()):
            raise CheckpointError(
                f"{self.path}: {name} puts inputs of different members into one group (act-order), so the linear "
                "cannot be divided by inputs; quantize with --no-act-order or --static-groups, or serve it undivided"
            )
        return part

    def _vocabulary(self, name: str) -> torch.Tensor:
        self._check_shape(name, (self.spec.vocab_size, self.spec.hidden_size))
        part = self.checkpoint.tensor(name, (_slice(self.shard.vocabulary(self.spec)), slice(None)))
        missing = self.shard.vocab_rows(self.spec) - len(part)
        return torch.nn.functional.pad(part, (0, 0, 0, missing)) if missing else part

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(name)

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        if name in self.checkpoint and self._shape(name) != wanted:
            raise CheckpointError(f"{self.path}: {name} is {self._shape(name)}, the config says {wanted}")


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
