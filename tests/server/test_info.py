"""A live server about itself: tokens, metrics per adapter, and an openapi.json that is true to what is accepted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from inlaid.server import info
from inlaid.server.errors import BadRequest
from inlaid.server.metrics import OTHER, Metrics
from inlaid.server.openapi import plain_path
from inlaid.server.routes import ROUTES
from tests.server.live import DEMO, Live


def test_tokenize_and_detokenize_are_inverse(server: Live) -> None:
    text = "The sea, and the 🙂."
    tokens = server.ask(
        "POST", "/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
    ).json
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 1024
    assert server.ask("POST", "/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": text}


def test_tokenize_counts_a_conversation_as_the_chat_route_does(server: Live) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    count = server.ask("POST", "/tokenize", {"messages": messages}).json["count"]
    usage = server.ask("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json["usage"]
    assert usage["prompt_tokens"] == count


def test_metrics_have_vllms_names_and_an_adapter_label(server: Live) -> None:
    def count(name: str) -> float:
        page = server.ask("GET", "/metrics").body.decode()
        lines = [line for line in page.splitlines() if line.startswith(f"{name}{{") and 'adapter="code"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    names = {
        "vllm:prompt_tokens_total": 5,
        "vllm:generation_tokens_total": 7,
        "vllm:request_success_total": 1,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:inter_token_latency_seconds_count": 6,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:request_queue_time_seconds_count": 1,
    }
    before = {name: count(name) for name in names}
    body = {"model": "code", "prompt": [5, 6, 7, 8, 9], "max_tokens": 7, "ignore_eos": True}
    assert server.ask("POST", "/v1/completions", body).status == 200
    grown = {name: count(name) - before[name] for name in names}
    gaps = grown.pop("vllm:inter_token_latency_seconds_count")
    assert 1 <= gaps <= 6  # tokens that came together count as one
    assert grown == {name: names[name] for name in grown}
    page = server.ask("GET", "/metrics").body.decode()
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:prefix_cache_queries_total"):
        assert f"\n{name}{{" in page
    assert 'vllm:lora_adapter_loaded{adapter_name="code",level="gpu",pinned="false"} 1.0' in page


def test_refusals_are_counted_apart(server: Live) -> None:
    ended, refused = server.metric("vllm:request_success_total"), server.metric("inlaid:requests_refused_total")
    assert server.ask("POST", "/v1/completions", {"prompt": [5] * 1024}).status == 400
    assert server.metric("vllm:request_success_total") == ended
    assert server.metric("inlaid:requests_refused_total") == refused + 1


def test_only_the_admin_key_sees_paths(server: Live) -> None:
    paths = ("/v1/models", "/v1/models/code", "/v1/models/demo", "/v1/adapters", "/get_model_info", "/get_server_info")
    for path in paths:
        assert b"/" not in server.ask("GET", path).body
        assert str(DEMO).encode() in server.admin("GET", path).body


def test_the_number_of_adapter_labels_is_bounded() -> None:
    metrics = Metrics("base", 2)
    assert [metrics.label(name) for name in ("a", "b", "c", "a", None, "d")] == ["a", "b", OTHER, "a", "", OTHER]


def test_openapi_knows_every_route_and_field(server: Live) -> None:
    document = server.ask("GET", "/openapi.json").json
    assert document["openapi"].startswith("3.")
    for route in ROUTES:
        operation = document["paths"][plain_path(route)][route.method.lower()]
        assert operation["summary"]
        if route.body is not None:
            name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            schema = document["components"]["schemas"][name]
            assert set(schema["properties"]) == {field.name for field in msgspec.structs.fields(route.body)}
            assert schema.get("additionalProperties", True) is route.lenient


def test_every_optional_field_may_be_null(server: Live) -> None:
    document = server.ask("GET", "/openapi.json").json
    for path, body in {
        "/v1/completions": {"prompt": "a", "max_tokens": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    }.items():
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = document["components"]["schemas"][reference.rpartition("/")[2]]
        nulls = {name: None for name in schema["properties"] if name not in (*body, "model")}
        assert server.ask("POST", path, {**nulls, **body}).status == 200


def test_version_health_and_readiness_need_no_key(server: Live) -> None:
    assert server.ask("GET", "/version").json.keys() == {"version"}
    assert server.ask("GET", "/health").json["status"] == "ok"
    assert server.ask("GET", "/ready").status == 200


def test_each_adapters_place_and_history(server: Live) -> None:
    body = {"model": "code", "prompt": [5, 6, 7], "max_tokens": 2}
    for _ in range(2):
        assert server.ask("POST", "/v1/completions", body).status == 200
    cards = {card["name"]: card for card in server.ask("GET", "/v1/adapters").json["adapters"]}
    code = cards["code"]
    listed = {card["id"]: card for card in server.ask("GET", "/v1/models").json["data"]}
    assert "adapter" not in listed["demo"]
    assert listed["code"] == server.ask("GET", "/v1/models/code").json
    assert listed["code"]["adapter"] == {key: value for key, value in code.items() if key != "path"}
    assert (code["tier"], code["on_host"], code["loads"], code["evictions"], code["reads"]) == ("device", True, 1, 0, 0)
    assert code["hits"] >= 1
    assert code["copy_seconds"] > 0
    page = server.ask("GET", "/metrics").body.decode()
    assert f'\ninlaid:lora_adapter_hits_total{{adapter_name="code"}} {float(code["hits"])}\n' in page
    assert '\ninlaid:lora_adapter_loads_total{adapter_name="code"} 1.0\n' in page
    assert 'vllm:lora_adapter_load_seconds{adapter_name="code",level="gpu"}' in page


def test_a_text_of_more_characters_than_its_tokens_can_hold_is_refused_unread() -> None:
    encoder, tokenizer = SimpleNamespace(max_model_len=1024), SimpleNamespace(max_token_bytes=3)  # that cannot encode
    service: Any = SimpleNamespace(encoder=encoder, tokenizer=tokenizer)
    with pytest.raises(BadRequest, match="prompt has 393217 characters; at most 131072 tokens are listed"):
        info._encoded(service, "a" * (3 * 131_072 + 1), False)


def test_ids_without_end_and_fields_without_end_are_refused_before_they_are_made_objects(server: Live) -> None:
    many = server.ask("POST", "/detokenize", raw=b'{"tokens": [' + b"5," * 140_000 + b"5]}")
    assert (many.status, many.json["error"]["param"]) == (400, "tokens")
    assert "at most 131072 are turned into text" in many.json["error"]["message"]
    long = server.ask("POST", "/tokenize", {"prompt": "ab cd " * 70_000})
    assert (long.status, long.json["error"]["param"]) == (400, "prompt")
    assert long.json["error"]["message"].endswith("tokens; at most 131072 are listed")
    body = b'{"prompt": "a", "logit_bias": {' + b'"5":1,' * 102_000 + b'"5":1}}'
    answer = server.ask("POST", "/v1/completions", raw=body)
    assert answer.status == 400
    assert "102003 fields, or colons in its texts; at most 101024 are read" in answer.json["error"]["message"]
