"""Workload files: suites by name, files that extend others, defaults for each stream, and mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlaid.workload.plan import plan
from inlaid.workload.prompts import LengthsOnly
from inlaid.workload.spec import Workload
from inlaid.workload.suites import load_suite, load_workload, suite_names


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_says_what_it_is_and_has_requests(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.about
    assert suite.engine.kv_tokens
    assert plan(suite, suite.adapter_names, LengthsOnly())


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_extends_a_suite_and_changes_what_it_says(tmp_path: Path) -> None:
    source = written(tmp_path / "mine.toml", 'extends = "overload"\nduration_s = 10\n[each]\noutput = { value = 7 }\n')
    mine, suite = load_workload(source), load_suite("overload")
    assert (mine.name, mine.duration_s, mine.about) == ("mine", 10, suite.about)
    assert {stream.output.value for stream in mine.streams} == {7}
    assert {stream.input.value for stream in mine.streams} == {256}
    assert [stream.arrival for stream in mine.streams] == [stream.arrival for stream in suite.streams]


def test_a_file_extends_one_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "base.toml", "[[streams]]\nnum_requests = 3\n[engine]\nkv_tokens = 64\nmax_loras = 2\n")
    mine = load_workload(written(tmp_path / "mine.toml", 'extends = "base.toml"\n[engine]\nmax_loras = 5\n'))
    assert (mine.engine.kv_tokens, mine.engine.max_loras, len(mine.streams)) == (64, 5, 1)


def test_a_stream_lasts_as_long_as_the_workload_unless_it_says_otherwise(tmp_path: Path) -> None:
    text = "duration_s = 9\nstreams = [{}, { start_s = 4 }, { duration_s = 2 }, { num_requests = 5 }]\n"
    workload = load_workload(written(tmp_path / "mine.toml", text))
    assert [workload.seconds_of(stream) for stream in workload.streams] == [9, 5, 2, None]


def test_a_workload_names_its_adapters_or_takes_those_served() -> None:
    some = load_suite("zipf-adapters")
    assert (some.adapter_names[:2], len(some.adapter_names)) == (["adapter-0000", "adapter-0001"], 256)
    assert set(load_suite("tasks-10").adapter_ranks.values()) == {8, 16, 32, 64}
    assert some.adapters_among(["x", "y"]) == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "mine.toml"', "extends itself"),
        ('extends = "no-such"', "does not exist: name a file or a suite"),
        ("duration_s = 5", "at least one stream, or"),
        ('extends = "tasks-10"\n[[streams]]\nnum_requests = 1', "only one of the three"),
        ('extends = "overload"\nduration_s = -1', "duration_s must be above 0"),
        ('extends = "overload"\nspeed = 2', "unknown field `speed`"),
        ('extends = "tasks-10"\n[tasks]\ncount = 0', "tasks need count >= 1"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        load_workload(written(tmp_path / "mine.toml", text))


def test_an_unknown_suite_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown suite 'overlode': did you mean overload"):
        load_suite("overlode")


def test_what_a_runner_writes_is_read_again() -> None:
    import msgspec

    suite = load_suite("real")
    assert msgspec.json.decode(msgspec.json.encode(suite), type=Workload) == suite
