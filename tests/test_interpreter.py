"""Triton's interpreter computes the same without its needless work, and is spared that in the installed version."""

from __future__ import annotations

import inspect

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _kernel(x, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, _twice(tl.load(x + at)) * 3)


def test_later_launches_search_for_nothing_and_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(16, dtype=torch.int32) - 4
    x[0] = 2**30  # overflows, as it would on a GPU
    first, second = torch.empty_like(x), torch.empty_like(x)
    _kernel[(1,)](x, first, 16)

    def searched(*arguments: object) -> list[tuple[str, object]]:
        raise AssertionError("each launch looks through triton.language again: see tests/interpreter.py")

    types = pytest.importorskip("triton.runtime.interpreter")._get_np_dtype
    assert [types(of) for of in (tl.float32, tl.block_type(tl.int8, [4]), tl.pointer_type(tl.int8))] == [
        "f4",
        "i1",
        "u8",
    ]
    monkeypatch.setattr(inspect, "getmembers", searched)
    _kernel[(1,)](x, second, 16)
    assert torch.equal(first, x * 6)
    assert torch.equal(second, first)
    with pytest.raises(ValueError, match=r"Did you forget to add @triton\.jit"):
        tl.arange(0, 16)  # outside of a launch the language is Triton's own


def test_sums_are_computed_once() -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    assert not interpreter.interpreter_builder.options.sanitize_overflow
