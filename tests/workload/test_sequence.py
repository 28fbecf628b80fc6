"""The draws of the recorded suites, which must stay as they are, and what this sampling refuses."""

from __future__ import annotations

import hashlib
import json

import msgspec
import pytest

from inlaid.workload.arrivals import Arrivals
from inlaid.workload.lengths import Lengths
from inlaid.workload.plan import PlannedRequest, plan, rescale_rate, with_adapters
from inlaid.workload.popularity import AdapterChoice
from inlaid.workload.prompts import LengthsOnly
from inlaid.workload.spec import Stream, Workload
from inlaid.workload.suites import load_suite


def planned(workload: Workload) -> list[PlannedRequest]:
    return plan(workload, workload.adapter_names, LengthsOnly())


@pytest.mark.parametrize(
    ("suite", "count", "digest"),
    [
        ("overload", 1620, "682f7449dbce5cf0"),
        ("poisson_on_off_overload", 1342, "6b75a144c369c238"),
        ("poisson_short_long", 5700, "811f67e99c473617"),
        ("increase", 959, "2af27c79029d9f36"),
        ("real", 1500, "2c61a4f68d52d865"),
        ("tasks-50", 1812, "0bc40ebbdc58023f"),
    ],
)
def test_a_recorded_suite_sends_what_it_did_when_it_was_recorded(suite: str, count: int, digest: str) -> None:
    rows = [(round(r.at, 6), r.tenant, r.adapter, r.prompt_len, r.output_len) for r in planned(load_suite(suite))]
    assert (len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]) == (count, digest)


def test_a_task_hides_its_lengths_behind_one_limit_and_has_a_deadline() -> None:
    for request in planned(load_suite("tasks-10")):
        assert request.max_tokens == 1024
        assert 1 <= request.output_len < 1024
        assert request.tenant == request.adapter
        assert request.deadline_s == request.at + 12.0


def test_more_tasks_than_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="10 tasks and 3 adapters are served"):
        plan(load_suite("tasks-10"), ["a", "b", "c"], LengthsOnly())


def test_each_tenant_may_have_an_adapter_of_its_own() -> None:
    suite = with_adapters(load_suite("dist_shift"), AdapterChoice("tenant"))
    pairs = {(request.tenant, request.adapter) for request in plan(suite, ["x", "y", "z"], LengthsOnly())}
    assert pairs == {("client-0", "x"), ("client-1", "y")}
    with pytest.raises(ValueError, match="2 tenants with an adapter each and 1 are served"):
        plan(suite, ["x"], LengthsOnly())


def test_bursty_tenants_send_their_counts_within_the_time() -> None:
    suite = load_suite("real")
    assert suite.bursty is not None
    small = msgspec.structs.replace(
        suite, bursty=msgspec.structs.replace(suite.bursty, requests=[7, 2]), duration_s=9.0
    )
    sent = planned(small)
    assert [sum(r.tenant == name for r in sent) for name in ("client-00", "client-01")] == [7, 2]
    assert all(0 <= request.at < 9 for request in sent)
    with pytest.raises(ValueError, match="no rate to set"):
        rescale_rate(small, 2.0)


@pytest.mark.parametrize(
    ("sampling", "stream", "message"),
    [
        ("sequential", Stream(Arrivals("gamma"), AdapterChoice("none")), 'arrivals "gamma" need'),
        ("sequential", Stream(Arrivals("fixed"), AdapterChoice("none"), Lengths("lognormal")), "lognormal"),
        ("merged", Stream(Arrivals("fixed"), AdapterChoice("none")), "needs Poisson streams"),
    ],
)
def test_what_only_independent_streams_can_have_is_refused(sampling: str, stream: Stream, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(Workload([stream], sampling=sampling, duration_s=5.0))  # type: ignore[arg-type]
