"""Cases of parametrized tests of which all together take long on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch


def spread(cases: Iterable[tuple[Any, ...]], every: int) -> list[Any]:
    """Return all cases, of which each `every`-th runs always and the rest on a GPU or with --long.

    With `every` prime to the lengths of the axes that the cases are a product of, every value of each is met."""
    return [
        pytest.param(*case, marks=() if place % every == 0 or torch.cuda.is_available() else pytest.mark.long)
        for place, case in enumerate(cases)
    ]
