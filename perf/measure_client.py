"""Measurement of the request generator itself: can it hold 500 requests/s and 512 streams, and are its times true?

    python -m perf.measure_client --out perf/results/perf-client.json

Why it matters: a generator that is late, or stamps tokens late, measures itself. A fake server in another process
answers with known delays and stamps each token as it writes it, on the clock both processes share; the generator's
stamps are compared with those. The ceiling is one core for each of the two. Prints the result as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.report.provenance import now, provenance
from perf.fake_server import Sent
from perf.process import ROOT, child_environment, free_port
from perf.records import Record, read_records
from perf.target import wait_until_ready

TTFT_MS, ITL_MS, OUTPUT = 74.0, 50.0, 20  # 74 + 19 * 50 = 1,024 ms, and so 512 streams at 500 requests/s


def one_run(rate: float, seconds: float, folder: Path) -> dict[str, Any]:
    """Server and generator once; figures of both."""
    port, out, log = free_port(), folder / "run.json", folder / "sent.jsonl"
    server_command = [sys.executable, "-m", "perf.fake_server", "--port", str(port), "--log", str(log)]
    server_command += ["--ttft-ms", str(TTFT_MS), "--itl-ms", str(ITL_MS)]
    server_command += [part for name in "abcd" for part in ("--adapter", f"{name}=x")]
    client_command = [sys.executable, "-m", "perf.client", "--base-url", f"http://127.0.0.1:{port}"]
    client_command += ["--arrival", "fixed", "--rate", str(rate), "--duration", str(seconds), "--input", "fixed:128"]
    client_command += ["--output", f"fixed:{OUTPUT}", "--warmup", "600", "--out", str(out), "--no-progress"]
    load_before = os.getloadavg()[0]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    server = subprocess.Popen(server_command, env=child_environment({}))
    try:
        wait_until_ready([f"http://127.0.0.1:{port}"], 30)
        subprocess.run(client_command, env=child_environment({}), check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    figures = _figures(json.loads(out.read_text()), read_records(out.with_suffix(".jsonl")), _read_log(log))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return figures | {"generator_cpu_s": round(cpu, 2), "load_average_before": round(load_before, 2)}


def _read_log(path: Path) -> dict[str, Sent]:
    """Read the server's log by request id; ids of warm-up requests have a minus."""
    sent = [msgspec.json.decode(line, type=Sent) for line in path.read_bytes().splitlines()]
    return {entry.request_id: entry for entry in sent}


def _figures(summary: dict[str, Any], records: list[Record], log: dict[str, Sent]) -> dict[str, Any]:
    """Compute the generator's figures, and its stamps against the server's, in milliseconds."""
    measured = [record for record in records if not record.warmup]
    start = summary["clock_start"]
    pairs = [(record, log[f"perf-{record.index}"]) for record in measured if record.status == "ok"]
    ttft = [1000 * (r.ttft - (s.tokens[0] - s.received)) for r, s in pairs if r.ttft is not None]
    gaps = [1000 * (a - b) for r, s in pairs for a, b in zip(r.itls, np.diff(s.tokens).tolist(), strict=True)]
    token = [1000 * (start + a - b) for r, s in pairs for a, b in zip(r.token_times(), s.tokens, strict=True)]
    span = max(r.due for r in measured) - min(r.due for r in measured)
    return {
        "requests": len(measured),
        "answered": summary["completed"],
        "sent_per_s": round((len(measured) - 1) / (max(r.sent for r in measured) - min(r.sent for r in measured)), 2),
        "due_per_s": round((len(measured) - 1) / span, 2),
        "most_streams_at_once": summary["max_concurrent_requests"],
        "tokens_per_s": round(summary["max_output_tokens_per_s"]),
        "lateness_ms": _spread([1000 * record.lateness for record in measured]),
        "token_seen_after_written_ms": _spread(token),
        "ttft_minus_servers_ms": _spread(ttft),
        "itl_minus_servers_ms": _spread(gaps),
        "itl_within_2ms": round(float(np.mean(np.abs(gaps) <= 2.0)), 4),
        "duration_s": round(summary["duration"], 3),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    data = np.array(values)
    found = {f"p{p:g}": float(np.percentile(data, p)) for p in (1, 50, 90, 99)}
    return {name: round(value, 3) for name, value in (found | {"max": float(data.max())}).items()}


def about() -> dict[str, Any]:
    return {
        **provenance(seed=0),
        "date": now(),
        "scheduling": "real-time (chrt)" if _is_realtime() else f"ordinary, nice {os.nice(0)}",
        "ceiling": "one core each for the generator and the fake server",
    }


def _is_realtime() -> bool:
    """On a machine shared with other work, `chrt -r 1` gives the two processes the cores they would have alone."""
    return sys.platform == "linux" and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="perf.measure_client", description="Measure the request generator.")
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "perf-client.json")
    arguments = parser.parse_args(argv)
    runs = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(one_run(arguments.rate, arguments.seconds, Path(folder)))
            print(json.dumps(runs[-1]), flush=True)
    result = about() | {"runs": runs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out, json.dumps(result, indent=1).encode() + b"\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
