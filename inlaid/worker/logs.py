"""Logging of the server and of the engine process: one line for each message, as text or as JSON, whatever is in it.

A message may carry fields: `log.info("request", extra=fields(status=200))`. Text shows them as name=value, JSON as
members of the line's object.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

LEVELS = MappingProxyType(
    {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
)
_LEVEL, _FORM = "INLAID_LOG_LEVEL", "INLAID_LOG_FORMAT"
NAME = "INLAID_LOG_NAME"  # by which a child process calls itself in its lines
_FIELDS = "inlaid_fields"


class OneLine(logging.Formatter):
    """Escapes line ends and other control characters in messages, so that a name or a file cannot forge a line. The
    traceback of a defect stays as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message without its traceback."""
        shown = [f"{name}={_quoted(value)}" for name, value in _fields_of(record).items() if value is not None]
        record.message = " ".join([escaped(record.message), *shown])
        return super().formatMessage(record)


class JsonLine(logging.Formatter):
    """Writes a record as one JSON object: time, level, process, logger, message, its fields, and its traceback."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def fields(**values: Any) -> Mapping[str, Any]:
    """Return what a logging call takes as `extra` to carry these fields."""
    return {_FIELDS: values}


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, _FIELDS, {})
    return found


def _quoted(value: object) -> str:
    """Return a value so that a space or an equals sign in it cannot be taken for the next field's."""
    text = f"{value:.3f}" if isinstance(value, float) else escaped(str(value))
    return json.dumps(text, ensure_ascii=False) if not text or set(text) & set(' ="') else text


def escaped(text: str) -> str:
    """Return a text with every unprintable character as the escape that Python writes for it."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def configure(process: str = "", level: str = "info", form: str = "text") -> None:
    """Log to stderr. `form` is text or json; `process` tells the engine's lines from the server's."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"{process}: " if process else ""
    handler.setFormatter(
        JsonLine(process or "server") if form == "json" else OneLine(f"{prefix}%(levelname)s %(message)s")
    )
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)


def environment(level: str, form: str) -> dict[str, str]:
    """Return the variables from which a child process takes these settings."""
    return {_LEVEL: level, _FORM: form}


def configure_child(process: str) -> None:
    """Log as the parent process has said, under the name that it has given, if any."""
    configure(os.environ.get(NAME, process), os.environ.get(_LEVEL, "info"), os.environ.get(_FORM, "text"))
