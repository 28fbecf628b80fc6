"""One workload file on the simulator, on an engine in process and over HTTP: the same requests on all three."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from inlaid.sim.command import main as simulate
from perf import client, in_process
from perf.process import ROOT, free_port
from perf.records import read_records
from perf.target import wait_until_ready
from tests import fork_server

WORKLOAD = """
about = "two tenants, one of them with two adapters"
seed = 7
duration_s = 2

[[streams]]
tenant = "alice"
arrival = { process = "poisson", rate = 6 }
adapters = { distribution = "zipf" }
input = { kind = "uniform", low = 4, high = 20 }
output = { kind = "uniform", low = 2, high = 8 }

[[streams]]
tenant = "bob"
arrival = { process = "fixed", rate = 3 }
adapters = { distribution = "none" }
input = { value = 6 }
output = { value = 4 }

[classes.default]
e2el_ms = 60000

[adapters]
names = ["maths", "medical"]
ranks = [8, 16]

[engine]
kv_tokens = 4096
max_num_seqs = 8
"""
Sent = list[tuple[float, str, str | None, int, int]]


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "two-tenants.toml"
    path.write_text(WORKLOAD)
    return path


def simulated(workload: Path, folder: Path) -> Sent:
    assert simulate(["--suite", str(workload), "--policy", "fcfs", "--no-figures", "--out", str(folder)]) == 0
    lines = (folder / f"{workload.stem}-fcfs.jsonl").read_text().splitlines()[1:]
    records = [json.loads(line) for line in lines]
    return [(round(r["arrival"], 6), r["tenant"], r["adapter"], r["prompt_len"], r["output_len"]) for r in records]


def measured(records: Path) -> Sent:
    found = sorted(read_records(records), key=lambda record: record.index)
    assert all(record.status == "ok" and record.output_len == record.planned_output_len for record in found)
    return [(r.due, r.tenant, r.adapter, r.input_len, r.planned_output_len) for r in found]


def over_http(workload: Path, out: Path) -> Sent:
    """Send to the scripted server, whose other adapter the workload leaves alone."""
    port = free_port()
    command = [sys.executable, "-m", "perf.fake_server", "--port", str(port), "--ttft-ms", "1", "--itl-ms", "1"]
    names = [part for name in ("code", "medical", "maths") for part in ("--adapter", f"{name}=x")]
    server = fork_server.popen([*command, *names], cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready([url], 30)
        flags = ["--base-url", url, "--workload", str(workload), "--out", str(out), "--no-progress"]
        assert client.main(flags) == 0
    finally:
        server.terminate()
        server.wait()
    return measured(out.with_suffix(".jsonl"))


def test_simulator_engine_and_http_get_the_same_requests(workload: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine.json"
    assert in_process.main(["--workload", str(workload), "--device", "cpu", "--out", str(out)]) == 0
    sent = measured(out.with_suffix(".jsonl"))
    assert len(sent) > 12
    assert {adapter for _, _, adapter, _, _ in sent} == {None, "maths", "medical"}
    assert sent == simulated(workload, tmp_path / "simulated")
    assert sent == over_http(workload, tmp_path / "http.json")
    assert json.loads(out.read_text())["slo"]["attainment"] == 1.0


def test_an_adapter_that_is_not_served_is_refused_by_name(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload.write_text(WORKLOAD.replace('"medical"', '"poetry"'))
    assert in_process.main(["--workload", str(workload)]) == 2
    assert "made for adapter 'poetry', which is not served" in capsys.readouterr().err


def test_an_answer_of_hidden_length_ends_where_the_plan_says(tmp_path: Path) -> None:
    path, out = tmp_path / "tasks.toml", tmp_path / "run.json"
    kinds = "[ { input = 12, output = 5, sigma = 0.3 }, { input = 20, output = 9, sigma = 0.3 } ]"
    path.write_text(f"duration_s = 1.0\n[tasks]\ncount = 4\nrate = 16.0\nmax_tokens = 40\nkinds = {kinds}\n")
    assert in_process.main(["--workload", str(path), "--device", "cpu", "--out", str(out)]) == 0
    assert len(measured(out.with_suffix(".jsonl"))) > 3
