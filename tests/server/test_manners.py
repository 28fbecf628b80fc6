"""Manners over HTTP: hints instead of shrugs, other servers' routes, unknown fields with a warning."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import ADMIN_KEY, Live, serving

CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("profiles")
    with serving(
        "--strict-requests", "--reasoning-parser", "think", "--admin-key", ADMIN_KEY, "--profile-dir", str(folder)
    ) as live:
        yield live


def test_unknown_fields_are_named_in_a_header_and_once_in_the_log(server: Live) -> None:
    for stream in (False, True):
        answer = server.ask("POST", "/v1/chat/completions", {**CHAT, "sparkle": 1, "stream": stream})
        assert answer.status == 200
        assert "sparkle" in answer.headers["Warning"]
    assert "Warning" not in server.ask("POST", "/v1/chat/completions", CHAT).headers
    assert sum("unknown fields are ignored" in line and "sparkle" in line for line in server.log) == 1
    wrong = server.ask("POST", "/v1/chat/completions", {**CHAT, "max_toknes": 1})
    assert wrong.status == 400
    assert "did you mean 'max_tokens'" in wrong.json["error"]["message"]


def test_strict_requests_refuse_what_is_not_known(strict: Live) -> None:
    refused = strict.ask("POST", "/v1/chat/completions", {**CHAT, "sparkle": 1})
    assert refused.status == 400
    assert refused.json["error"]["code"] == "unknown_field"
    assert strict.ask("POST", "/v1/chat/completions", {**CHAT, "temperature": "0.5"}).status == 400


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": "0.5"},
        {"top_logprobs": 0},
        {"verbosity": "low", "prediction": {"type": "content", "content": "x"}, "prompt_cache_retention": "24h"},
        {"cache_salt": "a", "include_reasoning": False, "separate_reasoning": True, "detokenize": True},
        {"length_penalty": 1.0, "mm_processor_kwargs": {}, "kv_transfer_params": {}, "vllm_xargs": {"a": 1}},
        {"rid": "mine", "documents": [{"title": "a", "text": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]},
        {
            "messages": [
                {"role": "assistant", "content": None, "reasoning": "r", "thinking_blocks": [], "refusal": "no"}
            ]
        },
        {"response_format": {"type": "json_object", "schema": {"enum": [1]}}},
    ],
)
def test_fields_of_real_clients_are_accepted_without_a_warning(server: Live, more: dict[str, Any]) -> None:
    answer = server.ask("POST", "/v1/chat/completions", {**CHAT, **more})
    assert answer.status == 200, answer.body
    assert "Warning" not in answer.headers
    if "rid" in more:
        assert answer.json["id"] == "chatcmpl-mine"


def test_tokens_may_be_named_by_their_ids(server: Live) -> None:
    named = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = server.ask("POST", "/v1/chat/completions", {**CHAT, **named}).json["choices"][0]
    assert [one["token"] for one in choice["logprobs"]["content"]] == [f"token_id:{id}" for id in choice["token_ids"]]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/generate", "/generate"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/nowhere", "/openapi.json"),
    ],
)
def test_a_wrong_path_gets_a_hint(server: Live, path: str, meant: str) -> None:
    answer = server.ask("POST", path, CHAT)
    assert answer.status == 404
    assert meant in answer.json["error"]["message"]


def test_hints_for_empty_bodies_and_what_is_not_served(server: Live) -> None:
    assert "the body is empty" in server.ask("POST", "/v1/completions", raw=b"").json["error"]["message"]
    for path in ("/v1/embeddings", "/v1/moderations"):
        answer = server.ask("POST", path, {"model": "demo", "input": "x"})
        assert answer.status == 400
        assert "not served" in answer.json["error"]["message"]
    beyond = server.ask("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 5000, "stop": ["e", "a", "o", "."]})
    assert beyond.status == 200
    assert "max_tokens" in beyond.headers["Warning"]


def test_methods(server: Live) -> None:
    wrong = server.ask("GET", "/v1/completions")
    assert wrong.status == 405
    assert wrong.headers["Allow"] == "POST"
    head = server.ask("HEAD", "/health")
    assert (head.status, head.body) == (200, b"")
    assert server.ask("HEAD", "/v1/models").status == 200


def test_routes_of_other_servers(server: Live) -> None:
    assert server.ask("GET", "/ping").status == 200
    assert server.ask("GET", "/load").json == {"server_load": 0}
    assert server.admin("POST", "/reset_prefix_cache").status == 200
    assert "<|assistant|>" in server.ask("GET", "/tokenizer_info").json["chat_template"]
    assert server.ask("GET", "/v1/models/demo:maths").json["id"] == "maths"
    assert server.ask("GET", "/v1/models/demo:nobody").status == 404
    page = server.ask("GET", "/docs")
    assert page.headers["Content-Type"].startswith("text/html")
    assert b"http" not in page.body.replace(b"<!doctype html>", b"").split(b"<script>")[1]
    assert server.admin("POST", "/start_profile").status == 403


def test_reasoning_comes_apart_from_the_answer(strict: Live) -> None:
    """A choice of one text stands for a model that reasons."""
    body = {**CHAT, "max_tokens": 60, "guided_choice": ["<think>Oslo is cold.</think>It is cold."]}
    message = strict.ask("POST", "/v1/chat/completions", body).json["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Oslo is cold.", "It is cold.")
    dropped = strict.ask("POST", "/v1/chat/completions", {**body, "include_reasoning": False})
    assert "reasoning_content" not in dropped.json["choices"][0]["message"]
    whole = strict.ask("POST", "/v1/chat/completions", {**body, "separate_reasoning": False})
    assert whole.json["choices"][0]["message"]["content"] == body["guided_choice"][0]
    events = strict.ask("POST", "/v1/chat/completions", {**body, "stream": True}).body.decode().split("\n\n")[:-2]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Oslo is cold."
    assert "".join(delta.get("content", "") for delta in deltas) == "It is cold."


def test_a_profile_of_the_engine_is_a_trace(strict: Live) -> None:
    assert strict.ask("POST", "/start_profile").status == 401
    assert strict.admin("POST", "/stop_profile").status == 400
    assert strict.admin("POST", "/start_profile").status == 200
    assert strict.admin("POST", "/start_profile").status == 400
    assert strict.ask("POST", "/v1/chat/completions", CHAT).status == 200
    told = strict.admin("POST", "/stop_profile").body.decode()
    trace = json.loads(gzip.decompress(Path(told.split(" is in ")[1].strip()).read_bytes()))
    assert len(trace["traceEvents"]) > 100
