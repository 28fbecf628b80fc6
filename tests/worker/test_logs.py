"""Log lines: one for each message."""

from __future__ import annotations

import json
import logging

import pytest

from inlaid.worker import logs
from inlaid.worker.logs import JsonLine, OneLine, escaped, fields


def test_a_text_cannot_forge_a_line() -> None:
    record = logging.LogRecord("n", logging.ERROR, "", 0, "%s is refused", ("a\nINFO all is well\x1b[0m é",), None)
    assert OneLine("%(levelname)s %(message)s").format(record) == r"ERROR a\nINFO all is well\x1b[0m é is refused"


def test_half_a_character_is_shown_as_its_escape() -> None:
    assert escaped(chr(0xD800)) == r"\ud800"


def record_of(message: str, **values: object) -> logging.LogRecord:
    record = logging.LogRecord("inlaid.access", logging.INFO, "", 0, message, (), None)
    record.__dict__.update(fields(**values))
    return record


def test_fields_are_told_apart_in_a_line_of_text() -> None:
    record = record_of("request", status=200, seconds=0.5, tenant='a b=" \n', finish=None, model="")
    assert OneLine("%(levelname)s %(message)s").format(record) == (
        r'INFO request status=200 seconds=0.500 tenant="a b=\" \\n" model=""'
    )


def test_a_line_of_json_is_one_object() -> None:
    record = record_of("two\nlines", status=200, tenant="é\n")
    line = JsonLine("engine").format(record)
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed.pop("time").endswith("Z")
    assert parsed == {
        "level": "info",
        "process": "engine",
        "logger": "inlaid.access",
        "message": "two\nlines",
        "status": 200,
        "tenant": "é\n",
    }


def test_a_child_logs_as_its_parent_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}
    monkeypatch.setattr(logs, "configure", lambda *arguments: said.update(arguments=arguments))
    for name, value in logs.environment("warning", "json").items():
        monkeypatch.setenv(name, value)
    logs.configure_child("engine")
    assert said == {"arguments": ("engine", "warning", "json")}
