"""The command: a real server in another process, flags in, files out; Ctrl-C keeps what is done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from inlaid.workload.plan import PlannedRequest
from perf.client import main, prepare
from perf.options import build_parser, workload_from
from perf.process import free_port
from perf.records import read_records
from perf.sender import Prepared
from perf.target import Target, wait_until_ready
from tests import fork_server


@pytest.fixture(scope="module")
def fake() -> Iterator[str]:
    """Start a fake server with three adapters."""
    port = free_port()
    command = [sys.executable, "-m", "perf.fake_server", "--port", str(port), "--ttft-ms", "5", "--itl-ms", "2"]
    server = fork_server.popen([*command, *(part for name in "abc" for part in ("--adapter", f"{name}=x"))])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready([url], 30)
        yield url
    finally:
        server.terminate()
        server.wait()


def run(url: str, *flags: str) -> int:
    return main(["--base-url", url, "--no-progress", *flags])


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_a_run_writes_summary_and_records(fake: str, tmp_path: Path, backend: str) -> None:
    out = tmp_path / "deep" / "run.json"
    flags = ["--rate", "200", "--num-requests", "30", "--input", "uniform:4:9", "--output", "fixed:5", "--warmup", "4"]
    assert run(fake, "--backend", backend, *flags, "--slo", "ttft_ms=5000", "--out", str(out)) == 0
    summary, records = json.loads(out.read_text()), read_records(out.with_suffix(".jsonl"))
    assert (summary["completed"], summary["failed"], summary["model_id"]) == (30, 0, "fake")
    assert set(summary["per_adapter"]) == {"a", "b", "c"}
    assert (summary["slo"]["attainment"], summary["interrupted"]) == (1.0, False)
    assert sum(record.warmup for record in records) == 4
    assert all(record.output_len == 5 and 4 <= record.input_len <= 9 for record in records)


def test_seconds_by_part_come_from_the_servers_log(
    fake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "run.json", tmp_path / "server.log"
    lines = [
        {"message": "request", "request_id": f"perf-{n}", "queue_seconds": 0.01, "host_seconds": 0.001 * n}
        for n in range(-2, 6)
    ]
    log.write_text("\n".join(map(json.dumps, lines)) + "\n")
    flags = ["--num-requests", "6", "--arrival", "burst", "--input", "fixed:4", "--output", "fixed:2"]
    assert run(fake, *flags, "--server-log", str(log), "--out", str(out)) == 0
    records = read_records(out.with_suffix(".jsonl"))
    assert {record.index: record.spans["host"] for record in records} == {n: 0.001 * n for n in range(6)}
    assert json.loads(out.read_text())["spans_ms"] == pytest.approx({"queue": 10.0, "host": 2.5})
    (empty := tmp_path / "empty.log").write_text("INFO nothing\n")
    assert run(fake, *flags, "--server-log", str(empty)) == 0
    assert "tells nothing of 6 of 6 requests" in capsys.readouterr().err


def test_slora_needs_names_and_then_works(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--backend", "slora", "--num-requests", "5", "--arrival", "burst", "--prompt-format", "words"]
    assert run(fake, *flags) == 2
    assert "S-LoRA lists no models" in capsys.readouterr().err
    assert run(fake, *flags, "--model", "m", "--adapters", "a", "b") == 0


def test_text_prompts_are_exact_by_the_servers_own_tokenizer(fake: str, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    flags = ["--prompt-format", "text", "--num-requests", "6", "--arrival", "burst", "--input", "fixed:11"]
    assert run(fake, *flags, "--output", "fixed:2", "--out", str(out)) == 0
    assert {record.input_len for record in read_records(out.with_suffix(".jsonl"))} == {11}


def test_ctrl_c_keeps_what_is_done(fake: str, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    command = [sys.executable, "-m", "perf.client", "--base-url", fake, "--arrival", "fixed", "--rate", "40"]
    command += ["--duration", "600", "--output", "fixed:3", "--out", str(out), "--no-progress"]
    client = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    records = out.with_suffix(".jsonl")
    while not (records.exists() and records.stat().st_size > 0):
        assert client.poll() is None
        time.sleep(0.02)
    client.send_signal(signal.SIGINT)
    assert client.wait(30) == 130
    summary = json.loads(out.read_text())
    assert summary["interrupted"] is True
    assert summary["completed"] == sum(record.status == "ok" for record in read_records(records)) > 0


def test_failures_above_the_share_are_an_exit_code(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-requests", "4", "--arrival", "burst", "--output", "fixed:400", "--timeout", "0.3"]
    assert run(fake, *flags, "--max-failed-share", "0.5") == 3
    assert "4 of 4 requests failed: {'timeout': 4}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "fixed:none"], "length 'fixed:none'"),
        (["--rate", "-1"], "rates must be above 0"),
        (["--rate", "inf"], "and finite"),
        (["--duration", "inf"], "both finite"),
        (["--num-requests", "0"], "num_requests must be at least 1"),
        (["--trace", "/no/such"], "dataset /no/such does not exist"),
        (["--workload", "/no/such.toml"], "workload /no/such.toml does not exist"),
        (["--slo", "ttft=3"], "unknown field `ttft`"),
        (["--slo", "ttft_ms"], "is not NAME=VALUE"),
        (["--tenant-as", "shoe-size"], "use user, none, api-key or header:NAME"),
        (["--arrival", "ramp", "--end-rate", "3"], "needs duration_s"),
        (["--base-url", "http://127.0.0.1:9"], "is the server up?"),
        (["--tokenizer", "/no/such"], "no tokenizer.json there"),
    ],
)
def test_bad_flags_are_one_clear_line(
    fake: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fake, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-connections", "0"], "--max-connections: '0' is not a whole number of at least 1"),
        (["--timeout", "-1"], "--timeout: '-1' is not a number of seconds"),
        (["--seed", "-1"], "--seed: '-1' is not a whole number"),
        (["--percentiles", "50,x"], "--percentiles: '50,x' is not a list like"),
        (["--percentiles", "101"], "--percentiles: '101' is not a list like"),
        (["--extra-body", "{"], "--extra-body: '{' is not a JSON object"),
        (["--extra-body", "[]"], "--extra-body: '[]' is not a JSON object"),
    ],
)
def test_values_that_make_no_sense_are_two_lines(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(flags)
    assert ended.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert message in error
    assert usage.startswith("usage: python -m perf.client")


def test_a_run_in_which_nothing_is_answered_fails_and_says_why(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-requests", "3", "--arrival", "burst", "--output", "fixed:400", "--timeout", "0.3"]
    assert run(fake, *flags) == 3
    error = capsys.readouterr().err
    assert "3 not answered, 3 of them so: timeout: no end within 0.3 s" in error


def test_replicas_are_taken_in_turn_or_chosen_by_adapter() -> None:
    """Five requests for a, b, c, a, b over two replicas."""
    planned = [PlannedRequest(i, 0.0, "abc"[i % 3], "t", "default", "p", 1, 1) for i in range(5)]
    urls = ["--base-url", "http://one", "http://two/"]
    target = Target("m", ["a", "b", "c"])
    for route, expected in (("round-robin", "01010"), ("adapter", "01001")):
        items = prepare(build_parser().parse_args([*urls, "--route", route]), target, planned)
        hosts = ["http://one/v1/completions", "http://two/v1/completions"]
        assert "".join(str(hosts.index(item.url)) for item in items) == expected


def test_tenants_travel_as_asked() -> None:
    planned = [PlannedRequest(0, 0.0, "a", "acme", "default", "p", 1, 1)]
    target = Target("m", ["a"])

    def item(tenant_as: str) -> Prepared:
        return prepare(build_parser().parse_args(["--tenant-as", tenant_as]), target, planned)[0]

    assert json.loads(item("user").body)["user"] == "acme"
    assert item("header:X-Tenant").headers["X-Tenant"] == "acme"
    assert item("api-key").headers["Authorization"] == "Bearer acme"
    none = item("none")
    assert b"acme" not in none.body
    assert "acme" not in str(none.headers)


def test_rates_of_adapters_add_up_to_the_streams() -> None:
    flags = ["--adapter-rates", "a=3", "b=0.5"]
    stream = workload_from(build_parser().parse_args(flags)).streams[0]
    assert (stream.arrival.rate, stream.adapters.rates) == (3.5, {"a": 3.0, "b": 0.5})
    assert workload_from(build_parser().parse_args([*flags, "--rate", "7"])).streams[0].arrival.rate == 7


def test_a_flag_that_the_file_overrules_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text("[[streams]]\nduration_s = 2\narrival = { process = 'fixed', rate = 3 }\n")
    flags = ["--workload", str(path), "--rate", "6"]
    assert workload_from(build_parser().parse_args(flags)).streams[0].arrival.rate == 6
    with pytest.raises(ValueError, match="--slo has no effect with --workload"):
        workload_from(build_parser().parse_args([*flags, "--slo", "ttft_ms=3"]))


def test_flags_make_the_stream_they_say() -> None:
    flags = ["--arrival", "gamma", "--cv", "3", "--rate", "7", "--duration", "9", "--distribution", "zipf"]
    stream = workload_from(
        build_parser().parse_args([*flags, "--alpha", "1.4", "--input", "lognormal:90:0.4"])
    ).streams[0]
    assert (stream.arrival.process, stream.arrival.cv, stream.arrival.rate) == ("gamma", 3, 7)
    assert (stream.adapters.distribution, stream.adapters.alpha, stream.duration_s) == ("zipf", 1.4, 9)
    assert stream.input.median == 90


def test_a_suites_weights_and_the_policy_are_set_before_the_run(fake: str, tmp_path: Path) -> None:
    path = tmp_path / "weighted.toml"
    path.write_text(
        'extends = "overload-weighted"\nduration_s = 0.2\n[each]\ninput = { value = 4 }\noutput = { value = 2 }\n'
    )
    assert run(fake, "--workload", str(path), "--rate", "60", "--policy", "vtc:predict=predicted") == 0
    with urllib.request.urlopen(f"{fake}/v1/scheduler") as response:
        said = json.load(response)
    assert said["policy"] == "vtc:predict=predicted"
    assert said["weights"] == {f"client-{number}": number + 1.0 for number in range(4)}
