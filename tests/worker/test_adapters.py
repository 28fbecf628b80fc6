"""Readers: no more adapters in memory than may be held."""

from __future__ import annotations

import weakref
from typing import Any

from inlaid.worker.adapters import Readers


def test_no_more_adapters_are_read_ahead_than_may_be_held() -> None:
    """Read 40, five at a time, and let go of each once it was taken."""
    alive: list[weakref.ref[Any]] = []
    most = 0

    class Read:
        pass

    def read(path: str) -> Read:
        made = Read()
        alive.append(weakref.ref(made))
        return made

    taken = []
    with Readers({str(number): "" for number in range(40)}, read, ahead=5) as readers:
        readers.wait()
        assert len(alive) == 5
        for name, done in readers:
            done.result()
            taken.append(name)
            del done
            most = max(most, sum(one() is not None for one in alive))
    assert taken == [str(number) for number in range(40)]
    assert most <= 6
