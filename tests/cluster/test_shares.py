"""Service counted once over all replicas: sums that may be lost or repeated, and VTC's bound for the whole."""

from __future__ import annotations

import random
from typing import Any

from inlaid.cluster.placement import make_placement
from inlaid.cluster.shares import Shares
from inlaid.cluster.view import Ask
from inlaid.engine.ledger import Ledger
from inlaid.engine.remote import RemoteCharges
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.sim.cluster import ClusterOutcome, simulate_cluster
from inlaid.sim.cost import load_cost, prices_of
from inlaid.sim.request_log import Arrival
from inlaid.sim.simulate import Setup

COST = load_cost("a10g")
SETUP = Setup(cost=COST, policy="vtc", num_tokens=2000, lengths="none", max_paired_tenants=0)
LONGEST, M = 64, 2000


def test_each_replica_hears_what_the_others_served_and_only_news() -> None:
    shares = Shares()
    shares.note("a", "t", 5.0)
    shares.note("b", "t", 7.0)
    assert shares.elsewhere("a") == {"t": 7.0}
    assert shares.elsewhere("a") == {}
    shares.note("a", "t", 1.0)
    assert shares.elsewhere("a") == {}
    assert shares.elsewhere("b") == {"t": 6.0}
    shares.restart("a")
    assert shares.elsewhere("a") == {"t": 13.0}, "a new engine has served nothing itself"


def test_sums_that_are_repeated_or_out_of_order_charge_once() -> None:
    ledger = Ledger()
    remote = RemoteCharges(ledger)
    for front, amount in (("f", 5.0), ("f", 5.0), ("g", 2.0), ("f", 9.0), ("f", 7.0)):
        remote.take(front, {"t": amount})
    assert ledger.account("t").counter == 11.0
    assert ledger.account("t").service == 0.0


class ByTenant:
    """Tenant "wide" uses both replicas in turn, tenant "narrow" the second only."""

    def choose(self, ask: Ask, views: Any, now: float) -> str:
        turn = int(ask.id.removeprefix("wide")) % 2 if ask.adapter == "wide" else 1
        return str(views[turn].name)


def served(placement: Any, share: bool) -> ClusterOutcome:
    rng = random.Random(4)
    trace = [
        Arrival(
            time=0.01 * number,
            request=NewRequest(
                id=f"{tenant}{number}",
                prompt=[1] * rng.randint(8, LONGEST),
                params=SamplingParams(max_tokens=40, temperature=0.0, seed=0),
                adapter=tenant,
                tenant=tenant,
                true_output_len=40,
            ),
        )
        for number in range(300)
        for tenant in ("wide", "narrow")
    ]
    return simulate_cluster(trace, SETUP, placement, 2, share_service=share, until=5.0)


def sums(outcome: ClusterOutcome) -> dict[str, float]:
    return {tenant: sum(each.get(tenant, 0.0) for each in outcome.service) for tenant in ("wide", "narrow")}


def test_a_tenant_served_elsewhere_steps_back_where_both_wait() -> None:
    """Engines that count for themselves give `wide` one replica and half of the other."""
    alone, together = sums(served(ByTenant(), False)), sums(served(ByTenant(), True))
    assert alone["wide"] > 2.0 * alone["narrow"]
    assert together["wide"] < 1.35 * together["narrow"]


def test_vtcs_bound_holds_for_the_whole() -> None:
    """Both wait at both replicas all the time: 2 (max(wp Lin, wq N M) + N R D), where the lag D is that between two
    requests, well below a second."""
    outcome = served(make_placement("round-robin", prices_of(COST)), share=True)
    served_to = sums(outcome)
    whole, gap = sum(served_to.values()), abs(served_to["wide"] - served_to["narrow"])
    rate = whole / outcome.end / 2
    assert gap <= 2 * (max(LONGEST, 2 * 2 * M) + 2 * rate * 0.5)
    assert gap <= 0.1 * whole, "and is far below it"
