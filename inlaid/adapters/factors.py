"""The tensors of an adapter's weights file: each gets its place in the base, and is checked for shape, type and size of
its values. `peft.py` is the only caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from inlaid.adapters.adapter import AdapterError, site_path, site_shape
from inlaid.kernels.backend import MODULES
from inlaid.model.spec import ModelSpec
from inlaid.tensorfiles import CheckpointError, tensors_in

Factors = dict[int, tuple[Tensor, Tensor]]  # site -> A [rank, K], B [N, rank]
Vectors = dict[int, Tensor]  # site -> [N]

A, B, BIAS, MAGNITUDE = "lora_A", "lora_B", "the bias of lora_B", "lora_magnitude_vector"

INPUT_NORM = 256.0  # of a normalised input: its root mean square is about 1, and 256 ** 2 features are wide
MAX_OUTPUT = 2.0**32  # of what an adapter adds to one feature, where the compute type has room for it

_FACTOR = re.compile(
    r"(?:(?:base_model|model)\.)*layers\.(?P<layer>\d{1,6})\.(?P<block>self_attn|mlp)\.(?P<module>\w+)"
    r"\.(?:(?P<factor>lora_[AB])(?:\.[^.]+)?\.weight|(?P<bias>lora_B(?:\.[^.]+)?\.bias)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.[^.]+)??(?:\.weight)?))"
)
_FOREIGN = (
    (
        "norm.weight",
        "norms trained beside an adapter (modules_to_save) are not supported: all rows of a step share one",
    ),
    ("modules_to_save", "modules_to_save is supported for embed_tokens and lm_head"),
    ("embed_tokens", "of the embedding LoRA factors, trained tokens and whole weights are served, and no more"),
    ("lm_head", "of the output head LoRA factors, trained tokens and whole weights are served, and no more"),
    (".bias", "adapters with biases are not supported"),
)


def parse_weights(data: memoryview) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in memory."""
    try:
        tensors = tensors_in(data)
    except CheckpointError as error:
        raise AdapterError(f"adapter_model.safetensors is damaged or cut short ({error})") from None
    if not tensors:
        raise AdapterError("adapter_model.safetensors is empty")
    return tensors


def pair(tensors: Mapping[str, Tensor], spec: ModelSpec, vector: str | None = None) -> tuple[Factors, Vectors]:
    """Find each tensor its place; shapes must be the base's. `vector` names what each linear has beside A and B."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        site, part = _place(name, spec)
        if part in found.setdefault(site, {}):
            raise AdapterError(f"two tensors claim {part} of {site_path(site)}")
        if part not in (A, B, vector):
            what = "biases (lora_bias)" if part == BIAS else "DoRA (use_dora)"
            raise AdapterError(f"tensor {name}: the config says nothing of {what}")
        found[site][part] = tensor
    factors, vectors = {}, {}
    for site in sorted(found):
        missing = sorted({A, B, vector or A} - set(found[site]))
        if missing:
            raise AdapterError(f"{site_path(site)} has no {missing[0]}")
        factors[site] = check_shape(site, found[site][A], found[site][B], spec)
        if vector is not None:
            vectors[site] = _check_vector(site, vector, found[site][vector], spec)
    return factors, vectors


def _check_vector(site: int, what: str, vector: Tensor, spec: ModelSpec) -> Tensor:
    outputs, _ = spec.module_shape(MODULES[site % len(MODULES)])
    if vector.shape != (outputs,) or not vector.is_floating_point():
        raise AdapterError(
            f"{site_path(site)}: {what} is {vector.dtype} {tuple(vector.shape)}, not one number for each of {outputs} "
            "outputs"
        )
    if not bool(torch.isfinite(vector.float()).all()):
        raise AdapterError(f"{site_path(site)}: {what} holds NaN or infinity")
    return vector


def _place(name: str, spec: ModelSpec) -> tuple[int, str]:
    match = _FACTOR.fullmatch(name)
    if match is None:
        for sign, reason in _FOREIGN:
            if sign in name:
                raise AdapterError(f"tensor {name}: {reason}")
        raise AdapterError(f"tensor {name} fits nowhere in a {spec.architecture} model")
    layer, module = int(match["layer"]), match["module"]
    right_block = module in MODULES and (module in MODULES[:4]) == (match["block"] == "self_attn")
    if not right_block or layer >= spec.num_layers:
        raise AdapterError(f"tensor {name}: the base has no such module (it has {spec.num_layers} layers)")
    part = match["factor"] or (BIAS if match["bias"] else MAGNITUDE)
    return layer * len(MODULES) + MODULES.index(module), part


def check_shape(site: int, a: Tensor, b: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Return A and B; AdapterError: they are not made for this base."""
    outputs, inputs = site_shape(spec, site)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inputs or b.shape[0] != outputs:
        raise AdapterError(
            f"{site_path(site)} has A {tuple(a.shape)} and B {tuple(b.shape)}, "
            f"made for another base: this one's layer is {inputs} to {outputs}"
        )
    for factor, tensor in (("A", a), ("B", b)):
        if not tensor.is_floating_point():
            raise AdapterError(f"{site_path(site)} lora_{factor} is {tensor.dtype}, not a floating-point type")
    if a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise AdapterError(f"{site_path(site)}: A has rank {a.shape[0]} and B has rank {b.shape[1]}")
    return a, b


