"""Reading of hostile folders: each must be accepted or refused by its name, with an error that the program expects, in
bounded time and memory.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inlaid.adapters.peft import read_adapter
from inlaid.config import CacheConfig, EngineConfig
from inlaid.text.tokenizer import Tokenizer
from inlaid.worker.loading import load_model, open_model
from tests.chaos.folders import spoil

LONGEST = 10.0  # seconds of processor time for one folder
MOST_MIB = 400.0  # more than at the start
Reader = Callable[[Path], None]


def adapter_reader(base: Path) -> Reader:
    """Return a function that reads an adapter of a base."""
    opened = open_model(EngineConfig(model=str(base), device="cpu"))
    return lambda folder: read_adapter(folder, opened.spec, opened.dtype) and None


def read_base(folder: Path) -> None:
    """Read all of a base: its description, its weights and its tokenizer."""
    config = EngineConfig(model=str(folder), device="cpu", cache=CacheConfig(num_blocks=16))
    load_model(config, progress=False)
    Tokenizer(folder)


def read_spoilt(read: Reader, source: Path, scratch: Path, seeds: range) -> dict[str, Any]:
    """Spoil a folder once for each seed and read it; return what happened, and what should not have."""
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    slowest, before = 0.0, _peak_mib()
    for seed in seeds:
        folder = scratch / f"spoilt-{seed}"
        ways = spoil(source, folder, random.Random(seed))
        began = time.process_time()
        try:
            read(folder)
            outcomes["accepted"] += 1
        except (ValueError, OSError, MemoryError) as error:
            outcomes["refused"] += 1
            if folder.name not in str(error):
                faults.append(f"{seed} ({ways}): not refused by name: {type(error).__name__}: {str(error)[:300]}")
        except Exception as error:  # noqa: BLE001 - what is looked for
            faults.append(f"{seed} ({ways}): {type(error).__name__}: {str(error)[:300]}")
        seconds = time.process_time() - began
        slowest = max(slowest, seconds)
        if seconds > LONGEST:
            faults.append(f"{seed} ({ways}): {seconds:.1f} s of processor time")
        if (grown := _peak_mib() - before) > MOST_MIB:
            faults.append(f"{seed} ({ways}): {grown:.0f} MiB more")
            before = _peak_mib()
        shutil.rmtree(folder)
    peak = round(_peak_mib() - before)
    return {**outcomes, "folders": len(seeds), "slowest seconds": round(slowest, 2), "MiB more": peak, "faults": faults}


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
