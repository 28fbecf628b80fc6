"""Adapters on a CPU by a C library (csrc/lora.c), which reads them from their pages: nothing is stacked or copied,
however often the adapters at work change."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inlaid.kernels import library
from inlaid.kernels.backend import AdapterPages, Site
from inlaid.kernels.cpu_lora import CpuLora

if TYPE_CHECKING:
    from inlaid.kernels.context import OnHost, StepContext

SOURCE = library.CSRC / "lora.c"
TILE = 16  # columns that are transposed at a time


class _Adapters(ctypes.Structure):
    """The library's view of a site's adapters and of a step's rows."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pool", "entries", "scales", "rows", "runs")),
        *((name, ctypes.c_int) for name in ("num_runs", "most")),
    )


class _Runs:
    """The rows of a step that have adapters, slot by slot: `runs` lists slot, first row and last + 1."""

    def __init__(self, sequences: OnHost) -> None:
        slots = np.repeat(np.array(sequences.adapter_slots, np.int32), sequences.query_lens)
        rows = np.argsort(slots, kind="stable").astype(np.int32)
        self.rows = rows[np.searchsorted(slots[rows], 1) :]  # rows of slot 0 are left alone
        begins = np.flatnonzero(np.diff(slots[self.rows], prepend=0)).astype(np.int32)
        self.slots = slots[self.rows[begins]]
        self.runs = np.stack([self.slots, begins, np.append(begins[1:], np.int32(len(self.rows)))], axis=1)


class _AtSite:
    """The adapters of a step's runs as they are at one site now: an adapter may arrive while the step is under way."""

    def __init__(self, pages: AdapterPages, runs: _Runs, site: Site) -> None:
        siblings = slice(site.first, site.first + len(site.widths))
        self.runs, self.site = runs, site
        self.entries = np.ascontiguousarray(pages.table.numpy()[runs.slots, siblings])
        self.scales = np.ascontiguousarray(pages.scale.numpy()[runs.slots, siblings])
        self.most = -(-max(1, int(self.entries[:, :, 2].max(initial=0))) // 8) * 8
        arrays = (self.entries, self.scales, runs.rows, runs.runs)
        self.view = _Adapters(
            pages.pool.data_ptr(), *(array.ctypes.data for array in arrays), len(runs.runs), self.most
        )


class NativeLora(CpuLora):
    """A call of the library for each shrink and each expansion. The pool must be in single precision."""

    def __init__(self, pages: AdapterPages) -> None:
        """Load the library. BuildError: there is no compiler, or it refuses."""
        super().__init__(pages)
        assert pages.pool.dtype == pages.scale.dtype == torch.float32
        assert pages.table.dtype == torch.int64
        self._library = load()

    def make_plan(self, sequences: OnHost, step: StepContext) -> Any:
        return _Runs(sequences)

    def multiply(self, x_TK: torch.Tensor, site: Site, step: StepContext) -> Any:
        here = _AtSite(self.pages, step.lora_plan, site)
        x_TK = x_TK.contiguous()
        T, K = x_TK.shape
        threads, siblings = torch.get_num_threads(), len(site.widths)
        shrunk, spare = x_TK.new_empty(T, siblings, here.most), x_TK.new_empty(threads, K, TILE)
        pointers = (tensor.data_ptr() for tensor in (x_TK, shrunk, spare))
        self._library.inlaid_lora_shrink(here.view, *pointers, K, siblings, threads)
        return here, shrunk

    def add(self, product: Any, out_TN: torch.Tensor) -> None:
        here, shrunk = product
        assert out_TN.stride(1) == 1
        threads, all_widths = torch.get_num_threads(), here.site.widths
        spare = shrunk.new_empty(threads, here.most, TILE)
        widths = (ctypes.c_int * len(all_widths))(*all_widths)
        pointers = (tensor.data_ptr() for tensor in (shrunk, out_TN, spare))
        self._library.inlaid_lora_expand(here.view, *pointers, out_TN.stride(0), widths, len(all_widths), threads)


@cache
def load() -> ctypes.CDLL:
    """Return the library, built at first use. BuildError: there is no compiler, or it refuses."""
    made = library.load_for_cpu(SOURCE)
    adapters, pointer, whole = ctypes.POINTER(_Adapters), ctypes.c_void_p, ctypes.c_int
    made.inlaid_lora_shrink.argtypes = [adapters, *3 * [pointer], *3 * [whole]]
    made.inlaid_lora_expand.argtypes = [adapters, *3 * [pointer], ctypes.c_long, pointer, *2 * [whole]]
    for function in (made.inlaid_lora_shrink, made.inlaid_lora_expand):
        function.restype = None
    return made
