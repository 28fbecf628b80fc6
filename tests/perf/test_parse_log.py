"""Averages of a server's log: both forms of lines, lines that are none, and logs without a request."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from inlaid.worker import logs
from perf import parse_log

FIELDS = [
    {"id": f"r{n}", "model": "a model", "error": None, "queue_seconds": 0.01 * n, "adapter_seconds": 0.004,
     "adapter_read_seconds": 0.001, "adapter_copy_seconds": 0.002, "adapter_wait_seconds": 0.001,
     "prefill_seconds": 0.02, "decode_seconds": 0.3, "first_token_seconds": 0.02 + 0.01 * n}
    for n in range(5)
]  # fmt: skip


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_lines_that_the_server_writes_are_averaged(form: str, tmp_path: Path) -> None:
    formatter = logs.JsonLine("server") if form == "json" else logs.OneLine("%(levelname)s %(message)s")
    lines = [
        "INFO start-up: weights 17.8 s",
        "{ no JSON",
        '{"message": "request", "status": 404}',
        "INFO request status=404",
    ]
    for fields in FIELDS:
        record = logging.LogRecord("x", logging.INFO, "", 0, "request", (), None)
        record.__dict__.update(logs.fields(**fields))
        lines.append(formatter.format(record))
    (log := tmp_path / "on-demand.log").write_text("\n".join(lines))
    found = parse_log.averages(log, skip=1)
    assert found == pytest.approx(
        {"requests": 4, "queue": 25.0, "adapter": 4.0, "adapter_read": 1.0, "adapter_copy": 2.0, "adapter_wait": 1.0,
         "prefill": 20.0, "decode": 300.0, "first_token": 45.0}
    )  # fmt: skip


def test_a_table_has_a_line_for_each_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cached", "on-demand"):
        (tmp_path / f"{name}.log").write_text(
            "".join(json.dumps({"message": "request"} | each) + "\n" for each in FIELDS)
        )
    assert parse_log.main([str(tmp_path / "cached.log"), str(tmp_path / "on-demand.log"), "--skip", "0"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    parts = (
        "queue",
        "adapter",
        "adapter read",
        "adapter copy",
        "adapter wait",
        "prefill",
        "decode",
        "host",
        "first token",
    )
    assert head == f"| log | requests | {' | '.join(f'{part} ms' for part in parts)} |"
    values = "5 | 20.00 | 4.00 | 1.00 | 2.00 | 1.00 | 20.00 | 300.00 | - | 40.00"
    assert rows == [f"| {name} | {values} |" for name in ("cached", "on-demand")]


def test_requests_of_the_client_are_known_by_their_numbers(tmp_path: Path) -> None:
    ids = ("perf-3", "perf--1", "else", "perf-3")
    lines = [
        {"message": "request", "request_id": name, "queue_seconds": 0.1 * n, "host_seconds": None}
        for n, name in enumerate(ids)
    ]
    (log := tmp_path / "server.log").write_text("\n".join(map(json.dumps, lines)))
    assert parse_log.spans(log) == {3: {"queue": pytest.approx(0.3)}, -1: {"queue": pytest.approx(0.1)}}


def test_a_log_without_requests_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.log").write_text("INFO nothing\n")
    assert parse_log.main([str(tmp_path / "empty.log")]) == 2
    assert "no line of an answered request" in capsys.readouterr().err
    assert parse_log.main([str(tmp_path / "none.log")]) == 2
