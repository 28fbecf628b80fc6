"""Faults around a live server: clients that leave, floods, a killed engine, signals, a port in use."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import ROOT, Live, serving

LONG = {"model": "to_velar", "prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": True, "stream": True}


class Stream:
    """A streamed completion, read by hand."""

    def __init__(self, server: Live, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.connection = http.client.HTTPConnection(*server.address, timeout=60)
        self.connection.request("POST", "/v1/completions", json.dumps(body), headers or {})
        self.response = self.connection.getresponse()

    def event(self) -> Any:
        """Read the next event; None at the end of the stream."""
        while line := self.response.readline():
            if line.startswith(b"data: "):
                data = line[len(b"data: ") :].strip()
                return "done" if data == b"[DONE]" else json.loads(data)
        return None

    def leave(self) -> None:
        assert self.connection.sock is not None
        self.connection.sock.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def test_a_client_that_leaves_frees_its_blocks(server: Live) -> None:
    streams = [Stream(server, {**LONG, "n": 2}) for _ in range(3)]
    for stream in streams:
        stream.event()
    assert server.metric("inlaid:kv_blocks_used") > 0
    before = server.metric("vllm:request_success_total")
    for stream in streams:
        stream.leave()
    server.until_metric("inlaid:kv_blocks_used", 0)
    server.until_metric("vllm:num_requests_running", 0)
    assert server.metric("vllm:request_success_total") == before + 6


def test_a_client_that_leaves_before_its_whole_answer_is_aborted_too(server: Live) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({**LONG, "stream": False}))
    server.until_metric("vllm:num_requests_running", 1)
    connection.close()
    server.until_metric("vllm:num_requests_running", 0)


def test_clients_that_send_rubbish_or_nothing_hurt_nobody(server: Live) -> None:
    rubbish = [b"", b"\x00" * 100, b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"]
    for data in rubbish * 10:
        with socket.create_connection(server.address, timeout=10) as connection:
            connection.sendall(data)
    assert server.ask("GET", "/health").status == 200


def test_a_killed_engine_fails_what_is_in_flight_and_comes_back(server: Live) -> None:
    stream = Stream(server, LONG)
    assert stream.event()["choices"]
    [engine] = server.children()
    os.kill(engine, signal.SIGKILL)
    event = stream.event()
    while event is not None and "error" not in event and event != "done":
        event = stream.event()
    assert event is not None
    assert "the engine process ended with status -9" in event["error"]["message"]
    assert stream.event() == "done"
    stream.close()
    health = server.ask("GET", "/health")
    if health.status != 200:  # it may be back already
        assert health.status == 503
        assert health.json["error"]["code"] == "engine_unavailable"
        assert "Retry-After" in health.headers
        assert server.ask("POST", "/v1/completions", {"prompt": "a"}).status == 503
    while server.ask("GET", "/health").status != 200:
        time.sleep(0.1)
    assert server.ask("GET", "/health").json["restarts"] == 1
    assert server.ask("POST", "/v1/completions", {"model": "to_velar", "prompt": "a"}).status == 200
    assert server.metric("inlaid:engine_restarts") == 1


def test_with_few_descriptors_idle_connections_make_room_and_the_engine_comes_back() -> None:
    with ExitStack() as open_, serving(max_descriptors=100) as server:
        short = {**LONG, "max_tokens": 5, "temperature": 0, "stream": False}
        before = server.ask("POST", "/v1/completions", short).json["choices"]
        for number in range(150):
            open_.enter_context(socket.create_connection(server.address, timeout=60))
            if number % 30 == 0:
                assert server.ask("GET", "/health").status == 200
        [engine] = server.children()
        os.kill(engine, signal.SIGKILL)
        while (health := server.ask("GET", "/health")).status != 200 or health.json["restarts"] != 1:
            time.sleep(0.05)
        assert server.ask("POST", "/v1/completions", short).json["choices"] == before


@pytest.mark.parametrize(
    "body", [gzip.compress(bytes(256 << 20), 9), gzip.compress(b"") * 50_000], ids=["large", "many members"]
)
def test_a_gzip_bomb_is_refused_before_it_is_large(server: Live, body: bytes) -> None:
    status = Path(f"/proc/{server.process.pid}/status")

    def peak() -> int:
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])

    before = peak()
    answer = server.ask("POST", "/v1/completions", headers={"Content-Encoding": "gzip"}, raw=body)
    assert answer.status in (400, 413)
    assert peak() < before + (64 << 10)
    assert server.ask("GET", "/health").status == 200


def test_who_can_no_longer_be_served_in_time_is_refused() -> None:
    """The first is let in, as nothing is known of the pace yet; who waits behind it is too late when it has ended."""
    with serving("--policy", "slo:seconds=0.1,late=refuse", "--max-num-seqs", "1") as server:
        stream = Stream(server, {**LONG, "max_tokens": 150, "prompt": [[5, 6, 7], [5, 6, 8]]})
        assert stream.response.status == 200
        events = list(iter(stream.event, "done"))
        stream.close()
        assert [event["choices"][0]["finish_reason"] for event in events[-2:-1]] == ["length"]
        assert events[-1]["error"]["code"] == "rate_limit_exceeded"
        late = server.ask("POST", "/v1/completions", {**LONG, "stream": False})  # it takes longer than that, alone
        assert (late.status, late.json["error"]["type"]) == (429, "rate_limit_error")
        assert "deadline can no longer be met" in late.json["error"]["message"]
        assert int(late.headers["Retry-After"]) >= 1
        in_time = {"prompt": "a", "max_tokens": 1, "deadline": 600}
        assert server.ask("POST", "/v1/completions", in_time).status == 200


@contextmanager
def full_house(server: Live, key: dict[str, str]) -> Any:
    """Two long requests: one runs and one waits, and that is all the server takes."""
    first = Stream(server, LONG, key)
    first.event()
    second = http.client.HTTPConnection(*server.address, timeout=60)
    second.request("POST", "/v1/completions", json.dumps(LONG), key)
    server.until_metric("vllm:num_requests_waiting", 1)
    yield
    first.leave()
    second.close()


def test_keys_a_full_queue_and_exit_when_the_engine_dies() -> None:
    key = {"Authorization": "Bearer sesame"}
    flags = ["--max-num-seqs", "1", "--max-num-waiting", "1", "--on-engine-death", "exit"]
    with serving(*flags, environment={"INLAID_API_KEY": "sesame,other"}) as server:
        refused = server.ask("POST", "/v1/completions", {"prompt": "a"})
        assert (refused.status, refused.json["error"]["code"]) == (401, "invalid_api_key")
        assert server.ask("GET", "/v1/models").status == 401
        assert server.ask("GET", "/health").status == 200
        assert server.ask("POST", "/v1/load_lora_adapter", {}, key).status == 403
        with full_house(server, key):
            late = server.ask("POST", "/v1/completions", {"prompt": "a"}, key)
            assert late.status == 429
            assert int(late.headers["Retry-After"]) >= 1
            assert late.json["error"]["code"] == "rate_limit_exceeded"
            streamed = server.ask("POST", "/v1/completions", {"prompt": "a", "stream": True}, key)
            assert streamed.status == 429
        server.until_metric("vllm:num_requests_running", 0)
        assert server.ask("POST", "/v1/completions", {"prompt": "a"}, key).status == 200
        [engine] = server.children()
        os.kill(engine, signal.SIGKILL)
        assert server.process.wait(60) == 1


def test_sigterm_lets_requests_finish_and_takes_no_new_ones() -> None:
    with serving(forked=False) as server:
        stream = Stream(server, {**LONG, "max_tokens": 150})
        stream.event()
        server.process.send_signal(signal.SIGTERM)
        while (ready := server.ask("GET", "/ready")).status == 200:
            time.sleep(0.01)
        assert ready.status == 503
        new = server.ask("POST", "/v1/completions", {"prompt": "a"})
        assert (new.status, "Retry-After" in new.headers) == (503, True)
        events = []
        while (event := stream.event()) is not None:
            events.append(event)
        stream.close()
        assert events[-1] == "done"
        assert events[-2]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0


def test_a_second_signal_ends_at_once_and_takes_the_engine_along() -> None:
    with serving("--drain-timeout", "600") as server:
        stream = Stream(server, LONG)
        stream.event()
        [engine] = server.children()
        server.process.send_signal(signal.SIGTERM)
        while server.ask("GET", "/ready").status == 200:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 1
        stream.close()
        while os.path.exists(f"/proc/{engine}"):
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--port", "PORT"], "is in use"),
        (["--allow-runtime-lora"], "--admin-key"),
        (["--port", "99999"], "--port 99999: give a number from 0 to 65535"),
    ],
)
def test_what_cannot_be_started_is_said_in_one_line(server: Live, flags: list[str], sentence: str) -> None:
    flags = [str(server.address[1]) if flag == "PORT" else flag for flag in flags]
    ended = subprocess.run(
        [sys.executable, "-m", "inlaid", "serve", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert sentence in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
