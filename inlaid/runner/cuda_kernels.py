"""The kernels of a GPU that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Thread

import torch

from inlaid.config import ConfigError, EngineConfig
from inlaid.kernels.attention_triton import TritonAttention
from inlaid.kernels.auto import AutoLinear, backends
from inlaid.kernels.backend import AdapterPages, Kernels, LinearBackend
from inlaid.kernels.cpu import ReferenceLinear
from inlaid.kernels.exllama import ExllamaLinear
from inlaid.kernels.fused_triton import TritonOps
from inlaid.kernels.humming import HummingLinear
from inlaid.kernels.linear_triton import TritonLinear
from inlaid.kernels.lora_triton import TritonLora
from inlaid.kv_format import FP8, kv_format
from inlaid.model.spec import ModelSpec
from inlaid.runner.decode import make_decode


def cuda_kernels(config: EngineConfig, pages: AdapterPages, spec: ModelSpec | None = None) -> Kernels:
    """Return the kernels that the configuration names, or refuse with what would serve. Without `spec` there is no
    kernel of whole steps, which is made for one model."""
    if pages.pool.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"a GPU computes in float16 or bfloat16 here, not {pages.pool.dtype}: choose another dtype")
    if config.attention_backend not in ("auto", "triton"):
        raise ConfigError(f"attention backend {config.attention_backend!r} is for a CPU; use auto or triton on a GPU")
    if config.linear_backend == "packed":
        raise ConfigError("linear backend 'packed' is for a CPU; use auto on a GPU")
    _check_kv_format(config, pages.pool.device)
    linears: dict[str, Callable[[], LinearBackend]] = {
        "auto": lambda: AutoLinear(backends(config.deterministic)),
        "humming": lambda: HummingLinear(ordered=config.deterministic),
        "exllama": ExllamaLinear,
        "triton": TritonLinear,
        "reference": ReferenceLinear,
    }
    backend = linears[config.linear_backend]()
    lora = TritonLora(pages, config.adapters.max_lora_rank)
    Thread(target=_precompute_triton_key, daemon=True).start()
    decode = None if spec is None else make_decode(config, spec, pages)
    return Kernels((backend,), TritonAttention(), TritonOps(), lora, decode)


def _check_kv_format(config: EngineConfig, device: torch.device) -> None:
    """Refuse fp8 where the GPU has no instructions for it."""
    name = config.cache.kv_cache_dtype
    if kv_format(name) == FP8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"--kv-cache-dtype {name}: {torch.cuda.get_device_name(device)} does not convert fp8 "
            "(compute capability 8.9 or newer does); use int8"
        )


def _precompute_triton_key() -> None:
    """Hash Triton in the background while the weights load: it takes most of a second, once."""
    with suppress(ImportError):  # versions before 3.6 keep it elsewhere
        from triton.runtime.cache import triton_key

        triton_key()
