"""The floor of a step: the time in which the device can read the base's weights once, which every step must."""

from __future__ import annotations

import time

import torch

from inlaid.kernels.measure import Ceiling
from inlaid.model.transformer import Transformer
from inlaid.runner.base_weights import tensors_of

_COPIED = 32 << 20  # bytes, more than the caches next to the cores of most machines
_COPIES = 4


def floor(model: Transformer, device: torch.device) -> dict[str, float]:
    """Return the bytes of the weights, the bytes a second of a large copy and the seconds that follow; {} on a GPU
    whose bandwidth nobody has measured. On a CPU the copy is made now, which takes some milliseconds."""
    rate = _measured_rate() if device.type == "cpu" else _known_rate(device)
    if rate is None:
        return {}
    num_bytes = sum(tensor.nbytes for tensor in tensors_of((*model.blocks, model.norm, model.head.packed)))
    return {"bytes": num_bytes, "rate": rate, "seconds": num_bytes / rate}


def _known_rate(device: torch.device) -> float | None:
    ceiling = Ceiling.of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if ceiling is None else ceiling.bandwidth


def _measured_rate() -> float:
    """Copy some memory; the fastest copy counts, its bytes read and written, by this thread's own time: others may have
    the core meanwhile."""
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(_COPIES):
        began = time.thread_time()
        target.copy_(source)
        times.append(time.thread_time() - began)
    return 2 * _COPIED / min(times)
