"""Prompt programs on a GPU against the same calls over HTTP, and what each short-cut is worth. A stage of bench.py: the
loads of perf/programs/versus.py on a random model of a real shape, first on a server and then in this process.
"""

from __future__ import annotations

import random
from typing import Any

from perf.gpu import ROOT, Keep
from perf.gpu.offline import DEVICE
from perf.gpu.random_model import config, spec_of, write_adapters
from perf.gpu.serving import files
from perf.programs.chains import KINDS
from perf.programs.versus import INPUTS, RANKS, Subject, measure_switches, measure_ways

REPEATS = 3


def run(shape: str, keep: Keep, count: int = INPUTS) -> dict[str, Any]:
    """Measure all loads with an adapter for each input, of equal and of mixed ranks."""
    model, _ = files(shape, (16,), 0)
    paths: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    for label, ranks in RANKS.items():
        made = write_adapters(ROOT / shape / "programs", spec_of(shape), count, ranks, prefix=label)
        paths |= made
        names[label] = list(made)
    vocabulary = config(shape)["vocab_size"]

    def words(generator: random.Random, number: int) -> str:
        return " ".join(f"w{generator.randrange(3, vocabulary)}" for _ in range(number))

    settings = {"device": DEVICE, "dtype": "float16" if DEVICE == "cuda" else "float32", "max_model_len": 1024}
    most = max(map(max, RANKS.values()))
    _free_device()
    subject = Subject(model, names, paths, most, settings, words, "7", count)
    found = measure_ways(subject, KINDS, REPEATS, ROOT, keep)
    return {"shape": shape, **found, **measure_switches(subject, KINDS, 1, lambda part: keep({**found, **part}))}


def _free_device() -> None:
    """Give the memory back that writing the files took: the server needs it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
