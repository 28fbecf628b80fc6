"""The page's files: small, ours or named in the notice, and without an address of another host."""

from __future__ import annotations

import re

from inlaid.console.static import FOLDER, HEADERS, read_files


def test_the_page_is_under_150_kb_gzipped() -> None:
    files = read_files()
    there = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert there - files.keys() == {"vendor/NOTICE"}
    assert sum(len(file.packed) for file in files.values()) < 150_000


def test_no_file_of_ours_names_another_host_or_makes_markup_of_text() -> None:
    for name, file in read_files().items():
        text = file.plain.decode()
        if not name.startswith("vendor/"):
            assert re.findall(r"""["'(=]\s*(?:https?:)?//(?!www\.w3\.org/2000/svg)""", text) == [], name
            assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text) == []


def test_every_vendored_file_is_in_the_notice() -> None:
    notice = (FOLDER / "vendor" / "NOTICE").read_text()
    vendored = [path.name for path in (FOLDER / "vendor").iterdir() if path.name != "NOTICE"]
    assert len(vendored) == 3
    assert [name for name in vendored if name not in notice] == []


def test_the_policy_lets_no_script_of_others_run() -> None:
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy
