"""The simulator: deterministic, conserving, and VTC within its bound in every suite."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import pytest

from inlaid.engine.limits import QueueLimits
from inlaid.engine.refusal import Refused
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.sim.cost import CostModel, Load, load_cost
from inlaid.sim.experiment import bound, draw_trace, prepare, run, table, total_service
from inlaid.sim.metrics import summarize
from inlaid.sim.request_log import Arrival
from inlaid.sim.simulate import Setup, make_lengths, simulate
from inlaid.workload.suites import load_suite, suite_names

SECONDS = 60.0  # of each suite's trace; the whole ones are in perf/results
MAX_REQUESTS = 400
FLAT = CostModel(name="flat", source="test", step=0.01)


def requests(count: int, prompt: int, output: int) -> list[Arrival]:
    """Make `count` requests of one tenant that arrive at once."""
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    return [
        Arrival(0.0, NewRequest(id=str(n), prompt=[0] * prompt, params=params, tenant="t", true_output_len=output))
        for n in range(count)
    ]


@pytest.mark.parametrize("name", suite_names())
def test_vtc_keeps_its_bound_in_every_suite(name: str) -> None:
    suite = load_suite(name)
    trace = [arrival for arrival in draw_trace(suite) if arrival.time < SECONDS]
    experiment = prepare(suite, trace=trace if suite.simulator.fairness else trace[:MAX_REQUESTS])
    experiment = replace(experiment, setup=replace(experiment.setup, max_paired_tenants=10**6))
    outcome = run(experiment, "vtc")
    assert outcome.largest_gap is not None
    assert outcome.largest_gap <= bound(experiment)
    assert all(record.finish is not None for record in outcome.records)


def test_fcfs_breaks_it_and_keeps_growing() -> None:
    suite = load_suite("overload")
    experiment = prepare(suite, trace=[arrival for arrival in draw_trace(suite) if arrival.time < 1.5 * SECONDS])
    outcome = run(experiment, "fcfs")
    assert outcome.largest_gap is not None
    assert outcome.largest_gap > bound(experiment)
    half = next(gap for when, gap in outcome.gap_series if when > outcome.end / 2)
    assert outcome.largest_gap > 1.3 * half


def test_the_same_seed_gives_the_same_to_the_last_digit() -> None:
    experiment = prepare(load_suite("tasks-50"))
    experiment = replace(experiment, trace=experiment.trace[:200])
    assert run(experiment, "inlaid").records == run(experiment, "inlaid").records


@pytest.mark.parametrize("policy", ["fcfs", "vtc:predict=oracle", "inlaid"])
def test_service_by_the_ledger_is_service_by_the_records(policy: str) -> None:
    experiment = prepare(load_suite("poisson_on_off_overload"))
    experiment = replace(experiment, trace=experiment.trace[:150])
    outcome = run(experiment, policy)
    assert sum(outcome.service.values()) == pytest.approx(total_service(outcome))
    noted = sum(sum(served.values()) for _, served in outcome.history)
    assert noted == pytest.approx(total_service(outcome))


def test_isolation_is_computed() -> None:
    suite = msgspec.structs.replace(load_suite("on_off_less"), duration_s=200.0)
    experiment = prepare(suite)
    rows = {row["policy"]: row for row in table(experiment, [run(experiment, policy) for policy in ("vtc", "fcfs")])}
    assert rows["vtc"]["isolation"] == "yes"
    assert rows["fcfs"]["isolation"] == "no"
    assert rows["vtc"]["mean_difference"] < rows["fcfs"]["mean_difference"]


def test_the_real_suite_has_the_published_shape() -> None:
    trace = draw_trace(load_suite("real"))
    counts = sorted(Counter(arrival.request.tenant for arrival in trace).values(), reverse=True)
    assert (len(trace), len(counts), counts[:5], counts[-1]) == (1500, 27, [296, 262, 199, 120, 67], 1)
    prompts = [len(arrival.request.prompt) for arrival in trace]
    outputs = [arrival.request.params.max_tokens for arrival in trace]
    assert sum(prompts) / 1500 == pytest.approx(136, abs=2)
    assert sum(outputs) / 1500 == pytest.approx(256, abs=3)
    assert max(*prompts, *outputs) < 1024
    assert [a.time for a in trace] == sorted(a.time for a in trace)


def test_the_real_suite_is_refused_as_the_published_trace_was() -> None:
    """Compare requests refused by limits per minute, of 1,500: in VTC's artifact, and here on average over traces."""
    published = {5: 919, 10: 600, 15: 447, 20: 342, 30: 176}
    traces = [draw_trace(msgspec.structs.replace(load_suite("real"), seed=seed)) for seed in range(42, 47)]
    for limit, theirs in published.items():
        gate, refused = QueueLimits(max_waiting=10**9), 0
        for number, trace in enumerate(traces):
            for arrival in trace:
                tenant = f"{number} {arrival.request.tenant}"
                try:
                    gate.check_rate(tenant, limit, 60.0, arrival.time)
                except Refused:
                    refused += 1
                else:
                    gate.note_accepted(tenant, arrival.time, 60.0)
        assert refused / len(traces) == pytest.approx(theirs, rel=0.15), limit


