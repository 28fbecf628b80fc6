"""Log lines: one for each message."""

from __future__ import annotations

import logging

from inlaid.worker.logs import OneLine, escaped


def test_a_text_cannot_forge_a_line() -> None:
    record = logging.LogRecord("n", logging.ERROR, "", 0, "%s is refused", ("a\nINFO all is well\x1b[0m é",), None)
    assert OneLine("%(levelname)s %(message)s").format(record) == r"ERROR a\nINFO all is well\x1b[0m é is refused"


def test_half_a_character_is_shown_as_its_escape() -> None:
    assert escaped(chr(0xD800)) == r"\ud800"
