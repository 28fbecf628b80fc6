"""Measure two replicas on two GPUs behind one endpoint: stages `cluster-SHAPE`. No Ray is needed: each replica is a
process of the server's own.

Throughput of one replica and of two with 256 adapters (must: 1.9 times), p99 of the time to first token, and the
seconds until an added replica serves. Weights come from disk, or from the page cache that the first replica's start has
filled; a transfer from GPU to GPU does not exist yet. It has not run on two H200s so far.
"""

from __future__ import annotations

import multiprocessing
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from perf.gpu import ROOT, Keep
from perf.gpu.serving import CLIENTS, base_name, files, free_port, measure, start_server, stop, wait_ready

ADAPTERS, PLACES, RANKS = 256, 64, (8, 16, 32, 64)
LOADS = ((64, 256), (512, 1536))  # concurrency, requests
KEY = "cluster-stage"


def run(shape: str, keep: Keep) -> dict[str, Any]:
    """Measure one replica, add the second, and measure both."""
    from perf.gpu.random_model import config

    model, adapters = files(shape, RANKS, ADAPTERS)
    log, port = ROOT / "cluster.log", free_port()
    more = ("--replicas", "1", "--admin-key", KEY, "--max-loras", str(PLACES))
    server = start_server(port, model, adapters, max(RANKS), log, more, command="cluster")
    report: dict[str, Any] = {"shape": shape, "adapters": ADAPTERS, "places": PLACES, "rows": []}
    try:
        report["ready_s"] = wait_ready(server, port, 200)
        base, vocab = base_name(port), config(shape)["vocab_size"]
        with ProcessPoolExecutor(CLIENTS, mp_context=multiprocessing.get_context("spawn")) as pool:
            for replicas in (1, 2):
                if replicas == 2:
                    report["second_replica_serves_s"] = add_replica(port)
                measure(pool, port, base, ADAPTERS, 64, ADAPTERS, vocab)  # each adapter's first load
                for concurrency, total in LOADS:
                    row = {"replicas": replicas, **measure(pool, port, base, ADAPTERS, concurrency, total, vocab)}
                    report["rows"].append(row)
                    keep(report)
                    print({key: round(value, 2) for key, value in row.items()}, flush=True)
        one, two = (report["rows"][at]["output_tokens_per_second"] for at in (len(LOADS) - 1, 2 * len(LOADS) - 1))
        report["two_over_one"] = two / one
    except Exception as error:  # noqa: BLE001 - the rows measured so far are the result
        report["error"] = f"{type(error).__name__}: {error}"
        report["server_log"] = log.read_text(errors="replace")[-3000:]
    finally:
        stop(server)
    return report


def add_replica(port: int) -> float:
    """Add a replica and return the seconds until it serves."""
    begin = time.monotonic()
    address, headers = f"http://127.0.0.1:{port}/v1/replicas", {"Authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(address, b"", headers, method="POST"), timeout=200) as answer:
        answer.read()
    return time.monotonic() - begin
