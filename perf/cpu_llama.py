"""Measure llama.cpp on a CPU beside inlaid: steps of decodes by rows, and a prompt, with one thread, in processor time.
`perf.cpu_packed --gguf FILE` calls it. llama.cpp comes with the package cyllama, which nothing else here needs.

Tokens are drawn, not sampled: sampling, which is in inlaid's figures, is not in these.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import median
from typing import Any


def measure(model: Path, rows: tuple[int, ...], prompt: int, output: int, long: int) -> dict[str, Any]:
    """Return the milliseconds of a step for each number of rows, and of a prompt of `long` tokens."""
    try:
        from cyllama.llama import llama_cpp
    except ImportError as error:
        raise SystemExit("llama.cpp is not here: pip install cyllama (a wheel for this Python)") from error

    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()
    model_params = llama_cpp.LlamaModelParams()
    model_params.n_gpu_layers = 0
    loaded = llama_cpp.LlamaModel(str(model), model_params)
    params = llama_cpp.LlamaContextParams()
    params.n_threads = params.n_threads_batch = 1
    params.n_seq_max, params.n_ctx, params.n_batch, params.n_ubatch = max(rows), 4096, 2048, long
    params.kv_unified = True  # or each sequence has its part of the context alone
    context = llama_cpp.LlamaContext(loaded, params)
    drawn = random.Random(0)

    def step(num_rows: int, start: int, count: int) -> float:
        """Decode `count` tokens of each row from position `start`; return milliseconds."""
        batch = llama_cpp.LlamaBatch(n_tokens=num_rows * count, embd=0, n_seq_max=max(rows))
        for row in range(num_rows):
            for at in range(count):
                batch.add(drawn.randrange(3, 40_000), start + at, [row], at == count - 1)
        begin = time.process_time()
        context.decode(batch)
        return (time.process_time() - begin) * 1e3

    found: dict[str, Any] = {}
    step(2, 0, 8)
    context.kv_cache_clear()
    prompts = []
    for _ in range(3):
        prompts.append(step(1, 0, long))
        context.kv_cache_clear()
    found["prompt"] = min(prompts)
    for num_rows in rows:
        step(num_rows, 0, prompt)
        steps = [step(num_rows, prompt + at, 1) for at in range(output)]
        found[f"step of {num_rows}"] = median(steps[-output // 2 :])
        context.kv_cache_clear()
    return found
