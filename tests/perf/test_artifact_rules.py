"""VTC's artifact's admission on our simulator: its forecast of memory, and the swing that it brings about."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from inlaid.sim.experiment import prepare, run
from inlaid.sim.metrics import difference
from inlaid.sim.suites import SUITES, generate
from perf.scheduling.artifact_rules import like_the_artifact, peak


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=6))
def test_the_forecast_is_the_most_that_is_ever_held(held: list[tuple[int, int]]) -> None:
    at_each_step = [sum(now + step for now, still in held if still >= step) for step in range(21)]
    assert peak(held) == max(at_each_step)


def test_vtc_swings_when_admission_comes_in_rounds_and_charging_ahead_stills_it() -> None:
    suite = replace(SUITES["overload"], duration=300.0)
    ours = prepare(suite, trace=[arrival for arrival in generate(suite) if arrival.time < suite.duration])
    theirs = like_the_artifact(ours)
    seen = {
        (name, policy): difference(run(experiment, policy).records, suite.duration, {}).max()
        for name, experiment in (("ours", ours), ("theirs", theirs))
        for policy in ("vtc", "vtc:predict=oracle")
    }
    assert seen["theirs", "vtc"] > 80
    assert max(seen["theirs", "vtc:predict=oracle"], seen["ours", "vtc"], seen["ours", "vtc:predict=oracle"]) < 25
