"""The persistent decode kernel in a runner: whether the configuration and the model allow it, and what it reads."""

from __future__ import annotations

import logging

import torch

from inlaid.config import ConfigError, EngineConfig
from inlaid.kernels.backend import AdapterPages
from inlaid.kernels.decode import MEASURED, DecodeKernel, DecodeShape, Surroundings
from inlaid.kv_format import kv_format
from inlaid.model.spec import ModelSpec
from inlaid.model.transformer import Transformer

log = logging.getLogger(__name__)

SHARE = 0.05  # of the device's memory: what the second copy of the weights may take where nobody asked for it


def make_decode(config: EngineConfig, spec: ModelSpec, pages: AdapterPages) -> DecodeKernel | None:
    """Return the kernel for a model, which may still refuse it, or None where the configuration wants none."""
    pool = pages.pool
    if config.decode_kernel == "layers" or pool.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(pool.device)
    if config.decode_kernel == "auto" and name not in MEASURED:
        log.info("decode steps: a kernel for each operation, as one kernel was not measured on %s", name)
        return None
    if config.decode_kernel == "auto" and config.linear_backend != "auto":
        log.info("decode steps: a kernel for each operation, as --linear-backend names %s", config.linear_backend)
        return None
    shape = DecodeShape(
        hidden=spec.hidden_size,
        mlp=spec.intermediate_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        layers=spec.num_layers,
        max_rank=config.adapters.max_lora_rank,
        multiprocessors=torch.cuda.get_device_properties(pool.device).multi_processor_count,
        block_size=config.cache.block_size,
    )
    kernel = DecodeKernel(shape, spec.head_dim, pages)
    if kv_format(config.cache.kv_cache_dtype).is_coded:
        kernel.refuse(f"it reads keys and values of 16 bits, not --kv-cache-dtype {config.cache.kv_cache_dtype}")
    if spec.qk_norm:
        kernel.refuse("it applies no norms to heads")
    return kernel


def finish_decode(model: Transformer, config: EngineConfig, max_model_len: int) -> DecodeKernel | None:
    """Return the kernel of a loaded model, ready to be bound, or None where there is none or it refuses the model.

    ConfigError: the configuration asks for it, and it refuses."""
    kernel = model.kernels.decode
    if kernel is None:
        return None
    if any(window is not None and window < max_model_len for window in model.spec.windows):
        kernel.refuse("it reads whole contexts, not windows")
    if config.decode_kernel == "auto" and kernel.refusal is None:
        total = torch.cuda.get_device_properties(kernel.device).total_memory
        if kernel.num_bytes > SHARE * total:
            kernel.refuse(
                f"its copy of the weights would take {kernel.num_bytes / 2**30:.2f} GiB, more than {SHARE:.0%} of the "
                "device's memory"
            )
    reason = kernel.finish()
    if reason is None:
        log.info(
            "decode steps of %s rows are one kernel; its copy of the weights takes %.2f GiB (--decode-kernel layers "
            "does without)", ", ".join(map(str, kernel.longest)), kernel.num_bytes / 2**30,
        )  # fmt: skip
        return kernel
    if config.decode_kernel == "one":
        raise ConfigError(f"decode kernel 'one' does not serve this model: {reason}; use auto or layers")
    log.info("decode steps: a kernel for each operation, as one kernel does not serve this model: %s", reason)
    return None


def surroundings(model: Transformer) -> Surroundings:
    """Return what the kernel reads beside quantized weights and the cache."""
    return Surroundings(
        embedding_VD=model.embedding.weight_VD,
        gains=[(block.attention_norm.weight_D, block.mlp_norm.weight_D) for block in model.blocks],
        eps=model.norm.eps,
        cos=model.rotary.cos,
        sin=model.rotary.sin,
    )
