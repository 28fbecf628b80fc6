"""The CPU's part of adapters that are still coming: the same sums for any cut of the rows and any number of workers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inlaid.kernels.assist import FEWEST_ROWS, Assistant, Factors, NoFerry, Profile, measure
from tests.adapters.fake_lane import FakeFerry
from tests.examples import examples


@examples(40)
@given(
    rows=st.integers(1, 40),
    begin=st.integers(0, 5),
    workers=st.integers(0, 3),
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    late=st.booleans(),
)
def test_rows_get_their_adapters_product(rows: int, begin: int, workers: int, ranks: list[int], late: bool) -> None:
    """Siblings of different rank, or without one; the rows around them stay as they are."""
    torch.manual_seed(rows)
    x_TK, out_TN = torch.randn(rows + 8, 6), torch.randn(rows + 8, 4 * len(ranks))
    factors = [Factors(torch.randn(r, 6), torch.randn(4, r), 0.5 + r) if r else None for r in ranks]
    expected = out_TN.clone()
    for n, each in enumerate(factors):
        if each is not None:
            delta = (x_TK @ each.a_RK.t()) @ each.b_NR.t() * each.scale
            expected[begin : begin + rows, 4 * n : 4 * n + 4] += delta[begin : begin + rows]
    ferry = FakeFerry(torch.float32) if late else NoFerry(torch.float32)
    assistant = Assistant(ferry, Profile(workers, rows_per_worker=4))
    with torch.inference_mode():
        jobs = [assistant.start(x_TK, begin, begin + rows, [(4, each) for each in factors])]
        assistant.add(jobs, out_TN)
    torch.testing.assert_close(out_TN, expected, rtol=1e-4, atol=1e-5)


def test_a_workers_error_is_heard() -> None:
    assistant = Assistant(NoFerry(torch.float32), Profile(1))
    jobs = [assistant.start(torch.ones(2, 3), 0, 2, [(4, Factors(torch.ones(1, 5), torch.ones(4, 1), 1.0))])]
    with pytest.raises(RuntimeError):
        assistant.add(jobs, torch.zeros(2, 4))


def test_few_rows_are_not_cut_and_many_use_every_worker() -> None:
    profile = Profile(4, rows_per_worker=10)
    assert [profile.shares(rows) for rows in (1, 10, 11, 40, 4000)] == [1, 1, 2, 4, 4]
    assert Profile().shares(100) == 1


def test_a_slow_bus_gives_each_worker_more_rows() -> None:
    """On a bus that takes an hour one worker does it all; on one that takes no time there is never help enough."""
    slow = measure(16, workers=3, copy_seconds=lambda nbytes: 3600.0)
    fast = measure(16, workers=3, copy_seconds=lambda nbytes: 0.0)
    assert (slow.workers, fast.workers) == (3, 3)
    assert slow.rows_per_worker > fast.rows_per_worker == FEWEST_ROWS
    assert measure(16).workers >= 1
