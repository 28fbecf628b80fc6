"""The only reader of PEFT folders, for serving, quantizing and evaluating alike: it makes an Adapter of a folder, or
refuses it with its reason. Safetensors only. It touches no shared state, so it may run in a thread.

An adapter is refused, never used in part: every tensor must be a LoRA factor of a linear that the base has or a change
of its embedding or head (`vocabulary.py`), every module that the config targets must have both factors, and every
setting that would change the result and is not computed here is named. The config is read first; of the weights no more
is read than config and base account for.

The identity of an adapter is sha256(sha256(adapter_config.json) + adapter_model.safetensors). The inner hash has a
fixed length, so no bytes can move from one file to the other without changing it.
"""

from __future__ import annotations

import hashlib
import stat
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from inlaid.adapters import vocabulary
from inlaid.adapters.adapter import ALIGNMENT, EMBEDDING, HEAD, Adapter, AdapterEntry, AdapterError, site_path
from inlaid.adapters.base import BaseLinears, Outputs, dora_outputs, with_residual
from inlaid.adapters.factors import BIAS, MAGNITUDE, Factors, Vectors, check_values, pair, parse_weights
from inlaid.adapters.peft_config import PeftConfig, check_targets, parse_config
from inlaid.adapters.vocabulary import Rows
from inlaid.kernels.backend import MODULES
from inlaid.model.spec import ModelSpec

MAX_RANK = 256
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_WIDEST_TYPE, _HEADER_BYTES, _HEADER_BYTES_PER_SITE = 8, 1 << 20, 1 << 10


def read_adapter(
    path: str | Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    max_rank: int = MAX_RANK,
    allow_noop: bool = False,
    pin: bool = False,
    base: BaseLinears | None = None,
) -> Adapter:
    """Read, check and lay out one adapter, with `pin` in memory that a GPU can copy from by itself. `base`: that of
    adapters which follow from the base's weights; without it they are refused."""
    folder = Path(path)
    try:
        return _read(folder, spec, dtype, max_rank, allow_noop, pin, base)
    except AdapterError as error:
        raise AdapterError(f"adapter {folder}: {error}") from None


def decomposes_the_base(path: str | Path) -> bool:
    """Return True if reading the adapter decomposes the base's weights, which takes seconds and more. What is wrong
    with its folder is told by reading it."""
    try:
        folder = Path(path)
        _check_files(folder)
        return parse_config(_read_config(folder)).residual_init is not None
    except (AdapterError, OSError):
        return False


def identity_of(path: str | Path) -> str:
    """Return the identity of the adapter in a folder, without a look at what the adapter is."""
    return _hashes(Path(path))[0]


def former_identity_of(path: str | Path, identity: str) -> str | None:
    """Return the name that the quantizer gave an adapter up to version 1 of its record, sha256(config + weights); None
    if the folder no longer holds the adapter of this identity.
    """
    now, former = _hashes(Path(path))
    return former if now == identity else None


def _hashes(folder: Path) -> tuple[str, str]:
    """Return the identity of an adapter's files, and the former one."""
    try:
        _check_files(folder)
        config = _read_config(folder)
    except AdapterError as error:
        raise AdapterError(f"adapter {folder}: {error}") from None
    now, former = hashlib.sha256(hashlib.sha256(config).digest()), hashlib.sha256(config)
    with (folder / _WEIGHTS).open("rb") as file:
        while piece := file.read(1 << 20):
            now.update(piece)
            former.update(piece)
    return now.hexdigest(), former.hexdigest()


def _identity(config: bytes, weights: memoryview) -> str:
    digest = hashlib.sha256(hashlib.sha256(config).digest())
    digest.update(weights)
    return digest.hexdigest()


