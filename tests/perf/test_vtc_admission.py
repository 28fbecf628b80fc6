"""VTC's artifact's admission on our simulator: its forecast of memory, and the swing that it brings about."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from inlaid.sim.experiment import prepare, run
from inlaid.sim.metrics import difference
from inlaid.workload.suites import load_suite
from perf.scheduling.vtc_admission import peak, with_vtc_admission


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=6))
def test_the_forecast_is_the_most_that_is_ever_held(held: list[tuple[int, int]]) -> None:
    at_each_step = [sum(now + step for now, still in held if still >= step) for step in range(21)]
    assert peak(held) == max(at_each_step)


def test_vtc_swings_when_admission_comes_in_rounds_and_charging_ahead_stills_it(long: bool) -> None:
    ours = prepare(msgspec.structs.replace(load_suite("overload"), duration_s=300.0))
    ours = replace(ours, setup=replace(ours.setup, max_paired_tenants=0))  # gaps between pairs are of no interest here
    theirs = with_vtc_admission(ours)
    seen = {
        (name, policy): difference(run(experiment, policy).records, ours.duration, {}).max()
        for name, experiment in (("ours", ours), ("theirs", theirs))
        for policy in ("vtc", "vtc:predict=oracle")
        if long or name == "theirs"
    }
    assert seen.pop(("theirs", "vtc")) > 80
    assert max(seen.values()) < 25
