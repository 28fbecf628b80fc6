"""The log of a live server: a line for each request that matters, and for each change."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from perf import parse_log
from tests.server.live import Live

ASK = {"model": "maths", "prompt": "a secret", "max_tokens": 3, "temperature": 0, "ignore_eos": True}


def line_of(server: Live, pattern: str) -> str:
    """Return the last line of the log that matches, once there is one."""
    end = time.monotonic() + 30
    while not (found := [line for line in server.log if re.search(pattern, line)]):
        assert time.monotonic() < end, f"no line matches {pattern}; the last: {list(server.log)[-3:]}"
        time.sleep(0.01)
    return found[-1]


def test_an_answer_is_a_line_with_its_counts_and_without_its_text(server: Live) -> None:
    answer = server.ask("POST", "/v1/completions", ASK | {"request_id": "log-1"}, {"X-Request-Id": "mine-1"})
    assert answer.status == 200
    line = line_of(server, "id=cmpl-log-1 ")
    assert line.startswith("INFO request method=POST path=/v1/completions status=200 seconds=")
    for field in (
        "peer=127.0.0.1",
        "request_id=mine-1",
        "model=maths",
        "answers=1",
        "output_tokens=3",
        "finish=length",
    ):
        assert f" {field}" in line
    assert f" prompt_tokens={answer.json['usage']['prompt_tokens']} " in line
    assert "secret" not in line


def test_a_stream_is_a_line_at_its_end(server: Live) -> None:
    assert server.ask("POST", "/v1/completions", ASK | {"request_id": "log-2", "stream": True}).status == 200
    assert " output_tokens=3 " in line_of(server, "id=cmpl-log-2 ")


@pytest.mark.parametrize("stream", [False, True])
def test_the_parts_of_a_requests_seconds_add_up(server: Live, stream: bool, tmp_path: Path) -> None:
    body = ASK | {"request_id": f"parts-{stream}", "stream": stream, "max_tokens": 8}
    assert server.ask("POST", "/v1/completions", body).status == 200
    (log := tmp_path / "some.log").write_text(line_of(server, f"id=cmpl-parts-{stream} ") + "\n")
    (fields,) = parse_log.requests(log)
    whole, first, queue, adapter, prefill, decode = (
        float(fields[f"{name}seconds"]) for name in ("", "first_token_", "queue_", "adapter_", "prefill_", "decode_")
    )
    assert first == pytest.approx(queue + prefill, abs=0.002)
    assert 0 <= adapter <= queue
    parts = [float(fields[f"adapter_{name}_seconds"]) for name in ("read", "copy", "wait")]
    assert sum(parts) == pytest.approx(adapter, abs=1e-6)
    assert 0 < float(fields["host_seconds"]) < whole + 0.1
    assert prefill > 0
    assert 0 < decode <= whole - first + 0.002


def test_a_refusal_is_a_line_with_its_reason(server: Live) -> None:
    assert server.ask("POST", "/v1/completions", ASK | {"model": "nobody"}).status == 404
    assert """ error="model 'nobody' does not exist here; """ in line_of(server, "status=404 .*nobody")


def test_changes_are_lines(server: Live) -> None:
    assert server.admin("PUT", "/v1/scheduler", {"max_num_waiting": 77}).status == 200
    line_of(server, 'INFO the scheduler is changed by="admin key, 127.0.0.1" max_num_waiting=77$')
    assert server.admin("PUT", "/v1/scheduler", {"max_num_waiting": 4096}).status == 200
    body = {"lora_name": "logged", "lora_path": "velar"}
    assert server.admin("POST", "/v1/load_lora_adapter", body).status == 200
    line_of(server, "INFO adapter is served adapter=logged path=.*velar identity=")
    assert server.admin("POST", "/v1/unload_lora_adapter", {"lora_name": "logged"}).status == 200
    line_of(server, "INFO adapter is unloaded adapter=logged in_flight=0")


def test_probes_are_not_logged_at_info(server: Live) -> None:
    assert server.ask("GET", "/health").status == 200
    server.ask("POST", "/v1/completions", ASK | {"request_id": "log-3"})
    line_of(server, "id=cmpl-log-3 ")
    assert not any("path=/health status=200" in line for line in server.log)