def _read(
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    max_rank: int,
    allow_noop: bool,
    pin: bool,
    base: BaseLinears | None,
) -> Adapter:
    began = time.perf_counter()
    before = _check_files(folder)
    config_bytes = _read_config(folder)
    config = parse_config(config_bytes)
    _check_kind(config, base)
    paths = {site: site_path(site) for site in (EMBEDDING, HEAD, *range(spec.num_sites))}
    targeted = {site for site, site_name in paths.items() if site >= 0 and config.is_target(site_name)}
    targeted |= set(config.low_rank())
    ranks = {site: config.rank_of(paths[site]) for site in targeted}
    opened = time.perf_counter()
    weight_bytes = _read_weights(folder, _max_tensor_bytes(config, spec, ranks, max_rank), _max_header_bytes(spec))
    in_file = time.perf_counter() - opened
    if _check_files(folder) != before:
        raise AdapterError("its files changed while they were read; load it when they are at rest")
    others, found = vocabulary.split(parse_weights(weight_bytes))
    parts = vocabulary.read(found, config, spec, base)
    factors, vectors = pair(others, spec, MAGNITUDE if config.dora else _bias(config))
    if parts.factors and (config.dora or config.lora_bias or config.residual_init):
        raise AdapterError("of the embedding and the head plain LoRA is served: no DoRA, lora_bias, PiSSA or OLoRA")
    factors = {**parts.factors, **factors}
    check_targets(config, targeted, set(factors), paths)
    _check_ranks(config, factors, max_rank)
    scales = {site: config.scale_of(paths[site], a.shape[0]) for site, (a, _) in factors.items()}
    if not allow_noop:
        _refuse_without_effect(factors, scales, bool(parts.rows))
    outputs = _outputs(config, base, factors, scales, vectors)
    if config.residual_init is not None and base is not None:
        for site, (a, b) in factors.items():
            factors[site] = with_residual(base, site, a, b, scales[site], config.residual_init)
    identity = _identity(config_bytes, weight_bytes)
    adapter = lay_out(identity, str(folder), factors, scales, dtype, pin, outputs, parts.rows)
    check_values(adapter.flat, factors, scales, dtype)
    return replace(adapter, check_seconds=time.perf_counter() - began - in_file)


def _bias(config: PeftConfig) -> str | None:
    return BIAS if config.lora_bias else None


def _check_kind(config: PeftConfig, base: BaseLinears | None) -> None:
    """Refuse an adapter that needs more than its own matrices where that is not to be had."""
    kind = config.residual_init or ("DoRA" if config.dora else "lora_bias" if config.lora_bias else None)
    if kind is None:
        return
    if base is None:
        raise AdapterError(f"{kind} is computed from the base's weights, which is done for serving only")
    if not base.scales_outputs and config.residual_init is None:
        raise AdapterError(
            f"{kind} changes a linear's outputs, which is computed on a CPU only; serve with --device cpu"
        )


def _outputs(
    config: PeftConfig, base: BaseLinears | None, factors: Factors, scales: Mapping[int, float], vectors: Vectors
) -> dict[int, Outputs]:
    """Return what the adapter does to the outputs of each linear, beside adding to them."""
    if not config.dora:
        return {site: Outputs(bias_N=scales[site] * vector.float()) for site, vector in vectors.items()}
    assert base is not None
    return {
        site: dora_outputs(base, site, *factors[site], scales[site], magnitude) for site, magnitude in vectors.items()
    }


def _refuse_without_effect(factors: Factors, scales: Mapping[int, float], has_rows: bool) -> None:
    """Refuse an adapter that changes nothing, and say which of its parts is zero."""
    if has_rows:
        return
    if all(scale == 0 for scale in scales.values()):
        raise AdapterError("lora_alpha is 0, so it changes nothing; set the lora_alpha that it was trained with")
    if all(scales[site] == 0 or not (b.any() and (site != EMBEDDING or a.any())) for site, (a, b) in factors.items()):
        raise AdapterError("every B is zero, so it changes nothing; it looks untrained")


def _check_files(folder: Path) -> list[tuple[int, int, int]]:
    """Refuse a folder without the two files; what is returned differs when somebody writes or replaces one."""
    config, weights = folder / _CONFIG, folder / _WEIGHTS
    if not folder.is_dir():
        raise AdapterError("there is no such folder, so it is not a PEFT adapter")
    if not config.exists():
        raise AdapterError(f"it has no {_CONFIG}, so it is not a PEFT adapter")
    if not weights.exists():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise AdapterError(f"its weights are pickled, which can run code when read; save them as {_WEIGHTS}")
        raise AdapterError(f"it has no {_WEIGHTS}, so it is not a PEFT adapter")
    return [_state(config), _state(weights)]


