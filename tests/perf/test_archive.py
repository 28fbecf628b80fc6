"""The archive: whole or absent, and a checkpoint that can be cut anywhere."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inlaid.workload.spec import Stream, Workload
from perf.archive import Archive, Event, create_archive
from perf.instance import Instance
from perf.launch import ServerCommand


def instance(point: str) -> Instance:
    return Instance(point, {}, ServerCommand("fake", "m"), Workload([Stream(num_requests=1)]), {})


def made(tmp_path: Path, points: int = 2) -> Archive:
    return create_archive(tmp_path, "t", [], [instance(f"p{i}/x-{i}") for i in range(points)])


def test_two_archives_of_one_second_are_two(tmp_path: Path) -> None:
    assert made(tmp_path).home != made(tmp_path).home
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_instance_comes_back_as_it_was(tmp_path: Path) -> None:
    assert made(tmp_path).instance("p1/x-1") == instance("p1/x-1")


HISTORY = [
    Event("started", "t", "p0", 1), Event("failed", "t", "p0", 1, 2.0, "why"), Event("started", "t", "p0", 2),
    Event("passed", "t", "p0", 2), Event("started", "t", "p1", 1), Event("resumed", "t", revision="abc"),
]  # fmt: skip


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000))
def test_a_checkpoint_cut_anywhere_loses_only_the_line_it_was_cut_in(tmp_path: Path, cut: int) -> None:
    """And what is written after it is read back: the stump does not swallow the next line."""
    archive = made(tmp_path, 1)
    lines = [msgspec.json.encode(event) + b"\n" for event in HISTORY]
    data = b"".join(lines)[: cut % (len(b"".join(lines)) + 1)]
    archive.checkpoint.write_bytes(data)
    whole = data.count(b"\n")
    assert archive.events() == HISTORY[:whole]
    with archive.held():
        archive.append("forced")
        archive.append("started", point="p0", attempt=9)
    assert [event.attempt for event in archive.events()] == [9]
    assert archive.checkpoint.read_bytes().startswith(b"".join(lines[:whole]))


def test_who_has_passed_and_who_was_cut_off(tmp_path: Path) -> None:
    archive = made(tmp_path)
    archive.checkpoint.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in HISTORY))
    assert archive.passed() == {"p0": 2}
    assert archive.unfinished() == [HISTORY[4]]


def test_attempts_are_numbered_on(tmp_path: Path) -> None:
    archive = made(tmp_path)
    assert [archive.new_attempt("p0/x-0")[0] for _ in range(3)] == [1, 2, 3]


def test_a_folder_without_points_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an archive"):
        Archive(tmp_path)
