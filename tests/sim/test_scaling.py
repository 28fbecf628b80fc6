"""Scaling on the simulator: what a feature selects, that nothing is lost, and that a faster start answers sooner."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlaid.cluster.planner import Router, router_of
from inlaid.sim.scaling import Start, parse_feature
from perf import autoscale, azure_like

TEMPLATE = Path(__file__).parents[2] / "perf" / "experiments" / "autoscale" / "blitz.toml"
ROUTER = Router(
    max_prefill_num=4, max_decode_num=4, tokens_prefilled_per_sec=4000.0, num_available_blocks=4000,
    mock_load_millis=100.0,
)  # fmt: skip


def test_features_select_where_weights_come_from_and_say_what_they_do_not_select() -> None:
    assert parse_feature("ngrok,impl_sllm,cache_replace")[0] == Start("cache")
    assert parse_feature("ngrok,impl_sllm,cache_all_hit,mutate")[0] == Start("host")
    start, without = parse_feature("ngrok,impl_blitz,impl_live_pro,impl_fast_pro,mutate")
    assert start == Start("peer", live=True)
    assert set(without) == {"ngrok", "impl_fast_pro", "mutate"}
    with pytest.raises(ValueError, match="unknown flag 'impl_blits'"):
        parse_feature("impl_blits")


def test_the_template_says_what_it_says_in_blitzscale() -> None:
    data = autoscale.load_toml(TEMPLATE)
    router = router_of(data["router"], data["models"]["llama3_8b"])
    assert (router.least, router.most, router.num_available_blocks) == (1, 13, 30_000)
    assert (router.prefill_upper_bound, router.decode_lower_bound) == (0.8, 0.75)
    with pytest.raises(ValueError, match="has no key 'prefil_lower_bound'"):
        router_of({"prefil_lower_bound": 0.5}, {})
    with pytest.raises(ValueError, match=r"qwen_72b.tp_size is 8"):
        autoscale.run({**data, "selection": {"models": ["qwen_72b"], "datasets": []}}, "a10g", "bounds", Path())


def test_a_burst_brings_replicas_that_go_again_and_nothing_is_lost(tmp_path: Path) -> None:
    azure_like.write(tmp_path / "t.csv", azure_like.rows("conv", 30.0, 1.0, 6.0, seed=1))
    trace = autoscale.arrivals({"dataset_path": str(tmp_path / "t.csv"), "time_in_secs": 30}, 4000)
    found = {}
    for name, feature in (("mock", "mock_load"), ("disk", "impl_sllm")):
        scaled, outcome = autoscale.simulate(trace, ROUTER, parse_feature(feature)[0], "a10g", "bounds")
        found[name] = autoscale.summarize(outcome.records, scaled.timeline.points, outcome.replica_seconds)
        assert found[name]["lost"] == 0
        assert 1 < found[name]["most_replicas"] <= 5, "one that drains may stand beside four"
        assert scaled.timeline.points[-1][1] < found[name]["most_replicas"]
        assert scaled.gpu_seconds < 5 * outcome.end
    assert found["mock"]["ttft_p99_ms"] < found["disk"]["ttft_p99_ms"]
    autoscale.draw(tmp_path / "figure", "t", found)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
