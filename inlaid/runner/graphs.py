"""CUDA graphs of steps: compiling all kernels at start-up, capturing, replaying."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from inlaid.kernels.context import ALL_ADAPTERS, ATTENTION_ADAPTERS, NO_ADAPTERS
from inlaid.progress import Bar
from inlaid.runner.base_weights import kinds
from inlaid.runner.device_step import DeviceStep
from inlaid.runner.layout import Layout, Layouts


class Graphs:
    """A graph for each layout and adapter level. Without layouts every step runs kernel by kernel."""

    def __init__(self, step: DeviceStep, layouts: Layouts, captured: Sequence[Layout], progress: bool) -> None:
        self.step = step
        self.layouts = layouts
        self.captured = list(captured)
        self._progress = progress
        self._graphs: dict[tuple[Layout, int], torch.cuda.CUDAGraph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, layout: Layout, adapters: int) -> torch.cuda.CUDAGraph | None:
        return self._graphs.get((layout, adapters))

    def compile_kernels(self) -> None:
        """Run blocks of every kind once in each layout, so that capturing compiles nothing."""
        blocks = kinds(self.step.model)
        for layout in Bar(self.captured, desc="compiling kernels", disable=not self._progress, delay=1, leave=False):
            self.idle_step(layout, ALL_ADAPTERS, blocks)
        for layout in self.captured:
            if layout is self.captured[0] or self.step.leaves_parts(layout):
                # Kernels that add no adapter, where few rows had them all adding.
                self.idle_step(layout, NO_ADAPTERS, blocks)
                self.idle_step(layout, ATTENTION_ADAPTERS, blocks)
            if self.step.in_one_kernel(layout):
                self.idle_step(layout, ALL_ADAPTERS)

    def capture(self) -> None:
        """Capture every layout at every level, the largest first, in one memory pool."""
        pool = None
        gc.collect()
        gc.freeze()  # every capture collects garbage, and all that is loaded is none
        for layout in Bar(
            self.captured[::-1], desc="capturing graphs", disable=not self._progress, delay=1, leave=False
        ):
            for level in (NO_ADAPTERS, ATTENTION_ADAPTERS, ALL_ADAPTERS):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self.step.run(layout, level)
                pool = pool or graph.pool()
                self._graphs[layout, level] = graph
        gc.unfreeze()

    def idle_step(self, layout: Layout, level: int, blocks: Sequence[int] | None = None) -> None:
        """Run a step of padding only, of these blocks or all."""
        self.step.meta[: layout.size].copy_(torch.from_numpy(self.layouts.template(layout)))
        self.step.run(layout, level, blocks)

    def seconds_without_graph(self, times: int = 5) -> float:
        """Return by how much longer the smallest step with prompts takes when its kernels are launched one by one."""

        def seconds(run: Callable[[], object]) -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        layout = min((one for one in self.captured if one.tiles), key=lambda one: one.tokens)
        ways = self._graphs[layout, ALL_ADAPTERS].replay, partial(self.idle_step, layout, ALL_ADAPTERS)
        self.idle_step(layout, ALL_ADAPTERS)
        whole, apart = (median(seconds(way) for _ in range(times)) for way in ways)
        return max(0.0, apart - whole)
