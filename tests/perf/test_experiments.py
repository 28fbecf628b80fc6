"""The ready-made templates: all of them instantiate, and the demo-size ones run on the real server."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path

import msgspec
import pytest

from inlaid.workload.plan import plan
from inlaid.workload.prompts import LengthsOnly
from inlaid.workload.suites import load_suite
from perf.archive import Archive
from perf.known_flags import why_not
from perf.process import ROOT
from perf.records import Record, read_records
from perf.runner import main
from perf.template import Instance, instantiate

FOLDER = ROOT / "perf" / "experiments"
FULL = sorted(path.stem for path in FOLDER.glob("*.toml") if not path.stem.startswith("demo-"))
DEMOS = sorted(path.stem for path in FOLDER.glob("demo-*.toml"))
SERVED = [  # ten seconds each; every template's flags are read by the test of instances
    pytest.param(name, marks=() if name == "demo-vtc" else pytest.mark.long) for name in DEMOS if name != "demo-grid"
]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_figure_has_a_template_and_a_demo_size() -> None:
    assert set(FULL) == {
        "inlaid-tasks", "inlaid-slo", "inlaid-paper", "vtc", "vtc-rate-limits", "toppings", "slora", "scaling",
    }  # fmt: skip
    assert {f"demo-{name}" for name in FULL} < set(DEMOS)


@cache
def points_of(name: str) -> tuple[Instance, ...]:
    """Return a template's points; those of vtc take two seconds."""
    return tuple(instantiate(FOLDER / f"{name}.toml"))


@pytest.mark.parametrize("name", [*FULL, *DEMOS])
def test_every_template_instantiates(name: str) -> None:
    points = points_of(name)
    assert points
    assert not any(point.refused for point in points)
    if name.startswith("demo-"):
        assert len(points) <= 12
        assert all(point.server.model == "models/demo/base" for point in points)


def test_vtcs_suites_have_the_artifacts_numbers_of_requests() -> None:
    points = {p.labels["dataset"]: p for p in points_of("vtc")}
    counts = {
        name: round(
            sum(s.arrival.rate * (points[name].workload.seconds_of(s) or 0) for s in points[name].workload.streams)
        )
        for name in ("overload", "overload-multi", "proportional", "dist_shift", "overload-s4-35000-512")
    }
    # dist_shift's first client is silent half of its first 300 s
    assert counts == {
        "overload": 1620, "overload-multi": 1512, "proportional": 1350, "dist_shift": 1950,
        "overload-s4-35000-512": 2700,
    }  # fmt: skip


def test_vtcs_suites_are_those_of_the_simulator_on_servers_of_their_size(long: bool) -> None:
    for point in points_of("vtc")[:: 1 if long else 3]:
        suite, own = load_suite(point.labels["dataset"]), [name for name, _ in point.server.adapters]
        sent, simulated = plan(point.workload, own, LengthsOnly()), plan(suite, [], LengthsOnly())
        assert [msgspec.structs.replace(request, adapter=None) for request in sent] == simulated
        assert len({request.adapter for request in sent}) == len({request.tenant for request in simulated})
        assert 16 * int(point.server.arguments["num-blocks"]) == suite.engine.kv_tokens + -suite.engine.kv_tokens % 16


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_a_demo_runs_on_the_real_server(name: str, tmp_path: Path, long: bool) -> None:
    """Every point passes, every request is answered with the tokens asked for, and a report is made.

    The short form runs the first point, at eight requests a second; all points instantiate in the test above."""
    unknown = next(filter(None, (why_not(point.server) for point in points_of(name))), "")
    if unknown:
        pytest.skip(f"this build of the server cannot run it yet: {unknown}")
    template = tmp_path / f"{name}.toml"
    text = (FOLDER / template.name).read_text().replace("[global]", f'[global]\nlog_home = "{tmp_path}/archives"', 1)
    short = re.sub(r"^rate = .*", "rate = 8.0", text, flags=re.M)
    template.write_text(text if long else short)
    assert main(["--templates", str(template), *([] if long else ["--first", "1"])]) == 0
    (home,) = (tmp_path / "archives").iterdir()
    archive = Archive(home)
    for point, attempt in archive.passed().items():
        summary = json.loads((archive.attempt_directory(point, attempt) / "summary.json").read_text())
        assert summary["failed"] == 0
        assert summary["total_output_tokens"] == _planned(archive, point, attempt)
        if name == "demo-vtc":
            assert {record.input_len for record in _measured(archive, point, attempt)} == {16}
    assert set(archive.passed()) == set(archive.points)
    assert (home / "report.html").stat().st_size > 100_000
    shutil.rmtree(home)


def _measured(archive: Archive, point: str, attempt: int) -> list[Record]:
    records = read_records(archive.attempt_directory(point, attempt) / "summary.jsonl")
    return [record for record in records if not record.warmup]


def _planned(archive: Archive, point: str, attempt: int) -> int:
    return sum(record.planned_output_len for record in _measured(archive, point, attempt))
