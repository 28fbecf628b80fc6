"""A split of a step's time: what is timed, and what a step that is not measured costs."""

from __future__ import annotations

from typing import Any, cast

from inlaid.kernels.backend import Kernels
from inlaid.kernels.timed import StepSplit


class _Part:
    """Kernels that only count their calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def plan(self, step: Any, workspace: Any = None) -> None:
        self.calls.append("plan")

    def attend(self, *arguments: Any) -> str:
        self.calls.append("attend")
        return "attended"

    def shrink(self, *arguments: Any) -> str:
        raise ValueError("this step fails")

    def defer(self, *arguments: Any) -> None: ...

    def expand(self, *arguments: Any) -> None: ...


def test_one_step_of_four_is_measured_and_its_parts_are_counted() -> None:
    attention, lora = _Part(), _Part()
    split = StepSplit(Kernels((), cast(Any, attention), cast(Any, None), cast(Any, lora)))
    timed: Any = split.kernels.attention
    for _ in range(7):
        with split.step():
            timed.plan(None, None)
            assert timed.attend(1, 2) == "attended"
    assert attention.calls == ["plan", "attend"] * 7
    sums = split.sums()
    assert (sums["steps"], sums["measured"]) == (7, 1)
    assert 0 < sums["attention"] < sums["measured_seconds"] < sums["seconds"]
    assert sums["adapters"] == 0
    assert timed.attend == attention.attend  # outside a measured step the kernel itself is called


def test_a_step_that_fails_leaves_the_clocks_off() -> None:
    lora = _Part()
    split = StepSplit(Kernels((), cast(Any, _Part()), cast(Any, None), cast(Any, lora)))
    timed: Any = split.kernels.lora
    for _ in range(4):
        try:
            with split.step():
                timed.shrink(1)
        except ValueError:
            continue
        raise AssertionError("the error of a kernel was lost")
    assert split.sums()["adapters"] > 0
    assert timed.shrink == lora.shrink


def test_without_adapters_none_are_timed() -> None:
    split = StepSplit(Kernels((), cast(Any, _Part()), cast(Any, None)))
    assert split.kernels.lora is None
    for _ in range(4):
        with split.step():
            pass
    assert (split.sums()["measured"], split.sums()["adapters"]) == (1, 0.0)
