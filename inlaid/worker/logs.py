"""Logging of the server and of the engine process: one line for each message, whatever text is in it."""

from __future__ import annotations

import logging
import sys


class OneLine(logging.Formatter):
    """Escapes line ends and other control characters in messages, so that a name or a file cannot forge a line. The
    traceback of a defect stays as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message without its traceback."""
        record.message = escaped(record.message)
        return super().formatMessage(record)


def escaped(text: str) -> str:
    """Return a text with every unprintable character as the escape that Python writes for it."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def configure(prefix: str = "") -> None:
    """Log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(f"{prefix}%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