def _state(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError(f"{file.name} is not a regular file")
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_config(folder: Path) -> bytes:
    file = folder / _CONFIG
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterError(
            f"{_CONFIG} has {file.stat().st_size} bytes, more than the {_MAX_CONFIG_BYTES} of any config"
        )
    return file.read_bytes()


def _max_tensor_bytes(config: PeftConfig, spec: ModelSpec, ranks: Mapping[int, int], max_rank: int) -> int:
    """Bound the bytes of an adapter's tensors by its ranks, whatever their type."""
    features = {module: sum(spec.module_shape(module)) for module in MODULES}
    linears = sum(
        (min(rank, max_rank) + 1) * features[MODULES[site % len(MODULES)]] for site, rank in ranks.items() if site >= 0
    )
    return _WIDEST_TYPE * (linears + vocabulary.max_elements(config, spec, max_rank))


def _max_header_bytes(spec: ModelSpec) -> int:
    return _HEADER_BYTES + _HEADER_BYTES_PER_SITE * spec.num_sites


def _read_weights(folder: Path, max_tensor_bytes: int, max_header_bytes: int) -> memoryview:
    file = folder / _WEIGHTS
    size = file.stat().st_size
    with file.open("rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
        if size > max_tensor_bytes + max_header_bytes or min(header, size) > max_header_bytes:
            raise AdapterError(
                f"{_WEIGHTS} has {size} bytes and a header of {header}, but its config and the base account for "
                f"{max_tensor_bytes} and {max_header_bytes} at most; it belongs to another config or another base"
            )
        handle.seek(0)
        data = np.empty(size, np.uint8).data  # a bytearray would be filled first, and hold up all threads
        if handle.readinto(data) != size:
            raise AdapterError("its files changed while they were read; load it when they are at rest")
    return data


def _check_ranks(config: PeftConfig, factors: Factors, max_rank: int) -> None:
    for site, (a, _) in factors.items():
        rank, said = a.shape[0], config.rank_of(site_path(site))
        if rank != said:
            raise AdapterError(f"{site_path(site)} has rank {rank}, the config says {said}")
        if rank > max_rank:
            raise AdapterError(f"{site_path(site)} has rank {rank}, above the limit of {max_rank} (--max-lora-rank)")


def lay_out(
    identity: str,
    path: str,
    factors: Factors,
    scales: Mapping[int, float],
    dtype: torch.dtype,
    pin: bool,
    outputs: Mapping[int, Outputs] = MappingProxyType({}),
    rows: Mapping[int, Rows] = MappingProxyType({}),
) -> Adapter:
    """Put all matrices and vectors, by site, into one flat tensor, aligned, so that the adapter moves to the device in
    one copy."""
    entries, end = [], 0
    for site, one in rows.items():  # first, as a step begins with the embedding
        start, end = end, end + _aligned(one.rows_nD.numel())
        entries.append(AdapterEntry(site, start, end, end, 0, 0.0, num_rows=len(one.rows_nD), tokens=one.tokens))
    for site, (a, b) in factors.items():
        a_start = end
        b_start = a_start + _aligned(a.numel())
        end = b_start + _aligned(b.numel())
        starts = []
        for vector in _vectors(outputs.get(site)):
            starts.append(0 if vector is None else end)
            end += 0 if vector is None else _aligned(vector.numel())
        out_scale, out_bias = starts
        entries.append(AdapterEntry(site, a_start, b_start, end, a.shape[0], scales[site], out_scale, out_bias))
    flat = torch.zeros(end, dtype=dtype, pin_memory=pin)
    for entry in entries[: len(rows)]:
        rows_nD = rows[entry.site].rows_nD
        flat[entry.a_start : entry.a_start + rows_nD.numel()] = rows_nD.reshape(-1).to(dtype)
    for entry in entries[len(rows) :]:
        a, b = factors[entry.site]
        flat[entry.a_start : entry.a_start + a.numel()] = a.reshape(-1).to(dtype)
        flat[entry.b_start : entry.b_start + b.numel()] = b.reshape(-1).to(dtype)
        for start, vector in zip((entry.out_scale, entry.out_bias), _vectors(outputs.get(entry.site))):
            if vector is not None:
                flat[start : start + vector.numel()] = vector.to(dtype)
    return Adapter(identity, path, flat, tuple(entries))


def _vectors(outputs: Outputs | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if outputs is None else (outputs.scale_N, outputs.bias_N)


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT
