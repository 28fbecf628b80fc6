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
    """The library's view of the pages and of a step's rows."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pool", "table", "scales", "rows", "runs")),
        *((name, ctypes.c_int) for name in ("sites", "num_runs", "most")),
    )


class _Runs:
    """The rows of a step that have adapters, slot by slot, and the view that the library has of them."""

    def __init__(self, pages: AdapterPages, sequences: OnHost) -> None:
        slots = np.repeat(np.array(sequences.adapter_slots, np.int32), sequences.query_lens)
        rows = np.argsort(slots, kind="stable").astype(np.int32)
        rows = rows[np.searchsorted(slots[rows], 1) :]  # rows of slot 0 are left alone
        begins = np.flatnonzero(np.diff(slots[rows], prepend=0)).astype(np.int32)
        at_work = slots[rows[begins]]
        self.rows = rows
        self.runs = np.stack([at_work, begins, np.append(begins[1:], np.int32(len(rows)))], axis=1)
        most = max(1, int(pages.table[at_work.tolist(), :, 2].max())) if len(rows) else 1
        self.most = -(-most // 8) * 8
        self.view = _Adapters(
            pages.pool.data_ptr(), pages.table.data_ptr(), pages.scale.data_ptr(), self.rows.ctypes.data,
            self.runs.ctypes.data, pages.table.shape[1], len(self.runs), self.most,
        )  # fmt: skip


class NativeLora(CpuLora):
    """A call of the library for each shrink and each expansion. The pool must be in single precision."""

    def __init__(self, pages: AdapterPages) -> None:
        """Load the library. BuildError: there is no compiler, or it refuses."""
        super().__init__(pages)
        assert pages.pool.dtype == pages.scale.dtype == torch.float32
        assert pages.table.dtype == torch.int64
        assert pages.table.is_contiguous()
        assert pages.scale.is_contiguous()
        self._library = load()

    def make_plan(self, sequences: OnHost, step: StepContext) -> Any:
        return _Runs(self.pages, sequences)

    def multiply(self, x_TK: torch.Tensor, site: Site, step: StepContext) -> Any:
        runs: _Runs = step.lora_plan
        x_TK = x_TK.contiguous()
        T, K = x_TK.shape
        threads, siblings = torch.get_num_threads(), len(site.widths)
        shrunk, spare = x_TK.new_empty(T, siblings, runs.most), x_TK.new_empty(threads, K, TILE)
        pointers = (tensor.data_ptr() for tensor in (x_TK, shrunk, spare))
        self._library.inlaid_lora_shrink(runs.view, *pointers, K, site.first, siblings, threads)
        return runs, site, shrunk

    def add(self, product: Any, out_TN: torch.Tensor) -> None:
        runs, site, shrunk = product
        assert out_TN.stride(1) == 1
        threads = torch.get_num_threads()
        spare = shrunk.new_empty(threads, runs.most, TILE)
        widths = (ctypes.c_int * len(site.widths))(*site.widths)
        pointers = (tensor.data_ptr() for tensor in (shrunk, out_TN, spare))
        self._library.inlaid_lora_expand(
            runs.view, *pointers, out_TN.stride(0), widths, site.first, len(site.widths), threads
        )


@cache
def load() -> ctypes.CDLL:
    """Return the library, built at first use. BuildError: there is no compiler, or it refuses."""
    made = library.load_for_cpu(SOURCE)
    adapters, pointer, whole = ctypes.POINTER(_Adapters), ctypes.c_void_p, ctypes.c_int
    made.inlaid_lora_shrink.argtypes = [adapters, *3 * [pointer], *4 * [whole]]
    made.inlaid_lora_expand.argtypes = [adapters, *3 * [pointer], ctypes.c_long, pointer, *3 * [whole]]
    for function in (made.inlaid_lora_shrink, made.inlaid_lora_expand):
        function.restype = None
    return made
