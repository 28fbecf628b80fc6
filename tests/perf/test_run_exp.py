"""VTC's own commands: its flags as ours, a suite over HTTP and in the simulator, the same figures from both."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import launch_server, run_exp
from perf.process import free_port
from perf.records import Record
from perf.target import wait_until_ready
from perf.vtc_figures import outcome_of
from tests import fork_server

SUITE = """
duration_s = 1
seed = 1
each = { adapters = { distribution = "none" }, input = { value = 8 }, output = { value = 4 } }
streams = [
  { tenant = "one", arrival = { process = "fixed", rate = 10.0 } },
  { tenant = "two", arrival = { process = "fixed", rate = 20.0 } },
]

[engine]
kv_tokens = 400
"""


@pytest.fixture(scope="module")
def fake() -> Iterator[str]:
    port = free_port()
    server = fork_server.popen([sys.executable, "-m", "perf.fake_server", "--port", str(port), "--ttft-ms", "5"])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready([url], 30)
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ([], "vtc"), (["--scheduler", "slora", "--enable-abort"], "fcfs"), (["--scheduler", "lcf_fair"], "lcf"),
        (["--scheduler", "lshare_fair", "--rate-limit", "15"], "rpm:limit=15"),
    ],
)  # fmt: skip
def test_the_flags_of_the_artifact_are_ours(flags: list[str], policy: str) -> None:
    args = launch_server.parser().parse_args(
        [*flags, "--num-token", "10000", "--port", "8123", "--", "--dtype", "auto"]
    )
    made = launch_server.arguments(args)
    assert made[made.index("--policy") + 1] == policy
    assert made[made.index("--model") + 1] == "models/cache/llama-2-7b-4bit"
    assert made[made.index("--") :] == [
        "--", "--tenant", "user", "--admin-key", "vtc", "--block-size", "16", "--num-blocks", "625", "--dtype", "auto",
    ]  # fmt: skip


def test_adapters_are_made_unless_there_are_to_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_server, "MADE", tmp_path)
    parser = launch_server.parser()
    demo = ["--model-setting", "demo", "--num-adapter", "2"]
    made = launch_server.arguments(parser.parse_args(demo))
    first, second = made[made.index("--adapters") + 1 : made.index("--")]
    assert all(Path(part.partition("=")[2], "adapter_config.json").exists() for part in (first, second))
    assert "--adapters" not in launch_server.arguments(parser.parse_args([*demo, "--no-lora"]))
    with pytest.raises(SystemExit, match="is not there"):
        launch_server.arguments(parser.parse_args(["--model", str(tmp_path / "none"), "--num-adapter", "1"]))


def test_one_suite_as_the_artifact_writes_it(fake: str, tmp_path: Path) -> None:
    suite, output = tmp_path / "small.toml", tmp_path / "all_results_small.jsonl"
    suite.write_text(SUITE)
    command = ["--suite", str(suite), "--server", fake, "--output", str(output), "--no-progress"]
    assert run_exp.main(command) == 0
    assert len(output.read_text().splitlines()) == 30
    assert run_exp.main([*command, "--append"]) == 0
    lines = output.read_text().splitlines()
    assert len(lines) == 60
    assert {json.loads(line)["tenant"] for line in lines} == {"one", "two"}
    assert {path.name for path in tmp_path.iterdir()} == {suite.name, output.name, "all_results_small.json"}
    nobody = ["--suite", str(suite), "--server", f"http://127.0.0.1:{free_port()}", "--output", str(output)]
    assert run_exp.main([*nobody, "--ready-timeout", "0"]) == 2
    assert output.read_text().splitlines() == lines, "a run that fails takes nothing away"


def test_figures_come_from_the_simulator_and_from_records(tmp_path: Path) -> None:
    suite, out = tmp_path / "small.toml", tmp_path / "out"
    suite.write_text(SUITE)
    command = ["--suite", str(suite), "--policies", "fcfs;vtc;rpm:limit=5;rpm:limit=20", "--out", str(out)]
    assert run_exp.main([*command, "--figures", "--simulate"]) == 0
    page = (out / "figures.md").read_text()
    assert page.count("| vtc |") == 1
    for picture in ("-difference.png", "-limits.png"):
        assert list(out.rglob(f"*{picture}")), picture


def test_a_live_run_is_an_outcome() -> None:
    """Two tenants wait from 0 to 4; one is served 10 + 2 x 2 in its second second, the other in its fourth."""
    records = [
        Record(
            index=number, adapter=None, tenant=tenant, service_class="", due=10.0, sent=10.0,
            finished=10.5 + first, status="ok", input_len=10, output_len=2, planned_output_len=2, ttft=first,
            itls=[0.25],
        )
        for number, (tenant, first) in enumerate((("one", 1.5), ("one", 3.75), ("two", 3.5)))
    ]  # fmt: skip
    found = outcome_of(records, "vtc")
    assert found.service == {"one": 28.0, "two": 14.0}
    assert found.largest_gap == 14.0
    assert found.gap_series[0] == (0.0, 0.0)
    assert [record.ttft for record in found.records] == [1.5, 3.75, 3.5]


def test_what_does_not_go_together_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command, reason in (
        ([], "name --output FILE"),
        (["--suite", "overlaod", "--output", "x.jsonl"], "did you mean overload?"),
        (["--suite", "all", "--output", "x.jsonl"], "--output is for one suite"),
    ):
        with pytest.raises(SystemExit):
            run_exp.main(command)
        assert reason in capsys.readouterr().err
