"""BlitzScale's own template for real: each of its keys has its meaning in the cluster's command or is told, and (a long
form) the demo on CPUs follows a burst without losing a request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlaid import cli
from inlaid.workload.toml import load_toml
from perf import autoscale_live, azure_like

TEMPLATE = Path(__file__).parents[2] / "perf" / "experiments" / "autoscale" / "blitz.toml"


def test_the_command_has_what_the_template_says_and_the_rest_is_told() -> None:
    data = load_toml(TEMPLATE)
    command, told = autoscale_live.command_of(data, TEMPLATE, "bounds", None)
    args = cli.parse(command[command.index("cluster") :])
    assert (args.router, args.port, args.weights_from, args.num_blocks) == (TEMPLATE, 11236, "peer", 1000)
    named = {key.split(".")[-1] for key in told}
    assert {"cuda_devices", "ibv_rate", "mock_load_millis", "tokenizer", "impl_live", "impl_fast_pro"} <= named
    assert not named & {"port", "extra-envs", "max_prefill_num", "prefill_upper_bound", "tokens_prefilled_per_sec"}
    command, told = autoscale_live.command_of(data, TEMPLATE, "slo", 0)
    args = cli.parse(command[command.index("cluster") :])
    assert (args.router, args.port, args.replicas) == (None, 0, (1, 13))
    assert "router.prefill_upper_bound" in told


def test_features_that_read_files_do(tmp_path: Path) -> None:
    data = load_toml(TEMPLATE)
    data["selection"]["features"] = ["sllm_cache_replace"]
    command, told = autoscale_live.command_of(data, TEMPLATE, "bounds", 0)
    assert command[-2:] == ["--weights-from", "disk"]
    assert "page cache" in told["features.sllm_cache_replace.cache"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_demo_follows_a_burst_and_loses_nothing(tmp_path: Path) -> None:
    azure_like.write(tmp_path / "t.csv", azure_like.rows("code", 150.0, 0.3, 5.0, seed=0))
    arguments = ["--trace", str(tmp_path / "t.csv"), "--out", str(tmp_path), "--port", "0"]
    assert autoscale_live.main([str(TEMPLATE), *arguments]) == 0
    (row,) = json.loads((tmp_path / "autoscale-live-bounds.json").read_text())["points"].values()
    assert row["lost"] == 0
    assert (tmp_path / "autoscale-live-bounds.png").stat().st_size > 10_000
