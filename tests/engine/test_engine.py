"""The step loop and what can be seen and changed while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlaid.config import EngineConfig, SchedulerConfig
from inlaid.engine.engine import make_engine, make_lengths
from inlaid.engine.policy import MaxTokens
from inlaid.engine.predictor import Predictor
from inlaid.engine.refusal import Refused
from inlaid.engine.request import FinishReason, Grammar, NewRequest, SamplingParams
from tests.engine.bench import Bench
from tests.engine.fake_runner import FakeAdapters, FakeRunner


def test_overlap_submits_a_step_before_it_collects_the_one_before() -> None:
    bench = Bench(overlap=True)
    bench.add("r", [1, 2], max_tokens=3, ignore_eos=True)
    assert bench.step() == []
    assert len(bench.runner.batches) == 1
    assert len(bench.step()[0].tokens) == 1
    assert len(bench.runner.batches) == 2
    bench.run().check_all()
    assert len(bench.runner.batches) == 3, "max_tokens is never overshot"


def test_a_request_that_wants_a_mask_is_not_scheduled_while_its_token_is_in_flight() -> None:
    bench = Bench(overlap=True)
    bench.engine._make_grammar = lambda grammar: object()
    bench.add("g", [1, 2], max_tokens=4, ignore_eos=True, grammar=Grammar(regex="a*"))
    bench.run().check_all()
    for batch in bench.runner.batches:
        assert all(work.start < len(work.request.tokens) for work in batch.works)


def test_without_a_grammar_library_a_constrained_request_is_refused() -> None:
    with pytest.raises(ValueError, match="structured output needs"):
        Bench().add("g", [1], grammar=Grammar(json_object=True))


def test_steps_that_keep_failing_are_counted() -> None:
    bench = Bench()
    bench.runner.fail_collect.update(range(1, 4))
    for index in range(3):
        bench.add(f"r{index}", [1])
        bench.step()
    assert bench.engine.num_failures_in_a_row == 3
    bench.add("fine", [1], max_tokens=1)
    bench.run().check_all()
    assert bench.engine.num_failures_in_a_row == 0
    assert bench.engine.num_failures == 3


@pytest.mark.parametrize("overlap", [False, True])
def test_a_row_that_is_not_finite_ends_alone_and_shares_nothing(overlap: bool) -> None:
    bench = Bench(overlap=overlap, block_size=4)
    bench.runner.void["bad"] = 1
    prompt = list(range(10, 22))
    bench.add("bad", prompt, "a", max_tokens=8)
    bench.add("other", [8, 9], "b", max_tokens=8)
    bench.run().check_all()
    assert bench.ends["bad"].finish_reason is FinishReason.ERROR
    assert bench.tokens["bad"] == []
    assert "adapter 'a' computes numbers" in bench.ends["bad"].refusal.message
    bench.add("same", prompt, "a", max_tokens=4)
    bench.run().check_all()
    assert bench.firsts["same"].num_cached == 0, "the blocks of a request that failed were shared"


@pytest.mark.parametrize("overlap", [False, True])
def test_a_row_that_is_not_finite_on_shared_blocks_is_computed_again_without(overlap: bool) -> None:
    bench = Bench(overlap=overlap, block_size=4)
    prompt = list(range(10, 22))
    bench.add("first", prompt, "a", max_tokens=4)
    bench.run()
    bench.add("other", [8, 9], "b", max_tokens=20, ignore_eos=True)
    for steps in (0, 3):  # at its first token, and in the middle of its answer
        name = f"second{steps}"
        bench.add(name, [*prompt, 9], "a", max_tokens=12, ignore_eos=True)
        for _ in range(steps):
            bench.step()
        bench.runner.void[name] = 1
        bench.run().check_all()
        assert bench.firsts[name].num_cached == 12
        assert bench.scheduler.num_preemptions == 1 + bool(steps)
    bench.runner.void["third"] = 4
    bench.add("third", [*prompt, 8], "a", max_tokens=8)
    bench.run()
    assert bench.ends["third"].finish_reason is FinishReason.ERROR
    bench.engine.scheduler.check_whole()


def test_idle_says_whether_there_was_anything_to_compute() -> None:
    bench = Bench(adapters=FakeAdapters(("a",), load=3))
    bench.add("r", [1], "a", max_tokens=1)
    bench.step()
    assert bench.engine.idle
    assert bench.engine.has_work
    bench.run().check_all()


def test_stats_count_tokens_blocks_and_requests() -> None:
    bench = Bench()
    bench.add("r", [1] * 8, max_tokens=4, ignore_eos=True)
    bench.step()
    assert bench.engine.stats()["running"] == 1
    assert bench.engine.stats()["kv_blocks_used"] == 2
    bench.run()
    stats = bench.engine.stats()
    assert (stats["prompt_tokens"], stats["output_tokens"], stats["running"]) == (8, 4, 0)
    assert stats["kv_blocks_used"] == 0


def test_the_scheduler_is_changed_while_it_serves_and_describes_itself() -> None:
    bench = Bench(policy="vtc")
    for index in range(6):
        bench.add(f"r{index}", [index], tenant=f"t{index % 2}", max_tokens=8, ignore_eos=True)
    bench.step()
    changes = {
        "policy": "inlaid",
        "options": {"beta": 3},
        "weights": {"t0": 2.0},
        "limits": {"t1": {"requests_per_minute": 2, "max_waiting": 5}},
        "max_num_waiting": 77,
    }
    described = bench.engine.set_scheduler(changes)
    assert described["policy"] == "inlaid"
    assert described["options"]["beta"] == 3
    assert described["weights"] == {"t0": 2.0}
    assert described["limits"]["t1"]["max_waiting"] == 5
    assert described["max_num_waiting"] == 77
    assert json.loads(json.dumps(described)) == described
    assert bench.engine.set_scheduler({"options": {"ageing": 1.0}})["options"]["beta"] == 3
    switched = bench.engine.set_scheduler({"policy": "vtc:predict=predicted"})
    assert (switched["policy"], switched["options"]["predict"]) == ("vtc", "predicted")
    bench.run().check_all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "fifo"}, "unknown policy"),
        ({"policy": 3}, "must be a string"),
        ({"policies": ["vtc"]}, "unknown setting"),
        ({"weights": {"t": -1.0}}, "positive"),
        ({"weights": {"t": 5e-324}}, "from 0.001 to 1000"),
        ({"weights": {"t": 1e300}}, "from 0.001 to 1000"),
        ({"weights": {"t": float("nan")}}, "from 0.001 to 1000"),
        ({"weights": {"t": "much"}}, "weights: Expected"),
        ({"weights": [1]}, "weights: Expected"),
        ({"limits": {"t": {"rpm": 1}}}, "unknown field"),
        ({"limits": {"t": {"max_waiting": -1}}}, "0 or more"),
        ({"limits": {"t": {"max_waiting": 2**63}}}, "up to 2147483647"),
        ({"max_num_waiting": 0}, "at least 1"),
        ({"max_num_waiting": 2**63}, "at most 2147483647"),
        ({"policy": "drr", "options": {"quantum": 5e-324}}, "at least 0.001"),
        ({"policy": "srtf", "options": {"ageing": 1e300}}, "at most 1e"),
        ({"options": {"nothing": 1}}, "no option"),
    ],
)
def test_a_bad_change_changes_nothing(changes: dict[str, Any], message: str) -> None:
    bench = Bench(policy="vtc")
    before = bench.engine.describe_scheduler()
    with pytest.raises(ValueError, match=message):
        bench.engine.set_scheduler({"weights": {"good": 2.0}, "max_num_waiting": 9, **changes})
    assert bench.engine.describe_scheduler() == before


def test_limits_of_a_tenant_refuse_it_alone() -> None:
    bench = Bench()
    bench.engine.set_scheduler({"limits": {"t": {"max_waiting": 2}, "u": {"requests_per_minute": 1}}})
    for index in range(2):
        bench.add(f"t{index}", [1], tenant="t")
    with pytest.raises(Refused):
        bench.add("t2", [1], tenant="t")
    bench.add("u0", [1], tenant="u")
    with pytest.raises(Refused):
        bench.add("u1", [1], tenant="u")
    bench.add("v", [1], tenant="v")
    bench.run().check_all()


def test_fairness_says_who_was_served_and_who_waits() -> None:
    bench = Bench(policy="vtc", max_num_seqs=2)
    for index in range(20):
        bench.add(f"r{index}", [1] * 4, tenant=f"t{index % 2}", max_tokens=4, ignore_eos=True)
    for _ in range(15):
        bench.step()
    view = bench.engine.fairness(60.0)
    assert json.loads(json.dumps(view)) == view
    assert set(view["tenants"]) == {"t0", "t1"}
    assert view["service"] == pytest.approx(bench.scheduler.ledger.total)
    assert view["waiting"] == bench.scheduler.num_waiting > 0
    assert view["largest_gap"] <= 2 * 12
    assert view["tenants"]["t0"]["predicted_wait"] > 0
    with pytest.raises(ValueError, match="window"):
        bench.engine.fairness(-1.0)


def test_a_flood_by_one_tenant_is_contained_and_others_get_their_share() -> None:
    bench = Bench(policy="vtc", max_num_seqs=4, max_num_waiting=100)
    bench.runner.kv = {}
    waits = []
    for number in range(100_000):
        new = NewRequest(id=f"f{number}", prompt=[1] * 4, params=SamplingParams(max_tokens=4), tenant="flood")
        try:
            bench.engine.add(new)
            bench.wanted[new.id] = new
            bench.tokens[new.id] = []
        except Refused as full:
            waits.append(full.retry_after or 0.0)
    assert len(waits) == 100_000 - 100
    assert min(waits) >= 1
    for index in range(10):
        bench.add(f"s{index}", [1] * 4, tenant="small", max_tokens=4, ignore_eos=True)
    while not all(f"s{index}" in bench.ends for index in range(10)):
        bench.step()
    accounts = bench.scheduler.ledger.accounts
    assert accounts["flood"].service <= accounts["small"].service + 2 * 4 * (4 + 2 * 4)
    bench.run().check_all()


def test_an_engine_from_its_configuration_keeps_what_its_predictor_learned(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    config = EngineConfig(scheduler=SchedulerConfig(policy="inlaid", predictor_file=str(path)))
    engine = make_engine(config, FakeRunner(16), lambda: 0.0, num_blocks=50, max_model_len=64)
    engine.add(NewRequest(id="r", prompt=[1, 2], params=SamplingParams(max_tokens=5)))
    while engine.has_work:
        outputs = engine.step()
    assert outputs[-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    engine.close()
    assert isinstance(make_lengths(config.scheduler), Predictor)
    assert path.exists()
    assert isinstance(make_lengths(SchedulerConfig(predictor="none")), MaxTokens)
    with pytest.raises(ValueError, match="known: history, none"):
        make_lengths(SchedulerConfig(predictor="crystal"))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 0},
        {"max_overtakes": -1},
        {"max_seqs_per_tenant": -1},
        {"admission_margin": 1.0},
        {"output_weight": float("inf")},
        {"prompt_weight": float("nan")},
        {"cost": "free"},
        {"policy": "none"},
    ],
)
def test_impossible_settings_are_refused_at_the_start(settings: dict[str, Any]) -> None:
    config = EngineConfig(scheduler=SchedulerConfig(**settings))
    with pytest.raises(ValueError, match=r"at least|below 1|unknown"):
        make_engine(config, FakeRunner(16), lambda: 0.0, num_blocks=50, max_model_len=64)


def test_an_answer_that_a_stop_string_ended_teaches_its_length() -> None:
    predictor = Predictor()
    bench = Bench(lengths=predictor)
    for index in range(30):
        bench.add(f"r{index}", [1, 2], max_tokens=50, ignore_eos=True)
        while len(bench.tokens[f"r{index}"]) < 3:
            bench.step()
        bench.engine.abort(f"r{index}", FinishReason.STOP)
        bench.run()
        assert bench.ends[f"r{index}"].finish_reason is FinishReason.STOP
    bench.add("next", [1, 2], max_tokens=50)
    assert predictor.remaining(bench.scheduler.requests["next"]) < 8


def test_tokens_after_a_stop_string_are_no_part_of_the_length_that_is_learned() -> None:
    predictor = Predictor()
    bench = Bench(lengths=predictor)
    for index in range(30):
        bench.add(f"r{index}", [1, 2], max_tokens=50, ignore_eos=True)
        while len(bench.tokens[f"r{index}"]) < 20:
            bench.step()
        bench.engine.abort(f"r{index}", FinishReason.STOP, num_tokens=3)
        bench.run()
    bench.add("next", [1, 2], max_tokens=50)
    assert predictor.remaining(bench.scheduler.requests["next"]) < 8
