"""Functions of tensors as CUDA graphs: a pass of the solver is thousands of small kernels, which take five times as
long to launch one by one as to run. Weights of one shape share a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

LARGEST = 1 << 22  # elements of a first argument; with larger ones kernels take longer than their launches

Tensors = tuple[Tensor, ...]
Launch = Callable[[Hashable, Callable[..., Tensors], Tensors], Tensors]  # key, function, arguments


def launch(key: Hashable, function: Callable[..., Tensors], arguments: Tensors) -> Tensors:
    """Call the function."""
    return function(*arguments)


class Replays:
    """Graphs by key and by the arguments' shapes. A function captured here neither reads a number back from the device
    nor depends on anything but its key and arguments.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensors, Tensors]] = {}

    def __call__(self, key: Hashable, function: Callable[..., Tensors], arguments: Tensors) -> Tensors:
        """Return what the function returns. It is captured the first time that it is called with such arguments."""
        if not arguments[0].is_cuda or arguments[0].numel() > LARGEST:
            return function(*arguments)
        whole = (key, *((tuple(each.shape), each.dtype) for each in arguments))
        if whole not in self._graphs:
            self._graphs[whole] = _captured(function, arguments)
        graph, own, results = self._graphs[whole]
        for mine, given in zip(own, arguments, strict=True):
            mine.copy_(given)
        graph.replay()
        return tuple(result.clone() for result in results)


def _captured(function: Callable[..., Tensors], arguments: Tensors) -> tuple[torch.cuda.CUDAGraph, Tensors, Tensors]:
    """Capture a call on copies of the arguments, after one that compiles its kernels."""
    own = tuple(each.clone(memory_format=torch.contiguous_format) for each in arguments)
    function(*own)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*own)
    return graph, own, results
