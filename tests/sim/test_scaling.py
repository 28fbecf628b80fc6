"""Scaling on the simulator: what a feature selects, that nothing is lost, and that a faster start answers sooner."""

from __future__ import annotations

from dataclasses import replace
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
    assert parse_feature("ngrok,impl_sllm,cache_all_hit,mutate")[0] == Start("host", mutate=True)
    start, without = parse_feature("ngrok,impl_blitz,impl_live_pro,impl_fast_pro,mutate")
    assert start == Start("peer", live=True, mutate=True)
    assert set(without) == {"ngrok", "impl_fast_pro"}
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


def test_every_key_of_the_template_has_its_meaning_or_is_told_once(tmp_path: Path) -> None:
    data = autoscale.load_toml(TEMPLATE)
    model = data["models"]["llama3_8b"]
    keys = {f"router.{key}" for key in data["router"]} | {f"model.{key}" for key in model}
    scales = {
        *(f"router.{least_or_most}_{kind}_num" for least_or_most in ("min", "max") for kind in ("prefill", "decode")),
        "router.mock_load_millis", "model.num_available_blocks", "model.tp_size",
    }  # fmt: skip
    bounds = {f"router.{kind}_{side}_bound" for kind in ("prefill", "decode") for side in ("lower", "upper")}
    bounds |= {"router.scale_down_threshold_millis", "model.tokens_prefilled_per_sec"}
    moves = {"router.migration_lower_bound", "router.migration_upper_bound", "router.mock_transfer_millis"}
    moves |= {"model.tokens_transferred_per_sec"}
    for planner, meant in (("slo", scales), ("bounds", scales | bounds), ("split", scales | bounds | moves)):
        told = autoscale.without_meaning(data, "llama3_8b", autoscale.reasons(planner))
        named = {key.replace("models.llama3_8b.", "model.") for key in told}
        assert keys - named == meant
        assert {"global.cuda_devices", "server.ibv_rate", "extra-envs"} <= named


def test_with_prefill_and_decode_apart_kv_moves_and_nothing_is_lost(tmp_path: Path) -> None:
    azure_like.write(tmp_path / "t.csv", azure_like.rows("conv", 20.0, 1.5, 6.0, seed=1))
    trace = autoscale.arrivals({"dataset_path": str(tmp_path / "t.csv"), "time_in_secs": 20}, 4000)
    found = {}
    for name, feature in (("slow", "mock_load"), ("fast", "mock_load,mock_transfer,mutate")):
        start = parse_feature(feature)[0]
        router = replace(ROUTER, tokens_transferred_per_sec=2000.0)
        scaled, outcome = autoscale.simulate(trace, router, start, "a10g", "split")
        found[name] = autoscale.summarize(outcome.records, scaled.timeline.points, outcome.replica_seconds)
        assert found[name]["lost"] == 0
        assert found[name]["requests"] == len(trace)
        assert found[name]["most_replicas"] > 2, "more than one of each kind in the burst"
        sim = scaled.sim
        assert set(sim.kinds.values()) == {"prefill", "decode"}  # type: ignore[attr-defined]
        assert sim.moving == 0  # type: ignore[attr-defined]
        gaps = [r.finish - r.first_token for r in outcome.records if r.output_len > 1]  # type: ignore[operator]
        if name == "slow":
            least = min(r.prompt_len for r in outcome.records) / 2000
            assert min(gaps) > least, "the second token waits for the transfer"
    assert found["fast"]["tbt_p99_ms"] < found["slow"]["tbt_p99_ms"]
