"""Longest silences of a server while hostile requests run: of /health, and of another client's stream.

    python -m perf.stalls --out perf/results/stalls.json --runs 3

Why it matters: one request that holds the event loop, or the interpreter's lock, stops the tokens of everybody. The
goal is that none does so for more than 100 ms. Each hostile request is sent `--runs` times beside one client that asks
for /health again and again and one that reads a stream. A silence is given twice: by the clock, and as the CPU seconds
that the server's process spent in it. On a machine with other work the first says little; the second bounds what the
server itself held up, whoever else was running. Prints a line for each request, and the result as JSON.
"""

from __future__ import annotations

import gzip
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.report.provenance import now, provenance
from perf.process import ROOT, child_environment

MIB = 1 << 20
GOAL_MS = 100.0
FLAGS = ("--max-body-mib", "8", "--max-num-seqs", "64")
STREAM = (
    b'{"model": "to_velar", "prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": true, "temperature": 0, '
    b'"stream": true, "return_token_ids": true}'  # an event for each token, also for those without text
)


def hello(count: int = 1) -> list[dict[str, Any]]:
    """Return a conversation of so many messages."""
    return [{"role": "user", "content": "hello"}] * count


class Silence(msgspec.Struct):
    """The longest times without an answer, in milliseconds: by the clock, and of the server's CPU time."""

    wall_ms: float = 0.0
    cpu_ms: float = 0.0

    def note(self, wall: float, cpu: float) -> None:
        """Count one time between two answers, in seconds."""
        self.wall_ms, self.cpu_ms = max(self.wall_ms, 1e3 * wall), max(self.cpu_ms, 1e3 * cpu)


class Row(msgspec.Struct):
    """The answers to one kind of request, and the silences beside it."""

    request: str
    bytes: int
    statuses: list[int] = []  # each once
    seconds: float = 0.0
    health: Silence = msgspec.field(default_factory=Silence)
    stream: Silence = msgspec.field(default_factory=Silence)


