"""Measure the whole server through HTTP: the same rows as offline.py, streamed to clients on the same machine.

Stages of bench.py: the rows of a shape, with sums in a fixed order or by arrival; one load on adapters of mixed ranks
and on adapters of their mean rank; hundreds of adapters over places for a few; the whole model on one linear backend;
and the time from start to ready.

The clients run in processes of their own, each with its share of the streams, so that counting tokens does not hold
the server back. Tokens are counted by the server's own usage report, times by the arrival of chunks.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median
from types import MappingProxyType
from typing import Any

from perf.gpu import ROOT, Keep

DEVICE = ("--device", "cuda", "--dtype", "float16")
CLIENTS = 4
PROMPT, OUTPUT = 256, 128
MIXED = (8, 16, 40, 128)  # ranks in turn; their mean is 48
LATENCY_ROWS = ((0, 1, 3), (1, 1, 3), (32, 1, 3), (32, 2, 6), (0, 4, 12), (32, 4, 12))  # as offline.ROWS
FEW = (1, 64, 256)  # concurrencies at which sums by arrival are compared with a fixed order
OVERSUBSCRIBED = ((32, 64, 192), (256, 64, 512))  # (adapters, concurrency, requests) over places for 32


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_server(
    port: int,
    model: Path,
    adapters: dict[str, str],
    max_rank: int,
    log: Path,
    more: tuple[str, ...] = (),
    command: str = "serve",
) -> subprocess.Popen[bytes]:
    argv = [
        sys.executable, "-m", "inlaid", command, str(model), "--port", str(port), *DEVICE,
        "--max-num-seqs", "256", "--max-num-batched-tokens", "2048", "--gpu-memory-utilization", "0.8",
        "--no-enable-prefix-caching", "--max-loras", str(max(1, len(adapters))), "--max-lora-rank", str(max_rank),
        *more,
    ]  # fmt: skip
    if adapters:
        argv += ["--adapter", *(f"{name}={path}" for name, path in adapters.items())]
    import torch  # not above: the clients do without

    torch.cuda.empty_cache()  # this process made the files on the GPU; the server needs its memory
    with log.open("wb") as output:
        return subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT)


def stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def wait_ready(server: subprocess.Popen[bytes], port: int, limit: float) -> float:
    """Return the seconds until /health answers."""
    begin = time.monotonic()
    while time.monotonic() - begin < limit:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return time.monotonic() - begin
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready within {limit:.0f} s")


def ask(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return json.loads(answer.read())


def base_name(port: int) -> str:
    return str(ask(port, "/v1/models")["data"][0]["id"])


def moves(port: int) -> dict[str, int]:
    """Return how often adapters were loaded to the device, evicted from it, and found there."""
    cards = ask(port, "/v1/adapters")["adapters"]
    return {key: sum(card[key] for card in cards) for key in ("loads", "evictions", "hits")}


async def one_request(
    session: Any, port: int, model: str, prompt: list[int], output: int
) -> tuple[int, float, float, float]:
    """Stream one request; return its output tokens and the seconds when it was sent, first and last answered."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": output, "temperature": 0.0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    sent = time.perf_counter()
    first = last = 0.0
    tail = b""
    async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
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


def client(
    port: int, models: list[str], streams: int, vocab: int, seed: int, length: int, output: int
) -> list[tuple[int, float, float, float]]:
    """Run one process's share of the requests, with prompts of `length` tokens, as a closed loop of `streams`."""

    async def run() -> list[tuple[int, float, float, float]]:
        import aiohttp

        generator = random.Random(seed)
        waiting = [(model, [generator.randrange(3, vocab) for _ in range(length)]) for model in models]
        found = []

        async def stream(session: Any) -> None:
            while waiting:
                model, prompt = waiting.pop()
                found.append(await one_request(session, port, model, prompt, output))

        timeout = aiohttp.ClientTimeout(total=240)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(stream(session) for _ in range(streams)))
        return found

    return asyncio.run(run())