def test_suites_send_what_they_say() -> None:
    sent = {name: len(draw_trace(load_suite(name))) for name in ("overload", "on_off_less", "dist_shift", "increase")}
    assert sent["overload"] == 360 * 1.5 + 360 * 3
    assert sent["on_off_less"] == pytest.approx(150 + 1200, abs=3)
    assert sent["dist_shift"] == pytest.approx(90 + 600 + 300 + 300 + 150 + 450, abs=6)
    assert sent["increase"] == pytest.approx(300 + 660, abs=250)


def test_a_step_takes_what_the_model_says() -> None:
    trace = requests(1, prompt=8, output=5)
    outcome = simulate(trace, Setup(FLAT))
    (record,) = outcome.records
    assert record.ttft == pytest.approx(0.01)
    assert record.latency == pytest.approx(0.05)
    assert outcome.steps == 5


def test_keys_and_values_of_8_bits_leave_room_for_more_and_are_read_faster() -> None:
    found = [prepare(load_suite("overload"), kv=kv) for kv in ("auto", "int8")]
    full, coded = (experiment.setup for experiment in found)
    assert coded.num_tokens == full.num_tokens * 512 // 260
    assert coded.cost.output_context == pytest.approx(full.cost.output_context * 260 / 512)
    assert coded.cost.decodes == full.cost.decodes
    with pytest.raises(ValueError, match="--kv-cache-dtype int4"):
        prepare(load_suite("overload"), kv="int4")


def test_loads_of_adapters_take_their_time_and_hold_up_nobody() -> None:
    cost = replace(FLAT, load_base=0.5)
    requests = [
        NewRequest(id=name, prompt=[0] * 4, params=SamplingParams(max_tokens=3, ignore_eos=True), adapter=adapter)
        for name, adapter in (("slow", "a"), ("base", None))
    ]
    outcome = simulate([Arrival(0.0, request) for request in requests], Setup(cost))
    ttft = {record.id: record.ttft for record in outcome.records}
    assert ttft["base"] == pytest.approx(0.01)
    assert ttft["slow"] is not None
    assert 0.5 <= ttft["slow"] <= 0.53


def test_refused_requests_are_recorded_as_such() -> None:
    trace = requests(10, prompt=4, output=2)
    outcome = simulate(trace, Setup(FLAT, policy="rpm:limit=4"))
    assert sum(record.refused for record in outcome.records) == 6
    assert summarize(outcome, 10.0, None, {})["refused"] == 6


def test_an_hour_of_a_thousand_adapters_takes_few_steps_of_host_work() -> None:
    suite = load_suite("tasks-1000")
    experiment = prepare(suite, trace=draw_trace(suite)[:150])
    outcome = run(experiment, "inlaid")
    assert all(record.finish is not None for record in outcome.records)
    assert outcome.largest_gap is None


def test_machines_and_lengths_by_name_or_a_sentence() -> None:
    assert load_cost("a10g").step_seconds(Load()) == 0.0225
    prompt = load_cost("a10g").step_seconds(Load(prefill_tokens=512, prefills=1))
    assert prompt == pytest.approx((0.21001891 * 512 + 1.14601454) / 1000)
    with pytest.raises(ValueError, match="known: a100-13b, a10g, h100, h200"):
        load_cost("tpu")
    with pytest.raises(ValueError, match="unknown lengths"):
        make_lengths("crystal", 0)


def test_the_profile_adds_up_to_the_published_function() -> None:
    """Prefill plus every decode of a request of x and y tokens is h(x, y)."""
    cost, x, y = replace(load_cost("a10g"), floor=0.0), 200, 120
    seconds = cost.step_seconds(Load(prefill_tokens=x, prefills=1))
    seconds += sum(cost.step_seconds(Load(decodes=1, prompt_context=x, output_context=n)) for n in range(1, y + 1))
    h = 0.21001891 * x + 0.10075395 * y + 0.0039868 * x * y + 0.00324733 * y * y + 1.14601454
    assert seconds == pytest.approx(h / 1000, rel=1e-6)
