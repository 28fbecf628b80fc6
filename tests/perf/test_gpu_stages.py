"""The stages of a GPU's bench as far as a CPU can run them: servers of a tiny model, a step taken from an engine and
run again under other choices, floors, the rounded demo, and the sweep's table."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from safetensors import safe_open

from inlaid.adapters.peft import read_adapter
from inlaid.checkpoint import Checkpoint, QuantSpec, dequantize
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.kernels import fused_triton
from inlaid.kernels.measure import Ceiling
from inlaid.layers import linear
from inlaid.model.spec import ModelSpec
from inlaid.runner.layout import Layout
from perf import gpu
from perf.gpu import (
    adapter_engine,
    candidates,
    demo,
    humming_sweep,
    latency,
    offline,
    quant_speed,
    random_model,
    sched,
    serving,
    soak,
    speculation,
    starts,
    step,
)
from perf.gpu.headlines import headline
from tests import fork_server
from tests.runner.test_cuda_runner import Bench, few_programs

__all__ = ["few_programs"]  # a fixture for all tests here: the interpreter is slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("step"), "llama-bias")


def test_all_stages_take_their_folder_from_one_place() -> None:
    command = [sys.executable, "-c", "import perf.gpu; print(perf.gpu.ROOT)"]
    environment = {**os.environ, "INLAID_BENCH_ROOT": "/elsewhere"}
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split() == ["/elsewhere"]
    assert all(stage.ROOT is gpu.ROOT for stage in (adapter_engine, demo, serving))
    assert inspect.signature(sched.run).parameters["root"].default == gpu.ROOT / "sched"


def test_adapters_are_written_side_by_side_and_differ(tmp_path: Path) -> None:
    spec = random_model.spec_of("tiny")
    first = random_model.write_adapters(tmp_path / "first", spec, 20, (2, 4))
    again = random_model.write_adapters(tmp_path / "again", spec, 20, (2, 4))
    read = [read_adapter(path, spec, torch.float32) for path in first.values()]
    assert len({adapter.identity for adapter in read}) == 20
    assert [adapter.entries[0].rank for adapter in read] == 10 * [2, 4]
    assert len(read[0].entries) == 4 * spec.num_layers
    assert [read_adapter(path, spec, torch.float32).identity for path in again.values()] == [a.identity for a in read]
    with safe_open(Path(first["a1"]) / "adapter_model.safetensors", "pt") as file:
        a = file.get_tensor("base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight")
        b = file.get_tensor("base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight")
    assert (a.shape, b.shape) == ((4, 256), (256, 4))
    assert float(a.float().std()) == pytest.approx(256**-0.5, rel=0.1)
    assert float(b.float().std()) == pytest.approx(0.01, rel=0.1)


def test_an_adapter_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "a1").write_text("a file where a folder should be")
    with pytest.raises(FileExistsError):
        random_model.write_adapters(tmp_path, random_model.spec_of("tiny"), 3, (2,))


def test_quantizing_is_timed_as_a_user_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_speed, "ROOT", tmp_path)
    monkeypatch.setattr(quant_speed, "subprocess", fork_server.stand_in())
    parser = quant_speed.options()
    default = parser.parse_args([])
    assert (default.shape, default.samples, default.length) == ("7b", 128, 2048)
    kept: list[dict[str, Any]] = []
    found = quant_speed.measure(
        parser.parse_args(["--shape", "tiny", "--samples", "4", "--length", "32", "--device", "cpu"]), kept.append
    )
    assert found["tokens"] == 4 * 32
    assert set(found["parts"]) == {"reading", "checking", "forward", "Hessians", "solving", "bank", "writing"}
    assert all(spent > 0 for spent in found["parts"].values())
    assert sum(found["parts"].values()) < found["seconds"]  # imports are in it
    sizes = [256 * 257 // 2, 256 * 257 // 2, 256 * 257 // 2, 512 * 513 // 2]  # of two blocks' Hessians, 4 bytes each
    assert found["bank_gib"] == pytest.approx(8 * sum(sizes) / 2**30, rel=0.01)
    assert headline(kept[0]).startswith(f"{found['seconds']:.1f} s (Hessians ")
    assert not list(tmp_path.iterdir())


def test_a_step_is_taken_from_the_engine_and_run_again(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = tiny.engine()
    names = ["a0", None]
    taken = step.decoding(engine, names, 3, step.runner_of(engine).model.spec.vocab_size)
    assert (taken.layout.decodes, taken.layout.prefills, taken.adapters) == (2, 0, 1)
    runner = step.runner_of(engine)
    replay = step.replayable(runner, taken)
    assert step.repeats(runner, taken, replay, 1) == 1
    choices = [
        step.Variant("as shipped"),
        step.Variant("expansions of their own", ((linear, "PENDING_ROWS", 0),)),
        step.Variant("broken", ((fused_triton, "silu_mul", None),)),
    ]
    monkeypatch.setattr(step, "time_step", lambda runner, replay: 1.0)
    shipped, other, broken = step.compare(engine, taken, choices, times=1)
    assert (shipped["error"], shipped["same_bits"], shipped["us"]) == (0.0, "1 of 1", 1.0)
    assert 0 <= other["error"] < 5e-3
    assert "TypeError" in broken["failed"]
    assert linear.PENDING_ROWS != 0
    step.leave(engine, len(names))
    assert not engine.has_work


def test_floors_of_a_decode_step_are_those_of_the_facts() -> None:
    """Llama-2-7B at 64 rows and 320 tokens: 1.07 ms of matrix work, 2.5 ms of KV, 0.25 ms of adapters."""
    spec = random_model.spec_of("7b")
    layout = Layout(64, 64, 0, 64, 0, 64, 16)
    taken = step.Step(layout, 1, torch.zeros(1), 32, 319)
    floor = step.floors(spec, QuantSpec(4, 128, True, False), taken, 16, Ceiling(4.3e12, 790e12))
    assert floor["linears"] == pytest.approx(1050, rel=0.02)
    assert floor["attention"] == pytest.approx(2497, rel=0.01)
    assert floor["adapters"] == pytest.approx(250, rel=0.01)
    assert floor["head"] == pytest.approx(61, rel=0.01)


def test_kernels_are_counted_in_their_groups() -> None:
    kernels = [
        {"kernel": "_decode_one_kernel", "us_per_step": 10.0}, {"kernel": "_merge_kernel", "us_per_step": 1.5},
        {"kernel": "void humming<Mma>", "us_per_step": 7.0}, {"kernel": "Memcpy", "us_per_step": 0.5},
    ]  # fmt: skip
    for row in kernels:
        row["group"] = step.group_of(str(row["kernel"]))
    found = step.by_group(kernels, {"attention": 9.0})
    assert found["attention"] == {"us": 11.5, "floor": 9.0}
    assert found["linears"]["us"] == 7.0
    assert found["rest"]["us"] == 0.5


def test_the_rounded_demo_is_the_demo_within_half_a_step(tmp_path: Path) -> None:
    folder = demo.rounded(tmp_path / "rounded")
    base, made = Checkpoint(demo.MODEL), Checkpoint(folder)
    name = "model.layers.1.mlp.down_proj"
    linear = made.linear(name)
    assert linear.spec == QuantSpec(4, 64, True, False)
    exact_KN = base.tensor(f"{name}.weight").float().t()
    step_KN = linear.scales.float().repeat_interleave(64, dim=0)
    inside = (dequantize(linear) - exact_KN).abs() <= 0.51 * step_KN + 1e-6
    assert inside.float().mean() > 0.95  # but for the largest, which are clamped
    assert len(made.linears) == 6 * 7


def test_what_the_cpu_said_and_the_gpu_did_not() -> None:
    cpu = {"a": ([1, 2, 3], [1.0, 0.2, 3.0]), "b": ([4], [1.0])}
    gpu = {"a": ([1, 9, 9], []), "b": ([4], [])}
    found = demo.differences(cpu, gpu)
    assert (found["equal"], found["share"]) == (1, 0.5)
    assert found["lead_at_first_difference"] == {"a": 0.2}


def test_the_sweep_keeps_what_is_best_and_what_others_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "table.json"
    monkeypatch.setattr(humming_sweep, "TUNING", table)
    found = humming_sweep.record(4096, 4096, 64, [(12.0, {"a": 0}), (15.0, {"a": 1}), (11.0, {"a": 2})])
    assert (found["own_us"], found["best_us"], found["buckets"]) == (12.0, 11.0, [48, 64])
    assert found["changes"] == {**humming_sweep.UNSET, "a": 2}
    others = [{**found, "best_us": us, **of} for us, of in ((1.0, {"ordered": False}), (2.0, {"rows": 1}))]
    table.write_text(json.dumps({"entries": [*others, {**found, "best_us": 13.0}]}))
    wrong = humming_sweep.record(4096, 4096, 16, [(float("inf"), {"a": 0})])
    humming_sweep.write([found, wrong])
    entries = json.loads(table.read_text())["entries"]
    assert [entry["best_us"] for entry in entries] == [1.0, 2.0, 11.0]
    assert not any("all" in entry for entry in entries[2:])


def test_parts_are_kept_where_they_are_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "table.json"
    monkeypatch.setattr(humming_sweep, "TUNING", table)
    whole = humming_sweep.record(4096, 4096, 64, [(12.0, {"a": 0}), (11.0, {"a": 1})])
    parts = humming_sweep.record(4096, 4096, 64, [(9.0, {"a": 2}), (10.0, {"a": 3})], whole["best_us"])
    assert (parts["own_us"], parts["best_us"], parts["parts"], parts["changes"]["a"]) == (11.0, 9.0, True, 2)
    humming_sweep.write([whole, parts])
    assert [(entry["best_us"], entry.get("parts")) for entry in entries_of(table)] == [(11.0, None), (9.0, True)]
    slower = humming_sweep.record(4096, 4096, 64, [(11.5, {"a": 2})], whole["best_us"])
    humming_sweep.write([whole, slower, humming_sweep.record(4096, 4096, 256, [], 20.0)])
    assert [entry["best_us"] for entry in entries_of(table)] == [11.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are stand-ins")
def test_the_sweep_checks_what_a_norm_makes_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kernels: one as it should be, one whose parts miss one, one whose blocks store by TMA."""
    tiles = {"block_shape": (64, 64, 64), "num_stages": 2, "num_ctas_per_sm": 1, "num_sms": 4}
    configs = [{**tiles, "a": 0}, {**tiles, "a": 1}, {**tiles, "a": 2, "use_tma": True}]
    exact = torch.randn(512, 128)

    def launch(kernel: int, x: torch.Tensor, weight: None, out_TN: torch.Tensor, top_k: int = 1) -> None:
        whole = x.float() @ exact
        if top_k == 1:
            out_TN.copy_(whole)
        else:  # the parts lie behind `out`
            parts = torch.as_strided(out_TN, (2, *out_TN.shape), (out_TN.numel(), *out_TN.stride()))
            parts[0] = whole / 3
            parts[1] = torch.nan if kernel == 1 else whole - whole / 3

    swept = object.__new__(humming_sweep.Swept)
    swept.inputs, swept.outputs, swept.kind, swept.packed, swept.exact = 512, 128, "kind", [None, None], exact
    layer = SimpleNamespace(shape_k=512, shape_n=128, weight_scale_group_size=128)
    swept.backend = SimpleNamespace(configs={"kind": layer}, launch=launch)
    compiled = [SimpleNamespace(result=lambda kernel=kernel: kernel) for kernel in range(3)]
    swept.tried = {64: list(zip(configs, compiled, strict=True))}
    monkeypatch.setattr(humming_sweep, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(humming_sweep, "REPEATS", 2)
    monkeypatch.setattr(humming_sweep, "time_calls", lambda calls, replays: float(len(calls)))
    whole, parts = swept.time_before_norm(64)
    assert [us for us, _ in whole["all"]] == [2.0] * 3
    assert [us for us, _ in parts["all"]] == [2.0, float("inf")]
    assert (parts["parts"], parts["own_us"], parts["changes"]["a"]) == (True, 2.0, 0)


def entries_of(table: Path) -> Any:
    return json.loads(table.read_text())["entries"]


@pytest.mark.parametrize("rows", humming_sweep.PART_ROWS)
def test_tiles_of_all_forms(rows: int) -> None:
    found = [
        config
        for shape in humming_sweep.BEFORE_NORMS
        for config in candidates.wide(humming_sweep.problem_of(*map(int, shape.split("x")), rows, 132))
    ]
    assert {config["num_ctas_per_sm"] for config in found} == {1, 2, 3, 4}
    assert {config["block_shape"][1] for config in found} == {64, 128, 256}
    assert any(config["block_shape"][2] == 2 * config["warp_shape"][2] for config in found)
    for config in found:
        (_, width, depth), (_, across, inner) = config["block_shape"], config["warp_shape"]
        warps = width // across * (depth // inner)
        assert config["mma_type"] == "mma" or width // across % 4 == 0
        assert config["num_ctas_per_sm"] * 32 * warps <= 1024


def test_the_sweep_times_every_shape_before_other_rows() -> None:
    first, second, *_ = humming_sweep.BUCKETS
    assert list(humming_sweep.order(["1x2", "3x4"]))[:3] == [(first, "1x2"), (first, "3x4"), (second, "1x2")]


def test_the_sweep_times_what_serves_every_bucket() -> None:
    from inlaid.kernels.humming import ROW_BUCKETS

    served = [bucket for buckets in humming_sweep.BUCKETS.values() for bucket in buckets]
    assert sorted(served) == list(ROW_BUCKETS)
    for rows, buckets in humming_sweep.BUCKETS.items():
        problem = humming_sweep.problem_of(4096, 4096, rows, 132)
        below = max([0, *(b for b in ROW_BUCKETS if b < min(buckets))])
        assert problem.below == below
        assert problem.most >= max(buckets)


def test_what_the_log_says_of_a_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x\nengine: INFO start-up: weights 2.0 s\ny\nengine: INFO start-up: imports 1 s\n")
    assert [line.split("start-up: ")[1] for line in serving.timeline(log)] == ["weights 2.0 s", "imports 1 s"]


def test_rows_of_mixed_ranks_are_compared_with_those_of_their_mean(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serving, "ROOT", tmp_path)
    asked: list[Any] = []

    def served(keep: Any, report: dict[str, Any], *arguments: Any) -> dict[str, Any]:
        _, _, adapters, max_rank, rows, more = arguments
        asked.append((sorted(adapters), max_rank, more))
        report["rows"] = [
            {"names": name, "concurrency": c, "output_tokens_per_second": 95.0 if name == "m" else 100.0}
            for name, _, c, _ in rows
        ]
        return report

    monkeypatch.setattr(serving, "served", served)
    found = serving.ranks("tiny", lambda part: None, count=4)
    assert found["mixed_over_uniform"] == {"1": 0.95, "64": 0.95, "256": 0.95}
    names, max_rank, more = asked[0]
    assert names == ["m0", "m1", "m2", "m3", "u0", "u1", "u2", "u3"]
    assert max_rank == 128
    ranks = [json.loads((tmp_path / "tiny-every-linear" / n / "adapter_config.json").read_text())["r"] for n in names]
    assert ranks == [8, 16, 40, 128, 48, 48, 48, 48]
    assert more[0] == "--adapter-memory-gib"
    assert 0.5 <= float(more[1]) < 1.0


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let the stages' models and servers run on a CPU, and answer little."""
    monkeypatch.setattr(serving, "PROMPT", 24)
    monkeypatch.setattr(serving, "OUTPUT", 6)
    monkeypatch.setattr(serving, "ROOT", tmp_path)
    monkeypatch.setattr(serving, "subprocess", fork_server.stand_in(engines=1))
    monkeypatch.setattr(starts, "subprocess", fork_server.stand_in())
    monkeypatch.setattr(serving, "DEVICE", ("--device", "cpu", "--dtype", "float32"))
    monkeypatch.setattr(offline, "DEVICE", "cpu")
    return tmp_path


def test_a_tiny_model_is_served_and_its_rows_are_kept_one_by_one(on_the_cpu: Path) -> None:
    kept: list[int] = []
    found = serving.run("tiny", [(0, 1, 1), (2, 2, 2)], (16,), lambda part: kept.append(len(part["rows"])))
    assert "error" not in found, found.get("server_log")
    assert kept == [1, 2]
    assert [(row["adapters"], row["requests"]) for row in found["rows"]] == [(0, 1), (2, 2)]
    assert all(row["output_tokens_per_second"] > 0 for row in found["rows"])
    assert any("weights" in line for line in found["start_up"])


@pytest.mark.parametrize("largest", [pytest.param(False, marks=pytest.mark.long), True])
def test_more_adapters_than_places_come_and_go_while_they_are_served(on_the_cpu: Path, largest: bool) -> None:
    """Use the bytes of two adapters of rank 16: there is room for four of rank 8."""
    rows = ((2, 2, 4), (5, 2, 10))
    found = serving.oversubscribed("tiny", (8, 16), lambda part: None, rows, largest)
    assert "error" not in found, found.get("server_log")
    few, many = found["rows"]
    assert (few["adapters"], few["requests"], few["loads"], few["evictions"]) == (2, 4, 0, 0)
    assert (many["adapters"], many["requests"]) == (5, 10)
    assert min(many["loads"], many["evictions"]) > 0
    assert few["ttft_ms"] > 0 < many["ttft_p99_ms"]
    assert found["places"] == (5 if largest else 2)


def test_steps_with_guesses_are_measured_beside_plain_ones(on_the_cpu: Path) -> None:
    found = speculation.run("tiny", lambda part: None)
    assert [row["guesses"] for row in found["rows"]] == [1, 3, 7, 3] * 2
    assert all(row["equal_answers"] == row["concurrency"] for row in found["rows"])
    assert all(row["accepted"] == 1.0 for row in found["rows"] if row["wrong"] == "none")
    assert all(row["accepted"] < 1.0 for row in found["rows"] if row["wrong"] != "none")
    assert [row["concurrency"] for row in found["traced"]] == [1, 1, 2, 2]
    assert all(row["times_faster_auto"]["tokens_per_second"] > 0 for row in found["traced"])


@pytest.mark.parametrize("how", serving.OTHERWISE)
def test_a_flag_is_measured_on_rows_of_few_streams(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "run", lambda *given: {"given": given})
    found = serving.otherwise(how, "tiny", [(0, 1, 1), (1, 16, 2)], (16,), print)
    rows = serving.LATENCY_ROWS if how == "one" else [(0, 1, 1)]
    assert found["given"] == ("tiny", rows, (16,), print, serving.OTHERWISE[how])


@pytest.mark.long  # another start of the server above
def test_a_start_with_the_caches_that_are_there(on_the_cpu: Path) -> None:
    (start,) = serving.start_warm("tiny", lambda part: None)["starts"]
    assert start["caches"] == "as they are"
    assert start["ready_s"] > 0


@pytest.mark.parametrize("choices", [[], ["switch"]])
def test_a_start_is_watched(on_the_cpu: Path, monkeypatch: pytest.MonkeyPatch, choices: list[str]) -> None:
    load, intervals, before = offline.load, list[float](), sys.getswitchinterval()
    monkeypatch.setattr(offline, "load", lambda *given: intervals.append(sys.getswitchinterval()) or load(*given))
    found = starts.one("tiny", choices)
    assert intervals == [pytest.approx(2e-4 if "switch" in choices else before)]
    assert sys.getswitchinterval() == before
    assert any("weights" in line for line in found["log"])
    assert 0 < sum(found["innermost"].values()) <= 1.01 * found["seconds"] + 0.01 * len(found["innermost"])
    assert any("/weights.py:" in line for line in found["ours"])


def test_a_start_that_fails_is_said(on_the_cpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start in a process of its own, which looks for a GPU."""
    monkeypatch.setattr(starts, "CHOICES", {"cold": ()})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (start,) = starts.run("tiny", lambda part: None)["starts"]
    assert (start["caches"], start["error"]) == ("cold", 1)


def test_what_a_server_says_before_it_ends_is_kept(on_the_cpu: Path) -> None:
    model, adapters = serving.files("tiny", (16,), 1)
    found = serving.served(lambda part: None, {}, "tiny", model, adapters, 8, [("a", 1, 1, 1)])
    assert "the server ended" in found["error"]
    assert "rank" in found["server_log"]


def test_the_same_batch_again_and_rows_without_a_server(on_the_cpu: Path) -> None:
    loaded, spec = offline.load("tiny", 2)
    found = offline.repeats(loaded, 2, spec.vocab_size, times=3, count=4)
    assert (found["repetitions"], found["all_equal"], found["fewest_equal"]) == (2, 2, 4)
    row = offline.drive(loaded, 2, 2, 2, spec.vocab_size)
    assert row["requests"] == 2
    assert set(offline.host_share(loaded, 2, 2, spec.vocab_size)) == {"schedule", "submit", "collect", "commit"}


@pytest.mark.long  # a step is run under other choices in a test above
def test_variants_take_one_step_after_the_other_apart(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = tiny.engine()
    monkeypatch.setattr(step, "repeats", lambda *arguments: 20)
    spec = step.runner_of(engine).model.spec
    monkeypatch.setattr(offline, "load", lambda shape, count, **changes: (SimpleNamespace(engine=engine), spec))
    monkeypatch.setattr(offline, "STEPS", ((2, 1), (1, 0)))
    monkeypatch.setattr(offline, "CONTEXT", 3)
    monkeypatch.setattr(Ceiling, "measured", lambda device: Ceiling(4.3e12, 790e12))
    monkeypatch.setattr(
        step, "profile", lambda runner, replay: [{"kernel": "_merge_", "group": "attention", "us_per_step": 3}]
    )
    monkeypatch.setattr(step, "time_step", lambda runner, replay: 1.0)
    monkeypatch.setattr(step, "variants", lambda grouped: [step.Variant("as shipped"), step.Variant("again")])
    kept: list[int] = []
    found = offline.variants("tiny", lambda part: kept.append(sum(len(one["choices"]) for one in part["steps"])))
    assert kept == [1, 2, 3, 4]
    first, second = found["steps"]
    assert (first["rows"], first["adapters"], second["rows"], second["adapters"]) == (2, 1, 1, 0)
    assert first["by_group"]["attention"]["us"] == 3
    assert all(choice["error"] == 0 and choice["us"] == 1.0 for one in found["steps"] for choice in one["choices"])
    assert not engine.has_work
    assert headline(found).startswith("1@2 1 us")


def test_each_step_of_few_rows_is_measured_with_each_choice(
    tiny: Bench, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    engine, _ = tiny.engine()
    runner = step.runner_of(engine)
    given: dict[str, Any] = {}

    def fake_load(shape: str, count: int, **changes: Any) -> tuple[SimpleNamespace, ModelSpec]:
        given.update(changes)
        return SimpleNamespace(engine=engine), runner.model.spec

    monkeypatch.setattr(offline, "load", fake_load)
    monkeypatch.setattr(Ceiling, "measured", lambda device: Ceiling(4.3e12, 790e12))
    monkeypatch.setattr(latency, "choices", lambda engine: [step.Variant("layers"), step.Variant("again")])
    monkeypatch.setattr(latency, "REPETITIONS", 1)
    monkeypatch.setattr(step, "time_step", lambda runner, replay: 1.0)
    kept: list[int] = []
    rows = ((2, 1, 3), (1, 0, 3)) if long else ((2, 1, 2),)  # and adapters, and context
    found = latency.run("tiny", lambda part: kept.append(len(part["steps"][-1]["choices"])), rows)
    assert given == {"decode_kernel": "one"}
    assert kept == [1, 2] * len(rows)
    for entry, (count, _, _) in zip(found["steps"], rows, strict=True):
        assert [choice["same_tokens"] for choice in entry["choices"]] == [count, count]
        assert all(choice["error"] == 0 and choice["same_bits"] == "1 of 1" for choice in entry["choices"])
    assert not engine.has_work


def test_the_choices_change_constants_that_exist() -> None:
    for grouped in (False, True):
        choices = step.variants(grouped)
        assert choices[0].name == "as shipped"
        assert len({choice.name for choice in choices}) == len(choices)
        for choice in choices:
            for owner, name, value in choice.changes:
                assert type(getattr(owner, name)) is type(value), name


def test_the_soak_says_by_how_much_a_token_led_the_one_in_its_place() -> None:
    """Recomputed from probabilities and noise, the winner is the token that was chosen; a wrong one is told."""
    loaded = soak.load("cpu")
    _, adapter, ids = soak.questions()[0]
    for number, (temperature, top_p) in enumerate(((0.0, 1.0), (1.3, 1.0), (1.3, 0.7))):
        params = SamplingParams(max_tokens=4, temperature=temperature, top_p=top_p, seed=number + 5, ignore_eos=True)
        request = NewRequest(id=f"r{number}", prompt=ids[: 6 + number], params=params, adapter=adapter)
        tokens = soak.alone(loaded.engine, request)
        assert soak.difference(loaded.engine, soak.Seen(request, tokens)) is None
        for at, token in enumerate(tokens):
            found = soak.difference(loaded.engine, soak.Seen(request, [*tokens[:at], token + 1, *tokens[at + 1 :]]))
            assert found is not None
            assert found["at"] == at
            assert found["explained"]
            assert found["lead"] > 0 or found.get("past_top_p", -1) > 0
    assert not soak.lead(loaded.engine, request, [*tokens[:2], tokens[2] + 1], 2, tokens[2])["explained"]
