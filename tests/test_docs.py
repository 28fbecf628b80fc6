"""The pages name what is there: docs/architecture.md every folder of the package, and no page a file that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "inlaid"


def test_architecture_names_what_is_there_and_nothing_else() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`(?:inlaid/)?((?:\w+/)*\w+(?:\.py|/))`", text))
    gone = sorted(name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists())
    assert gone == [], "in docs/architecture.md, but not there"
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert sorted(folders - named) == [], "folders of the package that docs/architecture.md does not name"


def test_pages_name_files_that_exist() -> None:
    pages = [page for folder in (".", "docs", "perf", "eval", "perf/results") for page in (ROOT / folder).glob("*.md")]
    pattern = re.compile(r"`((?:inlaid|eval|perf|data|models|tests|docs|third_party)/[\w./-]+)`")
    named = {(page.relative_to(ROOT), name) for page in pages for name in pattern.findall(page.read_text())}
    gone = sorted(f"{page}: {name}" for page, name in named if not (ROOT / name).exists())
    assert gone == [], "named in a page, but not there"
