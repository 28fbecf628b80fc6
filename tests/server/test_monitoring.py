"""The Grafana board asks for metrics that there are, and the files beside it name one another rightly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from inlaid.config import SpeculationConfig
from inlaid.engine.sizes import STEP_SIZES
from inlaid.engine.speculation import Counts, Speculation
from inlaid.server.mirrors import EngineFigures
from inlaid.worker.messages import ModelInfo
from tests.server.live import ROOT, Live

FOLDER = ROOT / "docs" / "monitoring"
# What the dashboard that vLLM ships asks for, where this server has a figure for it.
OF_VLLM = """
vllm:e2e_request_latency_seconds_bucket vllm:prompt_tokens_total vllm:generation_tokens_total
vllm:time_per_output_token_seconds_bucket vllm:inter_token_latency_seconds_bucket vllm:num_requests_running
vllm:num_requests_waiting vllm:time_to_first_token_seconds_bucket vllm:gpu_cache_usage_perc vllm:kv_cache_usage_perc
vllm:request_prompt_tokens_bucket vllm:request_generation_tokens_bucket vllm:request_success_total
vllm:request_queue_time_seconds_sum vllm:request_prefill_time_seconds_sum vllm:request_decode_time_seconds_sum
vllm:request_max_num_generation_tokens_sum vllm:iteration_tokens_total_bucket vllm:cache_config_info
process_cpu_seconds_total process_resident_memory_bytes process_open_fds
""".split()


def asked_for(board: str) -> set[str]:
    expressions = [target["expr"] for panel in json.loads(board)["panels"] for target in panel["targets"]]
    return {name for text in expressions for name in re.findall(r"\b(?:vllm|inlaid):\w+|\bprocess_\w+", text)}


def test_every_metric_of_the_board_and_of_vllms_is_on_the_page(server: Live) -> None:
    body = {"model": "maths", "prompt": "the", "max_tokens": 3}
    assert server.ask("POST", "/v1/completions", body).status == 200
    server.ask("POST", "/v1/completions", {**body, "temperature": -1})
    page = server.ask("GET", "/metrics").body.decode()
    there = set(re.findall(r"^([\w:]+)[{ ]", page, re.M))
    wanted = asked_for((FOLDER / "dashboards" / "inlaid.json").read_text())
    assert len(wanted) > 15
    assert sorted((wanted | set(OF_VLLM)) - there) == []


def test_renamed_metrics_and_steps_say_what_they_should(server: Live) -> None:
    assert server.ask("POST", "/v1/completions", {"prompt": "the", "max_tokens": 5}).status == 200
    assert server.metric("vllm:time_per_output_token_seconds_count") == server.metric(
        "vllm:inter_token_latency_seconds_count"
    )
    steps = server.metric("vllm:iteration_tokens_total_count")
    assert steps > 0
    assert server.metric("vllm:iteration_tokens_total_sum") >= steps
    page = server.ask("GET", "/metrics").body.decode()
    assert re.search(r'vllm:cache_config_info\{[^}]*num_gpu_blocks="400"', page)


def test_drafts_are_counted_under_vllms_names_and_by_adapter() -> None:
    speculation = Speculation(SpeculationConfig(speculation="ngram", num_speculative_tokens=2))
    speculation.total, speculation.by_adapter["maths"] = Counts(3, 6, 4), Counts(3, 6, 4)
    speculation.accepted_at = [3, 1]
    figures = EngineFigures("m", "0")
    model = ModelInfo(
        folder="", vocab_size=1, max_model_len=1, num_blocks=1, block_size=1, max_loras=1, base_version="", device="",
        dtype="", eos_ids=(),
    )  # fmt: skip
    steps = {f"steps_of_{size}": 0.0 for size in STEP_SIZES} | {"steps": 0.0, "step_tokens": 0.0}
    figures.set({**steps, **speculation.stats()}, model)
    samples = {(one.name, *one.labels.values()): one.value for each in figures.collect() for one in each.samples}
    assert samples["vllm:spec_decode_num_drafts_total", "m", "0"] == 3
    assert samples["vllm:spec_decode_num_draft_tokens_total", "m", "0"] == 6
    assert samples["vllm:spec_decode_num_accepted_tokens_total", "m", "0"] == 4
    assert samples["vllm:spec_decode_num_accepted_tokens_per_pos_total", "m", "0", "1"] == 1
    assert samples["inlaid:spec_decode_num_accepted_tokens_total", "m", "0", "maths"] == 4
    figures.set(steps, model)
    assert not any("spec_decode" in each.name for each in figures.collect()), "without speculation there is none"


def test_the_files_beside_the_board_name_one_another() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yml").read_text())
    for service in compose["services"].values():
        for volume in service["volumes"]:
            assert (FOLDER / volume.split(":")[0]).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    scraped = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in scraped] == ["inlaid"]
    source = yaml.safe_load((FOLDER / "datasource.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]
    assert Path("/etc/grafana/dashboards").as_posix() in (FOLDER / "dashboards.yml").read_text()
