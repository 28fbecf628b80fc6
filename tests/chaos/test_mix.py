"""Hostile, mutated and ordinary requests at once, and adapters that come and go: every ordinary answer is the
undisturbed one, nothing is answered 500, and nothing is held at the end.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.chaos.attackers import Rates
from tests.chaos.mix import Mix, flags
from tests.server.live import serving


def test_ordinary_answers_stay_what_they_are_beside_a_mix_of_everything(tmp_path: Path) -> None:
    with serving(*flags(tmp_path)) as server:
        mix = Mix(server, tmp_path, seed=1, rates=Rates(attack_pause=0.05, change_pause=0.05))
        found = asyncio.run(mix.run(seconds=30.0, most_mutants=150))
    assert found["wrong answers"] == []
    assert found["answers of 500 and more that are not stated"] == []
    assert found["held after"] == found["held before"]
    assert found["ordinary answers"] > 0
    assert found["ordinary requests broken off"] == 0
    assert found["changes of adapters"]["asked"] > 0