def measure(
    pool: ProcessPoolExecutor,
    port: int,
    base: str,
    adapters: int,
    concurrency: int,
    total: int,
    vocab: int,
    prefix: str = "a",
) -> dict[str, Any]:
    models = [f"{prefix}{i % adapters}" if adapters else base for i in range(total)]
    random.Random(0).shuffle(models)
    clients = min(CLIENTS, concurrency)
    futures = [
        pool.submit(
            client,
            port,
            models[i::clients],
            concurrency // clients + (i < concurrency % clients),
            vocab,
            100 * total + i,
            PROMPT,
            OUTPUT,
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


def files(shape: str, ranks: tuple[int, ...], count: int) -> tuple[Path, dict[str, str]]:
    """Return the random model and adapters of a shape; write what does not exist yet."""
    from perf.gpu.random_model import spec_of, write_adapters, write_model

    root = ROOT / shape
    if not (root / "model" / "config.json").exists():
        write_model(root / "model", shape)
    present = {f"a{i}": str(root / "adapters" / f"a{i}") for i in range(count)}
    if not all((Path(path) / "adapter_config.json").exists() for path in present.values()):
        write_adapters(root / "adapters", spec_of(shape), count, ranks)
    return root / "model", present


def served(
    keep: Keep,
    report: dict[str, Any],
    shape: str,
    model: Path,
    adapters: dict[str, str],
    max_rank: int,
    rows: list[tuple[str, int, int, int]],
    more: tuple[str, ...] = (),
    limit: float = 200,
) -> dict[str, Any]:
    """Start a server and measure rows of (prefix of names, adapters, concurrency, requests) on it.

    Before a row each of its adapters is asked for once. The server must be ready within `limit` seconds. Rows measured
    before an error are kept, with the end of the server's log."""
    from perf.gpu.random_model import config

    log, port = ROOT / "server.log", free_port()
    server = start_server(port, model, adapters, max_rank, log, more)
    report |= {"shape": shape, "rows": [], "host_cpus": len(os.sched_getaffinity(0)), "more": list(more)}
    try:
        report["ready_s"] = wait_ready(server, port, limit)
        report["start_up"] = timeline(log)
        print(f"{shape}: server ready in {report['ready_s']:.1f} s", flush=True)
        base, vocab = base_name(port), config(shape)["vocab_size"]
        with ProcessPoolExecutor(CLIENTS, mp_context=multiprocessing.get_context("spawn")) as pool:
            warmed: dict[str, int] = {}
            for prefix, some, concurrency, total in rows:
                if some > warmed.get(prefix, 0):  # rows do not measure an adapter's first load
                    warmed[prefix] = some
                    measure(pool, port, base, some, 64, max(64, some), vocab, prefix)
                before = moves(port)
                row = measure(pool, port, base, some, concurrency, total, vocab, prefix)
                row |= {key: count - before[key] for key, count in moves(port).items()}
                report["rows"].append(row if prefix == "a" else {"names": prefix, **row})
                keep(report)
                print({key: round(value, 2) for key, value in row.items()}, flush=True)
    except Exception as error:  # noqa: BLE001 - the rows measured so far are the result
        report["error"] = f"{type(error).__name__}: {error}"
        report["server_log"] = log.read_text(errors="replace")[-3000:]
        print(report["error"], report["server_log"], flush=True)
    finally:
        stop(server)
    return report


def timeline(log: Path) -> list[str]:
    """Return the lines of a server's log about its start."""
    return [line.strip() for line in log.read_text(errors="replace").splitlines() if "start-up:" in line]


def run(
    shape: str,
    rows: Sequence[tuple[int, int, int]],
    ranks: tuple[int, ...],
    keep: Keep,
    more: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Measure the rows of a shape."""
    count = max(adapters for adapters, _, _ in rows)
    model, adapters = files(shape, ranks, count)
    return served(keep, {}, shape, model, adapters, max(ranks), [("a", *row) for row in rows], more)


OTHERWISE: Mapping[str, tuple[str, ...]] = MappingProxyType(  # ends of stages' names, and their flags
    {
        "arrival": ("--no-deterministic",), "unified": ("--unified-memory",), "one": ("--decode-kernel", "one"),
        "kv8": ("--kv-cache-dtype", "fp8"), "kvint8": ("--kv-cache-dtype", "int8"),
    }
)  # fmt: skip


def otherwise(
    how: str, shape: str, rows: Sequence[tuple[int, int, int]], ranks: tuple[int, ...], keep: Keep
) -> dict[str, Any]:
    """Measure rows with a flag: kernels that may add in any order, one memory for adapters and KV, one kernel, or keys
    and values of 8 bits."""
    some = LATENCY_ROWS if how == "one" else [row for row in rows if row[1] in FEW]
    return run(shape, some, ranks, keep, OTHERWISE[how])


def oversubscribed(
    shape: str,
    ranks: tuple[int, ...],
    keep: Keep,
    rows: tuple[tuple[int, int, int], ...] = OVERSUBSCRIBED,
    largest: bool = False,
) -> dict[str, Any]:
    """Measure many adapters of mixed rank over places, and bytes, for the first row's number of their mean rank.

    With `largest`, over the bytes of that number of the largest rank: what a server with slots of one size holds.
    256 over 32 on an 8B: vLLM 0.26.0 on an H200, whose 32 slots are of rank 64, gives 930 tokens a second and a mean
    TTFT of 3.3 s (32 over 32: 1,780 and 0.6 s). The target is 5,500 and 0.8 s."""
    places, count = rows[0][0], max(adapters for adapters, _, _ in rows)
    model, adapters = files(shape, ranks, count)
    sizes = [(Path(path) / "adapter_model.safetensors").stat().st_size for path in adapters.values()]
    wider = 2 if "float32" in DEVICE else 1  # adapters in memory over their files, which are in half precision
    room = wider * (places * max(sizes) if largest else places * sum(sizes) / count + max(sizes)) / 2**30
    places = count if largest else places
    more = ("--max-loras", str(places), "--adapter-memory-gib", f"{room:.6f}")
    report: dict[str, Any] = {"places": places, "adapter_memory_gib": room}
    return served(keep, report, shape, model, adapters, max(ranks), [("a", *row) for row in rows], more, 240)


def ranks(shape: str, keep: Keep, count: int = 32, uniform: bool = True) -> dict[str, Any]:
    """Measure adapters on every linear with ranks mixed up to 128 (names m...) and, if `uniform`, with all of their
    mean rank (names u...). The server has room for both either way, so that the mixed rows are the same."""
    from perf.gpu.random_model import EVERY_LINEAR, spec_of, write_adapters

    model, _ = files(shape, (16,), 1)
    begin = time.monotonic()
    sets = {"m": MIXED, "u": (sum(MIXED) // len(MIXED),)} if uniform else {"m": MIXED}
    adapters: dict[str, str] = {}
    for prefix, some in sets.items():
        root = ROOT / f"{shape}-every-linear"
        adapters |= write_adapters(root, spec_of(shape), count, some, EVERY_LINEAR, prefix)
    report: dict[str, Any] = {"ranks": sets, "write_s": time.monotonic() - begin}
    size = sum(file.stat().st_size for path in adapters.values() for file in Path(path).glob("*.safetensors"))
    room = 2 * size // len(sets) / 2**30 + 0.5  # both sets have as many bytes
    more = ("--adapter-memory-gib", f"{room:.1f}", "--max-loras", str(2 * count))
    loads = ((1, 3), (64, 192), (256, 512))
    rows = [(prefix, count, concurrency, total) for concurrency, total in loads for prefix in sets]
    served(keep, report, shape, model, adapters, max(MIXED), rows, more)
    by = {(row["names"], row["concurrency"]): row["output_tokens_per_second"] for row in report["rows"]}
    report["mixed_over_uniform"] = {
        str(concurrency): by["m", concurrency] / by["u", concurrency]
        for concurrency, _ in loads
        if ("u", concurrency) in by
    }
    print(report["mixed_over_uniform"], flush=True)
    return report


def on_backend(shape: str, backend: str, keep: Keep) -> dict[str, Any]:
    """Measure the whole model on one linear backend."""
    model, adapters = files(shape, (16,), 32)
    rows = [("a", 0, 1, 3), ("a", 32, 1, 3), ("a", 32, 16, 48), ("a", 32, 64, 128)]
    return served(keep, {}, shape, model, adapters, 16, rows, ("--linear-backend", backend, "--no-deterministic"))


def start_warm(shape: str, keep: Keep) -> dict[str, Any]:
    """Measure the time from start to ready, with the caches as the stages before this one left them."""
    model, adapters = files(shape, (16,), 32)
    log, port = ROOT / "server.log", free_port()
    server = start_server(port, model, adapters, 16, log)
    try:
        start = {"caches": "as they are", "ready_s": wait_ready(server, port, 200), "start_up": timeline(log)}
    except RuntimeError as error:
        start = {"error": str(error), "server_log": log.read_text(errors="replace")[-3000:]}
    finally:
        stop(server)
    report: dict[str, Any] = {"shape": shape, "starts": [start]}
    keep(report)
    print(start, flush=True)
    return report
