"""Templates: what they become, and one clear line for everything that is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlaid.workload.popularity import AdapterChoice
from perf.instance import Instance
from perf.template import TemplateError, instantiate

GRID = """
[selection]
models = ["tiny"]
datasets = ["short", "trace"]
features = ["plain", "fair"]
[axes]
adapters = [1, 2]
rate = 4.0
skew = "zipf-1.2"
[server]
kind = "fake"
args = { slots = [2, 4], itl-ms = 1 }
[router]
port = 0
[client]
warmup = 2
[slo.default]
ttft_ms = 100
[features]
plain = ""
fair = "policy=vtc,fail-every=9"
[models.tiny]
model_path = "tiny"
adapters = ["x=/tmp", "y=/tmp"]
[datasets.short]
num_requests = 8
output = { value = 4 }
[datasets.trace]
dataset_path = "TRACE"
time_in_secs = 9
[extra-envs]
LOG_LEVEL = "INFO"
"""
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,3\n2023-11-16 18:15:48,6,2\n"


def saved(tmp_path: Path, text: str) -> Path:
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    path = tmp_path / "t.toml"
    path.write_text(text.replace("TRACE", str(trace)))
    return path


def points(tmp_path: Path, text: str = GRID) -> dict[str, Instance]:
    return {instance.point: instance for instance in instantiate(saved(tmp_path, text))}


def test_axes_multiply(tmp_path: Path) -> None:
    """2 datasets x 2 features x 2 counts of adapters x 2 numbers of slots."""
    found = points(tmp_path)
    assert len(found) == 16
    point = found["tiny-short-fair/adapters-2/slots-4"]
    assert point.labels == {
        "model": "tiny", "dataset": "short", "feature": "fair", "adapters": "2", "slots": "4",
    }  # fmt: skip
    assert point.server.adapters == [("x", "/tmp"), ("y", "/tmp")]
    assert point.server.policy == "vtc"
    argv = point.server_argv(7)
    assert argv[argv.index("--slots") + 1] == "4"
    assert argv[argv.index("--fail-every") + 1] == "9"
    stream = point.workload.streams[0]
    assert (stream.arrival.rate, stream.adapters) == (4.0, AdapterChoice("zipf", 1.2))
    assert point.environment == {"LOG_LEVEL": "INFO"}
    assert "--warmup" in point.client_argv(7, Path("w"), Path("o"))
    assert point.workload.classes["default"].ttft_ms == 100


def test_a_trace_loops_until_its_time_is_over_at_the_rate_asked_for(tmp_path: Path) -> None:
    stream = points(tmp_path)["tiny-trace-plain/adapters-1/slots-2"].workload.streams[0]
    assert stream.trace is not None
    assert (stream.trace.loop, stream.duration_s, stream.arrival.process) == (True, 9, "trace")
    assert stream.trace.time_scale == pytest.approx(0.5 / 4.0)


def test_a_table_in_an_axis_moves_several_keys(tmp_path: Path) -> None:
    text = GRID.replace("rate = 4.0", "rate = [{ rate = 1.0, skew = 'uniform' }, { rate = 2.0, skew = 'distinct' }]")
    text = text.replace('skew = "zipf-1.2"\n', "")
    found = points(tmp_path, text)
    skews = {name: p.workload.streams[0].adapters.distribution for name, p in found.items() if "short-plain" in name}
    assert skews["tiny-short-plain/adapters-1/rate-0/slots-2"] == "uniform"
    assert skews["tiny-short-plain/adapters-1/rate-1/slots-2"] == "distinct"


def test_the_quant_axis_chooses_the_model(tmp_path: Path) -> None:
    text = GRID.replace("rate = 4.0", "quant = ['none', 'gptq4']")
    text = text.replace('model_path = "tiny"', 'quant = { none = "tiny", gptq4 = "tiny-4bit" }')
    models = {p.labels["quant"]: p.server.model for p in points(tmp_path, text).values()}
    assert models == {"none": "tiny", "gptq4": "tiny-4bit"}


def test_random_adapters_are_as_many_as_the_axis_says(tmp_path: Path) -> None:
    text = GRID.replace('adapters = ["x=/tmp", "y=/tmp"]', "random_adapters = { count = 1, ranks = [8, 64] }")
    found = points(tmp_path, text.replace("adapters = [1, 2]", "adapters = [3, 40]"))
    served = found["tiny-short-plain/adapters-40/slots-2"].server.adapters
    assert len(served) == 40
    assert served[1][0] == "random-0001-r64"
    assert found["tiny-short-plain/adapters-3/slots-2"].server.adapters == served[:3]


def test_visible_devices_of_one_node_win_over_the_extra_environment(tmp_path: Path) -> None:
    text = "[global]\nnum_gpus_per_node = 2\ncuda_devices = [4, 5, 6]\n" + GRID + 'CUDA_VISIBLE_DEVICES = "9"\n'
    assert next(iter(points(tmp_path, text).values())).environment["CUDA_VISIBLE_DEVICES"] == "4,5"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("itl-ms = 1", "itl-ms = ", "not valid TOML"),
        ("[server]", "[servr]", r"unknown section \[servr\]: did you mean server\?"),
        ("rate = 4.0", "rat = 4.0", r"unknown key `rat` - at `axes`: did you mean rate\?"),
        ("warmup = 2", "warmpu = 2", r"unknown key client\.warmpu: did you mean warmup\?"),
        ("num_requests = 8", "num_request = 8", r"unknown key `num_request` - at `dataset`: did you mean num_requests"),
        ("rate = 4.0", 'rate = "fast"', "Expected `float"),
        ('kind = "fake"', 'kind = "fack"', "Invalid enum value 'fack'"),
        ('features = ["plain", "fair"]', 'features = ["plane"]', r"unknown feature 'plane' .*did you mean plain\?"),
        ('models = ["tiny"]', 'models = ["tinny"]', r"unknown model 'tinny' .*did you mean tiny\?"),
        ('"short", "trace"', '"short", "tracy"', r"unknown dataset 'tracy' .*did you mean trace\?"),
        ('dataset_path = "TRACE"', 'dataset_path = "/no/such.csv"', r"dataset /no/such\.csv does not exist"),
        ("adapters = [1, 2]", "adapters = [1, 3]", "asks for 3 and the model has 2"),
        ("adapters = [1, 2]", "adapters = []", r"the axis axes\.adapters is an empty list"),
        ("adapters = [1, 2]", "adapters = [1, 1]", "two points are both called"),
        ("rate = 4.0", 'quant = "gptq4"', "model tiny has no quant 'gptq4'"),
        ('skew = "zipf-1.2"', 'skew = "ziff"', "unknown skew 'ziff'"),
        ("policy=vtc", "policy vtc", "is not KEY or KEY=VALUE"),
        ("rate = 4.0", 'rate = 4.0\npolicy = "fcfs"', r"axes\.policy and a feature both say the policy \(vtc\)"),
        ('kind = "fake"', 'kind = "vllm"', "policy 'vtc': vLLM has none of ours"),
        (
            'model_path = "tiny"',
            'model_path = "tiny"\nnum_available_blocks = 5',
            "kind fake cannot be told how many blocks",
        ),
        ("ttft_ms = 100", "ttft_ms = -1", "above 0 ms"),
        ('models = ["tiny"]', "models = []", "chooses nothing"),
        ('adapters = ["x=/tmp", "y=/tmp"]', 'adapters = ["/no/such/*"]', "no adapter .* at /no/such"),
    ],
)
def test_every_mistake_is_one_clear_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GRID
    with pytest.raises(TemplateError, match=message) as caught:
        points(tmp_path, GRID.replace(old, new, 1))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "t.toml"))


# The keys and values of BlitzScale's e2e-blitz.toml; two datasets and two models that are not selected are left out.
BLITZ = """
[global]
num_gpus_per_node = 4
cuda_devices = [0, 1, 2, 3, 4, 5, 6, 7]
[selection]
models = ["llama3_8b"]
features = ["blitz_ultra"]
datasets = ["AzureConv2023-5min"]
[server]
ibv_rate = 100
inter_node = true
[server.config]
g0001 = "10.254.0.10"
g0002 = "10.254.0.9"
[router]
port = 11236
max_prefill_num = 13
max_decode_num = 13
min_prefill_num = 1
min_decode_num = 1
prefill_lower_bound = 0.5
prefill_upper_bound = 0.8
decode_lower_bound = 0.75
decode_upper_bound = 0.95
migration_lower_bound = 0.2
migration_upper_bound = 0.4
scale_down_threshold_millis = 333
mock_load_millis = 0
mock_transfer_millis = 0
[extra-envs]
LOG_LEVEL = "INFO"
[features]
sllm_cache_replace = "ngrok,impl_sllm,cache_replace"
sllm_optimal = "ngrok,impl_sllm,cache_all_hit,mutate"
blitz_ultra = "ngrok,impl_blitz,impl_live_pro,impl_fast_pro,mutate"
blitz_tanz_debug = "ngrok,impl_blitz,impl_fast_pro"
[datasets]
[datasets.AzureConv2023-5min]
dataset_path = "./dataset_home/AzureConv2023-5min.csv"
time_in_secs = 150
[models]
[models.llama3_8b]
model_path = "/nvme/huggingface/models/DeepSeek-R1-Distill-Llama-8B"
tokenizer = "/nvme/huggingface/models/DeepSeek-R1-Distill-Llama-8B/tokenizer.json"
tokens_prefilled_per_sec = 12000
tokens_transferred_per_sec = 60000
num_hidden_layers = 32
num_available_blocks = 30000
tp_size = 1
[models.qwen_72b]
model_path = "/nvme/Qwen2.5-72B-Instruct"
tokenizer = "/nvme/Qwen2.5-72B-Instruct/tokenizer.json"
tokens_prefilled_per_sec = 7500
tokens_transferred_per_sec = 40000
num_hidden_layers = 80
num_available_blocks = 8000
tp_size = 8
"""


def blitz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str = BLITZ) -> Instance:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset_home").mkdir()
    (tmp_path / "dataset_home" / "AzureConv2023-5min.csv").write_text(TRACE)
    (found,) = instantiate(saved(tmp_path, text))
    return found


def test_blitzscales_template_instantiates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = blitz(tmp_path, monkeypatch)
    assert point.point == "llama3_8b-AzureConv2023-5min-blitz_ultra"
    assert point.server.model.endswith("DeepSeek-R1-Distill-Llama-8B")
    assert point.server.arguments == {"num-blocks": 30000}
    assert point.environment == {"LOG_LEVEL": "INFO", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert (point.port, point.client["tokenizer"][-14:]) == (11236, "tokenizer.json")
    stream = point.workload.streams[0]
    assert stream.trace is not None
    assert (stream.duration_s, stream.trace.loop) == (150, True)


def test_its_keys_that_have_no_meaning_here_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = blitz(tmp_path, monkeypatch).refused
    assert set(refused) >= {
        "server.ibv_rate", "server.inter_node", "server.config", "router.max_prefill_num", "router.mock_load_millis",
        "router.scale_down_threshold_millis", "models.llama3_8b.tokens_prefilled_per_sec",
        "features.blitz_ultra.ngrok", "features.blitz_ultra.impl_live_pro", "features.blitz_ultra.mutate",
    }  # fmt: skip
    assert not any(key.startswith(("router.port", "models.llama3_8b.num", "models.qwen", "global")) for key in refused)
    assert all(refused.values())


def test_a_refused_key_can_be_dropped_by_naming_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = BLITZ.replace("num_gpus_per_node = 4", 'num_gpus_per_node = 4\nwithout = ["server.ibv_rate"]')
    point = blitz(tmp_path, monkeypatch, text)
    assert list(point.dropped) == ["server.ibv_rate"]
    assert "server.ibv_rate" not in point.refused


def test_a_size_of_parallelism_is_the_servers_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = blitz(tmp_path, monkeypatch, BLITZ.replace('models = ["llama3_8b"]', 'models = ["qwen_72b"]'))
    assert point.server.arguments == {"num-blocks": 8000, "tensor-parallel-size": 8}
    assert not any("tp_size" in key for key in point.refused)


def test_without_names_only_what_would_be_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"global\.without names server\.kind"):
        points(tmp_path, '[global]\nwithout = ["server.kind"]\n' + GRID)


def test_without_may_name_a_key_of_one_of_several_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset_home").mkdir()
    (tmp_path / "dataset_home" / "AzureConv2023-5min.csv").write_text(TRACE)
    text = BLITZ.replace('features = ["blitz_ultra"]', 'features = ["blitz_ultra", "sllm_optimal"]')
    text = text.replace("num_gpus_per_node = 4", 'num_gpus_per_node = 4\nwithout = ["features.blitz_ultra.impl_blitz"]')
    ultra, optimal = instantiate(saved(tmp_path, text))
    assert list(ultra.dropped) == ["features.blitz_ultra.impl_blitz"]
    assert not optimal.dropped


def test_a_dry_run_notes_a_data_file_that_is_not_there(tmp_path: Path) -> None:
    path = saved(tmp_path, GRID.replace('dataset_path = "TRACE"', 'dataset_path = "/no/such.csv"'))
    found = {instance.labels["dataset"]: instance.missing for instance in instantiate(path, dry=True)}
    assert found == {"short": "", "trace": "dataset /no/such.csv does not exist: No such file"}


def test_a_suite_is_a_dataset_by_its_name_and_sizes_the_server(tmp_path: Path) -> None:
    text = GRID.replace('datasets = ["short", "trace"]', 'datasets = ["overload-s4"]').replace("rate = 4.0\n", "")
    text = text.replace('skew = "zipf-1.2"', 'skew = "tenant"').replace("adapters = [1, 2]", "adapters = 2")
    text = text.replace('kind = "fake"\nargs = { slots = [2, 4], itl-ms = 1 }', 'kind = "inlaid"')
    point = next(iter(points(tmp_path, text).values()))
    assert point.server.arguments["num-blocks"] == 65_000 // 16 + 1
    assert point.workload.name == "overload-s4"
