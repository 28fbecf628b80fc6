"""Rounding a block of inputs one after the other, each error moved to those not yet rounded: the part that GPTQ's pass
and its refinement share, and the only loop over single inputs. On a GPU it is replayed as a CUDA graph.

Legend: N outputs, B inputs of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from inlaid.quant.grid import nearest_codes

# target, spread, scale, zero, codes (written), origin -> errors
RoundBlock = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def round_block(
    target_BN: Tensor,
    spread_BB: Tensor,
    scale_BN: Tensor,
    zero_BN: Tensor,
    codes_BN: Tensor,
    origin_BN: Tensor,
    max_code: int,
) -> Tensor:
    """Round each row of `target_BN` when its turn comes, and take spread[i, j] times its error from every later row j.

    Errors are measured from `origin_BN`: the target itself in GPTQ, the weight when codes are refined. Returns them;
    changes `target_BN` and `codes_BN`.
    """
    errors_BN = torch.empty_like(target_BN)
    rows = zip(target_BN, scale_BN, zero_BN, codes_BN, origin_BN, errors_BN, spread_BB, strict=True)
    for i, (target_N, scale_N, zero_N, code_N, origin_N, error_N, spread_B) in enumerate(rows, 1):
        value_N = nearest_codes(target_N, scale_N, zero_N, max_code)
        code_N.copy_(value_N)
        torch.sub(origin_N, value_N.sub_(zero_N).mul_(scale_N), out=error_N)
        target_BN[i:].addr_(spread_B[i:], error_N, alpha=-1)
    return errors_BN


def rounder(like_BN: Tensor, max_code: int, num_blocks: int) -> RoundBlock:
    """Return `round_block`, replayed where that pays: on a GPU, for enough blocks to make up for the capture."""
    eager: RoundBlock = partial(round_block, max_code=max_code)
    if not like_BN.is_cuda or num_blocks <= 4:
        return eager
    replayed = _ReplayedBlock(like_BN, max_code)
    return lambda *block: (replayed if block[0].shape == like_BN.shape else eager)(*block)


class _ReplayedBlock:
    """`round_block` as a CUDA graph: its thousand tiny kernels cost more to launch one by one than to run.

    The graph reads and writes the buffers made here and nothing else, so a call copies its arguments in and its codes
    out; the errors that it returns are valid until the next call. GPTQ's origin is the target, which changes on the
    way: a second graph has the two in one buffer.
    """

    def __init__(self, like_BN: Tensor, max_code: int) -> None:
        self.target_BN, self.scale_BN, self.zero_BN, self.origin_BN = (torch.ones_like(like_BN) for _ in range(4))
        self.spread_BB = torch.zeros(len(like_BN), len(like_BN), dtype=like_BN.dtype, device=like_BN.device)
        self.codes_BN = torch.empty_like(like_BN, dtype=torch.uint8)
        self.max_code = max_code
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def _captured(self, itself: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        origin_BN = self.target_BN if itself else self.origin_BN
        buffers = (self.target_BN, self.spread_BB, self.scale_BN, self.zero_BN, self.codes_BN, origin_BN)
        aside: torch.cuda.Stream = torch.cuda.Stream(self.target_BN.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self.target_BN.device))
        with torch.cuda.stream(aside):  # kernels are loaded before the capture, which could not wait for it
            round_block(*buffers, self.max_code)
        torch.cuda.current_stream(self.target_BN.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may be serving meanwhile
            errors_BN = round_block(*buffers, self.max_code)
        return graph, errors_BN

    def __call__(
        self,
        target_BN: Tensor,
        spread_BB: Tensor,
        scale_BN: Tensor,
        zero_BN: Tensor,
        codes_BN: Tensor,
        origin_BN: Tensor,
    ) -> Tensor:
        itself = origin_BN is target_BN
        if itself not in self.graphs:
            self.graphs[itself] = self._captured(itself)
        graph, errors_BN = self.graphs[itself]
        self.target_BN.copy_(target_BN)
        self.spread_BB.copy_(spread_BB)
        self.scale_BN.copy_(scale_BN)
        self.zero_BN.copy_(zero_BN)
        if not itself:
            self.origin_BN.copy_(origin_BN)
        graph.replay()
        codes_BN.copy_(self.codes_BN)
        return errors_BN
