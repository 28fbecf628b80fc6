"""llama.cpp is no part of the installation: without it one sentence says what to install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from perf import cpu_llama


def test_without_its_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cyllama", None)
    with pytest.raises(SystemExit, match="is not here: pip install cyllama"):
        cpu_llama.measure(Path("none.gguf"), (1,), 1, 1, 1)
