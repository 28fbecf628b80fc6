"""The whole server through HTTP: the same rows as offline.py, streamed to clients on the same machine.

The clients run in processes of their own, each with its share of the streams, so that counting tokens does not hold
the server back. Tokens are counted by the server's own usage report, times by when each chunk arrived.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

PORT = 8123
CLIENTS = 4
PROMPT, OUTPUT = 256, 128


def start_server(model: Path, adapters: dict[str, str], max_rank: int, log: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "inlaid", "serve", str(model), "--port", str(PORT), "--device", "cuda", "--dtype",
        "float16", "--max-num-seqs", "256", "--max-num-batched-tokens", "2048", "--gpu-memory-utilization", "0.8",
        "--no-enable-prefix-caching", "--max-loras", str(max(1, len(adapters))), "--max-lora-rank", str(max_rank),
    ]  # fmt: skip
    if adapters:
        command += ["--adapter", *(f"{name}={path}" for name, path in adapters.items())]
    return subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT)


def wait_ready(server: subprocess.Popen[bytes], limit: float) -> float:
    """Seconds until /health answers."""
    begin = time.monotonic()
    while time.monotonic() - begin < limit:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2) as answer:
                if answer.status == 200:
                    return time.monotonic() - begin
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready within {limit:.0f} s")


def base_name() -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models", timeout=10) as answer:
        return json.loads(answer.read())["data"][0]["id"]


async def one_request(session: Any, model: str, prompt: list[int]) -> tuple[int, float, float, float]:
    """Output tokens, and seconds: sent, first chunk, last chunk."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0.0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    sent = time.perf_counter()
    first = last = 0.0
    tail = b""
    async with session.post(f"http://127.0.0.1:{PORT}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for chunk in response.content.iter_any():
            now = time.perf_counter()
            first = first or now
            last = now
            tail = (tail + chunk)[-4096:]
    events = [part for part in tail.split(b"\n") if part.startswith(b"data: {")]
    usage = next((json.loads(event[6:]).get("usage") for event in reversed(events) if b'"usage"' in event), None)
    if not usage:
        raise RuntimeError(f"no usage came back: {tail[-500:]!r}")
    return int(usage["completion_tokens"]), sent, first, last


def client(models: list[str], streams: int, vocab: int, seed: int) -> list[tuple[int, float, float, float]]:
    """One process's share: a closed loop over these requests."""

    async def run() -> list[tuple[int, float, float, float]]:
        import aiohttp

        generator = random.Random(seed)
        waiting = [(model, [generator.randrange(3, vocab) for _ in range(PROMPT)]) for model in models]
        found = []

        async def stream(session: Any) -> None:
            while waiting:
                model, prompt = waiting.pop()
                found.append(await one_request(session, model, prompt))

        timeout = aiohttp.ClientTimeout(total=240)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(stream(session) for _ in range(streams)))
        return found

    return asyncio.run(run())


def measure(
    pool: ProcessPoolExecutor, base: str, adapters: int, concurrency: int, total: int, vocab: int
) -> dict[str, Any]:
    models = [f"a{i % adapters}" if adapters else base for i in range(total)]
    random.Random(0).shuffle(models)
    clients = min(CLIENTS, concurrency)
    futures = [
        pool.submit(
            client, models[i::clients], concurrency // clients + (i < concurrency % clients), vocab, 100 * total + i
        )
        for i in range(clients)
    ]
    records = [record for future in futures for record in future.result()]
    wall = max(last for *_, last in records) - min(sent for _, sent, _, _ in records)
    tokens = sum(count for count, *_ in records)
    return {
        "adapters": adapters, "concurrency": concurrency, "requests": total, "output_tokens_per_second": tokens / wall,
        "ms_per_token": mean((last - first) / max(1, count - 1) * 1e3 for count, _, first, last in records),
        "ttft_ms": mean((first - sent) * 1e3 for _, sent, first, _ in records),
        "ttft_p99_ms": sorted((first - sent) * 1e3 for _, sent, first, _ in records)[int(0.99 * (len(records) - 1))],
        "ttft_median_ms": median((first - sent) * 1e3 for _, sent, first, _ in records),
    }  # fmt: skip


def run(shape: str, rows: list[tuple[int, int, int]], ranks: tuple[int, ...]) -> dict[str, Any]:
    """Serve what offline.py has written, and run its rows."""
    from perf.gpu.random_model import config, write_adapters, write_model

    root = Path(f"/tmp/inlaid-bench/{shape}")
    count = max(adapters for adapters, _, _ in rows)
    if not (root / "model" / "config.json").exists():
        spec = write_model(root / "model", shape)
        write_adapters(root / "adapters", spec, count, ranks)
    adapters = {f"a{i}": str(root / "adapters" / f"a{i}") for i in range(count)}
    log = root / "server.log"
    server = start_server(root / "model", adapters, max(ranks), log)
    report: dict[str, Any] = {"shape": shape, "rows": []}
    try:
        report["ready_s"] = wait_ready(server, 200)
        print(f"{shape}: server ready in {report['ready_s']:.1f} s", flush=True)
        base, vocab = base_name(), config(shape)["vocab_size"]
        with ProcessPoolExecutor(CLIENTS, mp_context=multiprocessing.get_context("spawn")) as pool:
            measure(pool, base, count, 64, max(64, count), vocab)
            for adapters_at_work, concurrency, total in rows:
                row = measure(pool, base, adapters_at_work, concurrency, total, vocab)
                report["rows"].append(row)
                print({key: round(value, 2) for key, value in row.items()}, flush=True)
    except Exception as error:  # noqa: BLE001 - rows measured so far are kept, and the server's last words
        report["error"] = f"{type(error).__name__}: {error}"
        report["server_log"] = log.read_text(errors="replace")[-3000:]
        print(report["error"], report["server_log"], flush=True)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
    report["host_cpus"] = os.cpu_count()
    return report
