"""Stage online-SHAPE: a task is added to a server under load on one GPU.

A random 16-bit base is quantized for one task, quickly, as it is to be replaced. The server answers 64 requests at a
time on 32 adapters; then a second task is ordered. Measured: the job's seconds by part and its peak of memory, the dip
of throughput and of p99 inter-token latency, and the pause of the switch by both ways to hold the new base: on the
device beside the old one, and in host memory. The second switch is the rollback, on a server started again.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from perf.gpu import Keep
from perf.gpu.random_model import EVERY_LINEAR, spec_of, write_adapter, write_adapters, write_dense, write_prompts
from perf.gpu.serving import free_port, start_server, stop, wait_ready
from perf.online_tasks import KEY, Load, marks, series, summarize, watch_addition

# Of each shape: adapters, clients, calibration sequences and their length, share of the GPU, seconds before and after.
CASES: Mapping[str, tuple[int, int, int, int, float, float]] = MappingProxyType(
    {"7b": (32, 64, 16, 2048, 0.5, 15.0), "8b": (32, 64, 16, 2048, 0.5, 15.0), "tiny": (2, 4, 4, 32, 1.0, 4.0)}
)


def run(shape: str, keep: Keep) -> dict[str, Any]:
    """Quantize, serve, add a task, switch, roll back; return every figure."""
    adapters, clients, samples, length, share, around = CASES[shape]
    with tempfile.TemporaryDirectory(dir=os.environ.get("INLAID_BENCH_ROOT")) as name:
        folder = Path(name)
        names = _prepare(folder, shape, adapters, samples, length)
        options = ("--task-gpu-share", str(share), "--task-tolerance", "99", "--base-switch-memory")
        result: dict[str, Any] = {"shape": shape, "adapters": adapters, "clients": clients, "share": share}
        with _Server(folder, names, (*options, "device")) as server:
            generator = torch.Generator().manual_seed(0)
            prompts = torch.randint(3, spec_of(shape).vocab_size, (64, 256), generator=generator).tolist()
            load = Load(clients, list(names), prompts, 64)
            order = {
                "name": "second", "adapter": str(folder / "second"), "data": str(folder / "second.jsonl"),
                "force": True, "solve": "warm", "check": "shared",
            }  # fmt: skip
            watch = asyncio.run(watch_addition(server.url, order, load, around, around, 450.0))
            result |= {"summary": summarize(watch, around, around), "series": series(watch, around, 0.5)}
            result["stages"] = marks(watch)
            keep(result)
        with _Server(folder, names, (*options, "host")) as server:
            result["rollback_from_host_memory"] = server.post("/v1/base/rollback")["last_switch"]
        return result


def _prepare(folder: Path, shape: str, adapters: int, samples: int, length: int) -> dict[str, str]:
    """Write base, adapters and data, and quantize the base for one task; returns the adapters to serve."""
    spec = write_dense(folder / "base", shape)
    for seed, name in enumerate(("first", "second")):
        write_adapter(folder / name, spec, 16, EVERY_LINEAR, seed)
        write_prompts(folder / f"{name}.jsonl", round(samples / 0.75), length, spec.vocab_size, seed)
    command = [
        sys.executable, "-m", "inlaid", "quantize", str(folder / "base"), "--out", str(folder / "served"), "--force",
        "--aggregation", "mean", "--refine", "1", "--no-clip", "--bank-precision", "float16",
        "--max-tokens", str(samples * length),
        "--task", f"first={folder / 'first'}:{folder / 'first.jsonl'}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    served = write_adapters(folder / "served-adapters", spec, adapters, (16,))
    return {"first": str(folder / "first"), **dict(list(served.items())[: adapters - 1])}


class _Server:
    """A server with the admin key, up while the `with` body runs."""

    def __init__(self, folder: Path, adapters: dict[str, str], options: tuple[str, ...]) -> None:
        self._port, self._folder, self._adapters = free_port(), folder, adapters
        self._options = (
            "--admin-key", KEY, "--allow-runtime-lora", "--lora-root", str(folder),
            "--online-tasks", str(folder / "served.bank"), *options,
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> _Server:
        log = self._folder / f"server-{self._port}.log"
        more = self._options if torch.cuda.is_available() else (*self._options, "--device", "cpu", "--dtype", "float32")
        self._process = start_server(self._port, self._folder / "served", self._adapters, 16, log, more)
        try:
            wait_ready(self._process, self._port, 200)
        except RuntimeError as error:
            stop(self._process)
            raise RuntimeError(f"{error}: {log.read_text()[-2000:]}") from error
        return self

    def __exit__(self, *error: object) -> None:
        stop(self._process)

    def post(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, b"", {"Authorization": f"Bearer {KEY}"}, method="POST")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())
