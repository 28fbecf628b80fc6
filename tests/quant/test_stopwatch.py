"""Each second belongs to one part, the innermost."""

from __future__ import annotations

import pytest
import torch

from inlaid.quant import stopwatch
from inlaid.quant.stopwatch import Stopwatch


def test_a_part_within_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 1.0, 3.0, 7.0, 20.0, 25.0))
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    with watch.part("forward"), watch.part("Hessians"):
        pass
    with pytest.raises(OSError, match="full"), watch.part("bank"):
        raise OSError("full")
    assert watch.seconds == {"forward": 1.0 + 4.0, "Hessians": 2.0, "bank": 5.0}
