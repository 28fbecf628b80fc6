"""POST /v1/programs on the demo: the answers of the same calls one by one, streams by name, failures in their place,
bounds, cancelling, and charges."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inlaid.program import Condition, Program
from tests.server.live import Live, serving

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with serving("--max-program-calls", "12", "--max-program-tokens", "800", "--tenant", "user") as live:
        yield live


def said(server: Live, model: str, text: str) -> str:
    messages = [{"role": "user", "content": text}]
    answer = server.ask("POST", "/v1/chat/completions", {"model": model, "messages": messages, **GREEDY})
    return str(answer.json["choices"][0]["message"]["content"])


def judged() -> Program:
    program = Program(["velar", "verdict", "shown"])
    program.input("text")
    program.chat("velar", "Translate to Velar: {text}", "to_velar", **GREEDY)
    program.chat("verdict", "Is this request safe? {text}", "safety", **GREEDY)
    program.branch("shown", Condition(value="verdict", test="starts_with", against="Safe"), "velar", "verdict")
    return program


def body(program: Program, **more: Any) -> dict[str, Any]:
    return {**json.loads(program.to_json()), **more}


TEXT = "a ring today will trust this ring."


def test_a_program_answers_as_its_calls_one_by_one(server: Live) -> None:
    found = server.ask("POST", "/v1/programs", body(judged(), inputs={"text": TEXT})).json
    velar = said(server, "to_velar", f"Translate to Velar: {TEXT}")
    verdict = said(server, "safety", f"Is this request safe? {TEXT}")
    results = {name: each["value"] for name, each in found["results"].items()}
    shown = velar if verdict.startswith("Safe") else verdict
    assert results == {"velar": velar, "verdict": verdict, "shown": shown}
    assert [call["name"] for call in found["calls"]] == ["velar", "verdict"]
    assert found["usage"]["completion_tokens"] == sum(call["completion_tokens"] for call in found["calls"])


def events_of(server: Live, given: dict[str, Any]) -> list[dict[str, Any]]:
    answer = server.ask("POST", "/v1/programs", {**given, "stream": True})
    lines = [line.removeprefix("data: ") for line in answer.body.decode().splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_names_its_results(server: Live) -> None:
    events = events_of(server, body(judged(), inputs={"text": TEXT}))
    whole = server.ask("POST", "/v1/programs", body(judged(), inputs={"text": TEXT})).json
    for name, result in whole["results"].items():
        mine = [event for event in events if event.get("name") == name]
        assert mine[-1]["result"] == result
        assert "".join(event["delta"] for event in mine[:-1]) in (result["value"], "")
    assert events[-1]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_failures_stand_in_their_place(server: Live) -> None:
    program = Program(["all", "joined", "fine"])
    program.input("texts")
    with program.map("all", "texts") as each:
        each.chat("velar", "Translate to Velar: {item}", "to_velar", **GREEDY)
    program.join("joined", "all")
    program.chat("fine", "Translate to Velar: my tower", "to_velar", **GREEDY)
    found = server.ask("POST", "/v1/programs", body(program, inputs={"texts": ["my ring", "word " * 2000]})).json
    good, bad = found["results"]["all"]["elements"]
    assert good == {"value": said(server, "to_velar", "Translate to Velar: my ring")}
    assert "all[1].velar" in bad["error"]["message"]
    assert found["results"]["joined"]["error"]["message"] == bad["error"]["message"]
    assert found["results"]["fine"]["value"]


def many(count: int, **sampling: Any) -> dict[str, Any]:
    program = Program()
    with program.map("all", count, "n") as each:
        each.generate("one", "number {n}", None, ignore_eos=True, **{"temperature": 0, "max_tokens": 4, **sampling})
    return body(program)


def test_calls_and_tokens_are_bounded(server: Live) -> None:
    elements = server.ask("POST", "/v1/programs", many(15)).json["results"]["all"]["elements"]
    assert ["error" in each for each in elements] == [False] * 12 + [True] * 3
    assert "more than the 12 calls" in elements[-1]["error"]["message"]
    fewer = server.ask("POST", "/v1/programs", {**many(3), "max_calls": 1}).json["results"]["all"]["elements"]
    assert ["error" in each for each in fewer] == [False, True, True]
    few = server.ask("POST", "/v1/programs", {**many(3), "max_tokens": 24}).json["results"]["all"]["elements"]
    assert ["error" in each for each in few] == [False, False, True], "each takes ten"
    single = Program()
    single.generate("one", "number", max_tokens=900)
    refused = server.ask("POST", "/v1/programs", body(single))
    assert refused.status == 400, "a program of which nothing can be answered is refused as a whole"
    assert "of the 800 that the program may take" in refused.json["error"]["message"]


@pytest.mark.parametrize(
    ("wrong", "status", "says"),
    [
        ({"nodes": [{"kind": "generate", "name": "x", "prompt": "hi", "adapter": "nobody"}]}, 404, "'nobody'"),
        ({"nodes": [{"kind": "text", "name": "x", "template": "{y}"}]}, 400, "'y'"),
        ({"nodes": [{"kind": "text", "name": "x", "template": "{x}"}]}, 400, "circle"),
        ({"nodes": [{"kind": "function", "name": "x"}]}, 400, "function"),
        ({"nodes": [{"kind": "text", "name": "x", "template": "", "code": "1"}]}, 400, "code"),
        ({"nodes": []}, 400, "nodes"),
        ({"nodes": [{"kind": "text", "name": "x", "template": "{{{{ 7*7 }}}}"}], "colour": 1}, 400, "colour"),
    ],
)
def test_what_cannot_run_is_refused(server: Live, wrong: dict[str, Any], status: int, says: str) -> None:
    answer = server.ask("POST", "/v1/programs", wrong)
    assert answer.status == status
    assert says in answer.json["error"]["message"]


def test_templates_are_not_evaluated(server: Live) -> None:
    given = {
        "nodes": [{"kind": "text", "name": "x", "template": "{{{{ 7*7 }}}} {y}"}],
        "inputs": {"y": "{{ 7*7 }} {x}"},
    }
    found = server.ask("POST", "/v1/programs", given).json
    assert found["results"]["x"]["value"] == "{{ 7*7 }} {{ 7*7 }} {x}"


def test_a_client_that_leaves_ends_its_calls(server: Live) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    given = {**many(4, max_tokens=350), "stream": True}
    connection.request("POST", "/v1/programs", json.dumps(given), {"Content-Type": "application/json"})
    connection.getresponse().read(20)
    connection.close()
    server.until_metric("vllm:num_requests_running", 0)
    server.until_metric("inlaid:kv_blocks_used", 0)
    assert server.ask("GET", "/health").status == 200


def test_time_that_is_over_ends_the_calls(server: Live) -> None:
    found = server.ask("POST", "/v1/programs", {**many(2, max_tokens=350), "seconds": 0.05})
    assert "are over" in found.body.decode()
    server.until_metric("vllm:num_requests_running", 0)


def test_the_tenant_is_charged_for_each_call_once(server: Live) -> None:
    program = Program()
    for name in ("x", "y", "z"):
        program.generate(name, "a prompt that is the same", None, ignore_eos=True, **GREEDY)
    found = server.ask("POST", "/v1/programs", body(program, user="payer")).json
    assert [call.get("equals") for call in found["calls"]] == [None]
    assert found["usage"]["completion_tokens"] == 24
    assert len({each["value"] for each in found["results"].values()}) == 1
    charged = server.ask("GET", "/v1/fairness").json["tenants"]["payer"]
    assert (charged["requests"], charged["output_tokens"]) == (1, 24)
    assert charged["prompt_tokens"] == found["usage"]["prompt_tokens"]


def test_the_api_describes_programs(server: Live) -> None:
    described = server.ask("GET", "/openapi.json").json
    operation = described["paths"]["/v1/programs"]["post"]
    assert "text/event-stream" in operation["responses"]["200"]["content"]
    schemas = described["components"]["schemas"]
    kinds = {name for name in schemas if schemas[name].get("properties", {}).get("kind")}
    assert {"Generate", "Text", "Join", "Split", "Best", "Branch", "Map"} <= kinds


def test_the_library_and_the_server_share_one_form(server: Live, tmp_path: Path) -> None:
    given = body(judged(), inputs={"text": TEXT}, outputs=["shown"])
    assert list(server.ask("POST", "/v1/programs", given).json["results"]) == ["shown"]
