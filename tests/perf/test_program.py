"""perf.program: which sequence gets which adapter, what the files say, and what bad flags are told; the chains of
perf.programs.versus as a program and as calls."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from perf import program
from perf.programs import chains, versus


@pytest.mark.parametrize("kind", program.KINDS)
def test_adapters_of_one_rank_are_spread_by_kind(kind: str) -> None:
    chosen = program.which(kind, 9, random.Random(1))
    assert len(chosen) == 9
    assert chosen == sorted(chosen)
    if kind == "distinct":
        assert chosen == list(range(9))
    else:
        assert set(chosen) <= set(range(3 if kind == "uniform" else 1))


def test_sequences_without_an_adapter_come_first() -> None:
    flags = ["--lora_ranks=8,16", "--num_seqs_per_adapter=2,1", "--batch_size=5", "--request_type=distinct"]
    assert program.adapters_of(program.parser().parse_args(flags)) == [None, None, (8, 0), (8, 1), (16, 0)]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora_ranks=8"], "as many numbers"),
        (["--lora_ranks=8", "--num_seqs_per_adapter=2"], "--batch_size only 1"),
        (["--opt_config=/nowhere.json"], "nowhere.json"),
    ],
)
def test_flags_that_do_not_fit_end_with_status_2(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(flags) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("fused", [True, False])
def test_the_files_have_labelled_times_of_each_phase(tmp_path: Path, fused: bool) -> None:
    out = tmp_path / "times.txt"
    flags = ["--lora_ranks=4,8", "--num_seqs_per_adapter=1,1", "--batch_size=3", "--gen_len=3", "--warmup_trials=1"]
    assert program.main([*flags, "--measure=True", f"--measure_dest={out}", f"--fuse_decode={fused}"]) == 0
    lines = out.read_text().splitlines()
    assert all(line.startswith("trial 0 step ") and " ms, " in line for line in lines)
    found = json.loads(out.with_suffix(".json").read_text())
    steps = found["trials"][0]["steps"]
    assert [step["phase"] for step in steps] == ["prefill", "decode", "decode"] * (1 if fused else 3)
    assert {step["adapters"] for step in steps} == ({3} if fused else {1})


def test_chains_are_the_same_calls_as_a_program() -> None:
    made = chains.make_chains(["r16-a", "r16-b"], "r16-a", "distinct", 20, chains.plain_words, "e")
    body = made.body()
    assert len([node for node in body["nodes"] if node["kind"] == "generate"]) == 60
    assert set(body["inputs"]) == {f"text{number}" for number in range(20)}
    assert made.texts[-1] == made.texts[0]
    assert made.adapters[-1] == made.adapters[0], "an input that repeats has its adapter, so that its calls are equal"


@pytest.mark.long
def test_the_comparison_runs_on_the_demo(tmp_path: Path) -> None:
    for part in versus.PARTS:
        assert versus.main(["--inputs", "9", "--repeats", "1", "--only", part, "--out", str(tmp_path / "p.json")]) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    assert len(found["rows"]) == 6
    assert [each["kind"] for each in found["switches"]] == list(chains.KINDS)
    assert set(found["provenance"]) == set(versus.PARTS)
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "p.md", "p.png"}
