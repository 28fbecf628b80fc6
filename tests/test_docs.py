"""docs/architecture.md names every file of the package, and no file that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_architecture_has_a_line_for_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = set(re.findall(r"^- `(inlaid/[\w/]+\.py)` ", text, flags=re.MULTILINE))
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "inlaid").rglob("*.py")}
    files -= {name for name in files if name.endswith("__init__.py")}
    assert sorted(files - listed) == [], "not in docs/architecture.md"
    assert sorted(listed - files) == [], "in docs/architecture.md, but not there"