class Server:
    """A server on the demo, and the clock of its CPU time."""

    def __init__(self, process: subprocess.Popen[str], host: str) -> None:
        self.host = host
        self._clock = (~process.pid << 3) | 2  # Linux's id of the CPU clock of another process

    def cpu(self) -> float:
        """Return the CPU seconds of the server's process, its threads together."""
        return time.clock_gettime(self._clock)

    def send(self, path: str, body: bytes | None, headers: dict[str, str] | None = None) -> int:
        """Send a request, read the whole answer, and return its status."""
        connection = http.client.HTTPConnection(self.host, timeout=600)
        try:
            connection.request("GET" if body is None else "POST", path, body, headers or {})
            answer = connection.getresponse()
            while answer.read(MIB):
                pass
            return answer.status
        except ConnectionError:
            return 0  # refused before the body was sent
        finally:
            connection.close()


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[Server]:
    """Run a server; it is ended by the kernel's signal, as its state is worth nothing."""
    process = subprocess.Popen(
        [sys.executable, "-m", "inlaid", "serve", "--port", "0", "--log-level", "error", *flags],
        cwd=ROOT,
        env=child_environment({}),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"at:\s+http://(\S+)/v1 ", line):
                yield Server(process, found.group(1))
                return
        raise SystemExit("the server did not come up")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def hostile() -> Iterator[tuple[str, str, bytes | None, dict[str, str]]]:
    """Yield each request: name, path, body, headers."""

    def asked(name: str, path: str, **body: Any) -> tuple[str, str, bytes, dict[str, str]]:
        return name, path, json.dumps(body).encode(), {"Content-Type": "application/json"}

    words, ids = "the sea is wide " * (7 * MIB // 16), [5] * (2 * MIB)
    complete, chat = "/v1/completions", "/v1/chat/completions"
    tool = {"type": "function", "function": {"name": "f", "description": words, "parameters": {"type": "object"}}}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": words})}}
    yield asked("text to /tokenize", "/tokenize", prompt=words)
    yield asked("text to /tokenize, with its tokens' texts", "/tokenize", prompt=words, return_token_strs=True)
    yield asked("one long word to /tokenize", "/tokenize", prompt="x" * (7 * MIB))
    yield asked("ids to /detokenize", "/detokenize", tokens=ids)
    yield asked("prompt as text", complete, prompt=words)
    yield asked("prompt as ids, n=32", complete, prompt=ids, n=32)
    yield asked("bad_words", complete, prompt="a", bad_words=[words[: 7 * MIB // 256]] * 256)
    yield asked("bad_words, many", complete, prompt="a", bad_words=["the sea"] * 400_000)
    yield asked("a tool's description", chat, messages=hello(), tools=[tool])
    yield asked("a tool call's arguments", chat, messages=[*hello(), {"role": "assistant", "tool_calls": [call]}])
    yield asked("65,536 messages", chat, messages=hello(65_536))
    yield asked("one message", chat, messages=[{"role": "user", "content": words}])
    yield asked("allowed_token_ids", complete, prompt="a", allowed_token_ids=ids)
    yield asked("logit_bias", complete, prompt="a", logit_bias={str(number): 1.0 for number in range(400_000)})
    yield asked("stop strings", complete, prompt="a", stop=["x" * 60] * 100_000)
    yield asked("guided_choice", complete, prompt="a", guided_choice=[f"choice {i}" for i in range(300_000)])
    yield asked("guided_regex", complete, prompt="a", guided_regex="(a|b)" * 400_000)
    yield asked("unknown fields", complete, prompt="a", **{f"x{i}": i for i in range(400_000)})
    yield asked("template options", chat, messages=hello(), chat_template_kwargs={f"x{i}": i for i in range(400_000)})
    yield asked("echo with logprobs, n=8", complete, prompt=[5] * 500, echo=True, logprobs=20, n=8, max_tokens=100)
    native = {"max_new_tokens": 400, "ignore_eos": True}
    yield asked("a streamed /generate", "/generate", text="a", sampling_params=native, stream=True)
    packed = gzip.compress(bytes(512 * MIB), 9)
    yield "gzip of 512 MiB", complete, packed, {"Content-Encoding": "gzip"}
    yield "gzip, 30,000 members", complete, gzip.compress(b"") * 30_000, {"Content-Encoding": "gzip"}
    yield "/metrics", "/metrics", None, {}


def measure(server: Server, name: str, path: str, body: bytes | None, headers: dict[str, str], runs: int) -> Row:
    """Send a request some times beside a stream and a prober, and return what both saw."""
    row = Row(name, len(body or b""))
    over = threading.Event()

    def probe() -> None:
        connection = http.client.HTTPConnection(server.host, timeout=600)
        while not over.is_set():
            wall, cpu = time.monotonic(), server.cpu()
            connection.request("GET", "/health")
            connection.getresponse().read()
            row.health.note(time.monotonic() - wall, server.cpu() - cpu)
        connection.close()

    def stream() -> None:
        while not over.is_set():
            connection = http.client.HTTPConnection(server.host, timeout=600)
            connection.request("POST", "/v1/completions", STREAM)
            answer = connection.getresponse()
            answer.readline()
            wall, cpu = time.monotonic(), server.cpu()
            while not over.is_set() and (line := answer.readline()) and b"[DONE]" not in line:
                if line.startswith(b"data"):
                    row.stream.note(time.monotonic() - wall, server.cpu() - cpu)
                    wall, cpu = time.monotonic(), server.cpu()
            answer.close()
            connection.close()

    others = [threading.Thread(target=other) for other in (probe, stream)]
    for other in others:
        other.start()
    time.sleep(0.5)
    began = time.monotonic()
    for _ in range(runs):
        if (status := server.send(path, body, headers)) not in row.statuses:
            row.statuses.append(status)
    row.seconds = (time.monotonic() - began) / runs
    time.sleep(0.2)
    over.set()
    for other in others:
        other.join()
    return row


def main() -> int:
    """Measure each kind of request and write the result."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="file for the result")
    parser.add_argument("--runs", type=int, default=3, help="times that each request is sent")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of the requests to send")
    args = parser.parse_args()
    rows = []
    with serving(FLAGS) as server:
        server.send("/v1/chat/completions", json.dumps({"messages": hello(), "max_tokens": 1}).encode())
        server.send("/v1/completions", json.dumps({"prompt": "a", "guided_regex": "a", "max_tokens": 1}).encode())
        rows.append(measure(server, "none", "/health", None, {}, 1000))  # as long as a hostile one
        for name, path, body, headers in hostile():
            if any(part in name for part in args.only):
                rows.append(measure(server, name, path, body, headers, args.runs))
                print(_line(rows[-1]), file=sys.stderr, flush=True)
    result = {**provenance(), "made": now(), "flags": FLAGS, "goal_ms": GOAL_MS, "rows": rows}
    write_atomically(args.out, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(json.dumps({"worst_health_cpu_ms": max(row.health.cpu_ms for row in rows), "out": str(args.out)}))
    return 0


def _line(row: Row) -> str:
    sent = f"{row.request:44} {row.bytes / MIB:6.2f} MiB  {row.statuses[0]}  {row.seconds:7.2f} s"
    seen = ((name, getattr(row, name)) for name in ("health", "stream"))
    return "  ".join([sent, *(f"{name} {one.wall_ms:6.0f} ms, cpu {one.cpu_ms:6.0f} ms" for name, one in seen)])


if __name__ == "__main__":
    sys.exit(main())