def max_gain(dtype: torch.dtype) -> float:
    """Bound on an adapter's gain in a compute type: no input of norm INPUT_NORM can then be driven beyond MAX_OUTPUT,
    nor beyond the type's largest number. 256 in float16, 2 ** 24 in bfloat16 and float32. A trained adapter's gain is
    about 1.

    MAX_OUTPUT leaves room for what follows: the product of three such numbers, as in an MLP or in the scores of an
    attention head, still fits into float32.
    """
    return min(torch.finfo(dtype).max, MAX_OUTPUT) / INPUT_NORM


def check_values(flat: Tensor, factors: Factors, scales: Mapping[int, float], dtype: torch.dtype) -> None:
    """Refuse values that are not finite in the compute type, and an adapter whose gain is above `max_gain`. `flat`
    holds all factors in the compute type; for most adapters one look at it is enough.
    """
    least, most = torch.aminmax(flat)  # each is NaN where one is in between
    largest = max(-float(least), float(most))
    if not (math.isfinite(least) and math.isfinite(most)):
        _check_finite(factors, dtype)
    limit = max_gain(dtype)
    for site, (a_RK, b_NR) in factors.items():
        rank, inputs = a_RK.shape
        scale = abs(scales[site])
        longest = largest * math.sqrt(inputs)  # no row of A is longer
        if max(longest, scale * longest, scale * rank * largest * longest) <= limit:
            continue
        gain = _gain(a_RK, b_NR, scale)
        if not gain <= limit:
            raise AdapterError(
                f"{site_path(site)} amplifies its input up to {gain:.3g} times, more than the {limit:.3g} that are "
                f"safe in {dtype}; lower lora_alpha, or look for a mistake in how it was trained or saved"
            )


def _gain(a_RK: Tensor, b_NR: Tensor, scale: float) -> float:
    """Bound how many times larger than its input's norm a feature of A x, scale A x or scale B A x can be."""
    lengths_R = a_RK.double().norm(dim=1)
    added = float((b_NR.double().abs() @ lengths_R).max())
    return max(float(lengths_R.max()) * max(1.0, scale), scale * added)


def _check_finite(factors: Factors, dtype: torch.dtype) -> None:
    """Name the first factor that is not finite in the compute type."""
    for site, both in factors.items():
        for factor, tensor in zip("AB", both, strict=True):
            if not bool(torch.isfinite(tensor.to(dtype)).all()):
                finite = torch.isfinite(tensor.float()).all()
                wrong = f"does not fit into {dtype}" if finite else "holds NaN or infinity"
                raise AdapterError(f"{site_path(site)} lora_{factor} {wrong}")
