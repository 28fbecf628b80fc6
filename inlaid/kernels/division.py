"""A device divided in two by CUDA's green contexts: what runs on the streams of one part has multiprocessors to itself,
so that two steps go on at the same time and neither waits for the other's blocks. Captured graphs keep the part of
the stream that they were captured on. Parts stay until the process ends.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

RESOURCE_BYTES = 144  # of the driver's CUdevResource, whose number of multiprocessors is at COUNT_AT
COUNT_AT = 96
SM, DEFAULT_STREAM, NON_BLOCKING = 1, 1, 1  # the driver's constants


@dataclass(frozen=True)
class Part:
    """Multiprocessors, and two streams on them."""

    sms: int
    stream: torch.cuda.Stream
    side: torch.cuda.Stream


def divide(device: torch.device, count: int) -> tuple[Part, Part]:
    """A part of about `count` multiprocessors (the driver rounds up, to eighths on Hopper), and the rest.
    RuntimeError: this device or driver cannot be divided so."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the context exists from here on
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError(f"the driver's library cannot be loaded: {error}") from None
        whole, first, rest = (ctypes.create_string_buffer(RESOURCE_BYTES) for _ in range(3))
        number, groups = ctypes.c_int(), ctypes.c_uint(1)
        _call(driver, "cuDeviceGet", ctypes.byref(number), torch.cuda.current_device())
        _call(driver, "cuDeviceGetDevResource", number, whole, SM)
        split = (first, ctypes.byref(groups), whole, rest, ctypes.c_uint(0), ctypes.c_uint(count))
        _call(driver, "cuDevSmResourceSplitByCount", *split)
        return _part(driver, number, first, device), _part(driver, number, rest, device)


def _part(driver: Any, number: ctypes.c_int, resource: Any, device: torch.device) -> Part:
    described, context = ctypes.c_void_p(), ctypes.c_void_p()
    _call(driver, "cuDevResourceGenerateDesc", ctypes.byref(described), resource, ctypes.c_uint(1))
    _call(driver, "cuGreenCtxCreate", ctypes.byref(context), described, number, ctypes.c_uint(DEFAULT_STREAM))
    streams = []
    for _ in range(2):
        stream = ctypes.c_void_p()
        _call(driver, "cuGreenCtxStreamCreate", ctypes.byref(stream), context, ctypes.c_uint(NON_BLOCKING), 0)
        streams.append(torch.cuda.ExternalStream(stream.value, device))
    sms = int.from_bytes(resource.raw[COUNT_AT : COUNT_AT + 4], "little")
    return Part(sms, streams[0], streams[1])


def _call(driver: Any, name: str, *args: Any) -> None:
    try:
        code = getattr(driver, name)(*args)
    except AttributeError:
        raise RuntimeError(f"the driver is too old: it has no {name}") from None
    if code:
        raise RuntimeError(f"{name} answered {code}")
