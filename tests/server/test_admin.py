"""Adapters and the scheduler changed while a live server serves."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inlaid.sim import fit
from inlaid.sim.cost import Load, load_cost
from tests.server.live import ADMIN_KEY, DEMO, Live

MESSAGES = [{"role": "user", "content": "hello there"}]


def say(server: Live, model: str) -> str:
    body = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    answer = server.ask("POST", "/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["message"]["content"])


def models(server: Live) -> set[str]:
    return {card["id"] for card in server.ask("GET", "/v1/models").json["data"]}


def test_load_use_and_unload_as_vllm_has_it(server: Live) -> None:
    loaded = server.admin("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "velar"})
    assert (loaded.status, loaded.body) == (200, b"Success: LoRA adapter 'new' added successfully")
    assert "new" in models(server)
    assert say(server, "new") == say(server, "to_velar") != say(server, "demo")
    again = server.admin("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "velar"})
    assert again.status == 409
    in_place = {"lora_name": "new", "lora_path": "velar", "load_inplace": True}
    assert server.admin("POST", "/v1/load_lora_adapter", in_place).status == 200
    unloaded = server.admin("POST", "/v1/unload_lora_adapter", {"lora_name": "new"})
    assert (unloaded.status, unloaded.body) == (200, b"Success: LoRA adapter 'new' removed successfully")
    assert "new" not in models(server)
    gone = server.ask("POST", "/v1/chat/completions", {"model": "new", "messages": MESSAGES})
    assert (gone.status, gone.json["error"]["code"]) == (404, "model_not_found")
    assert server.admin("POST", "/v1/unload_lora_adapter", {"lora_name": "new"}).status == 404


def test_of_two_who_load_or_unload_a_name_at_once_the_second_is_told(server: Live, adapter_root: Path) -> None:
    """Whichever of them is looked at when: one has done it, the other hears that it is so already."""
    shutil.copytree(DEMO / "adapters" / "maths", adapter_root / "other")
    for _ in range(10):
        with ThreadPoolExecutor(2) as threads:
            loads = [{"lora_name": "twice", "lora_path": path} for path in ("velar", "other")]
            answers = threads.map(lambda body: server.admin("POST", "/v1/load_lora_adapter", body), loads)
            assert sorted(answer.status for answer in answers) == [200, 409]
            unloads = [{"lora_name": "twice"}] * 2
            answers = threads.map(lambda body: server.admin("POST", "/v1/unload_lora_adapter", body), unloads)
            assert sorted(answer.status for answer in answers) == [200, 404]


def test_load_in_place_changes_the_weights_that_a_name_stands_for(server: Live, adapter_root: Path) -> None:
    folder = adapter_root / "changing"
    folder.mkdir()
    for file in (DEMO / "adapters" / "to_velar").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    body = {"lora_name": "changing", "lora_path": str(folder)}
    assert server.admin("POST", "/v1/load_lora_adapter", body).status == 200
    first = say(server, "changing")
    for file in (DEMO / "adapters" / "maths").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert say(server, "changing") == first
    assert server.admin("POST", "/v1/load_lora_adapter", {**body, "load_inplace": True}).status == 200
    assert say(server, "changing") == say(server, "maths") != first
    assert server.admin("POST", "/v1/unload_lora_adapter", {"lora_name": "changing"}).status == 200


def test_sglangs_paths(server: Live) -> None:
    body = {"lora_name": "other", "lora_path": "velar"}
    loaded = server.admin("POST", "/load_lora_adapter", body)
    assert loaded.json["success"] is True
    assert loaded.json["loaded_adapters"]["other"].endswith("velar")
    assert "other" not in server.admin("POST", "/unload_lora_adapter", {"lora_name": "other"}).json["loaded_adapters"]
    info = server.admin("GET", "/get_model_info").json
    assert info["is_generation"] is True
    assert info["model_path"].endswith("base")
    assert server.ask("GET", "/health_generate").status == 200


@pytest.mark.parametrize("path", ["/etc", "../adapters", "velar/../..", "link", str(DEMO / "adapters" / "maths")])
def test_paths_out_of_the_roots_are_refused(server: Live, adapter_root: Path, path: str) -> None:
    link = adapter_root / "link"
    if not link.exists():
        link.symlink_to(DEMO / "adapters" / "maths")
    answer = server.admin("POST", "/v1/load_lora_adapter", {"lora_name": "escape", "lora_path": path})
    assert (answer.status, answer.json["error"]["param"]) == (403, "lora_path")
    assert "escape" not in models(server)


def test_an_adapter_that_cannot_be_served_is_refused_with_its_reason(server: Live, adapter_root: Path) -> None:
    (adapter_root / "empty").mkdir(exist_ok=True)
    answer = server.admin("POST", "/v1/load_lora_adapter", {"lora_name": "empty", "lora_path": "empty"})
    assert answer.status == 400
    assert "adapter_config.json" in answer.json["error"]["message"]
    assert say(server, "to_velar")


def test_only_the_admin_key_changes_anything_or_sees_tenants(server: Live) -> None:
    for method, path, body in [
        ("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "velar"}),
        ("POST", "/unload_lora_adapter", {"lora_name": "to_velar"}),
        ("PUT", "/v1/scheduler", {"policy": "vtc"}),
        ("GET", "/v1/fairness", None),
        ("GET", "/v1/steps", None),
    ]:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert server.ask(method, path, body, headers).status == 401
    assert "to_velar" in models(server)


def test_a_cost_model_is_fitted_to_what_a_server_measured(
    server: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--url", server.url, "--api-key", ADMIN_KEY, "--name", "here", "--out", str(tmp_path / "here.json")]
    while len(told := server.admin("GET", "/v1/steps").json["steps"]) < 70:
        for words in ("one", "one two three four five six"):
            server.ask("POST", "/v1/completions", {"model": "to_velar", "prompt": words, "max_tokens": 60})
    assert all(step["seconds"] > 0 and step["load"]["adapters"] <= 1 for step in told)
    assert fit.main(command) == 0
    assert json.loads(capsys.readouterr().out)["steps"] >= 10
    cost = load_cost(str(tmp_path / "here.json"))
    assert 0 < cost.step_seconds(Load(decodes=1, adapters=1, adapter_rows=1)) < 10
    assert fit.main([*command[:2], *command[4:]]) == 2
    assert "--api-key" in capsys.readouterr().err
    assert fit.main(["--url", "http://127.0.0.1:1", *command[4:]]) == 2
    assert "no inlaid server answers" in capsys.readouterr().err


def test_the_scheduler_is_changed_while_serving(server: Live) -> None:
    before = server.admin("GET", "/v1/scheduler").json
    assert before["policy"] == "fcfs"
    changed = server.admin("PUT", "/v1/scheduler", {"policy": "vtc", "weights": {"alice": 2.0}})
    assert changed.status == 200
    assert server.admin("GET", "/v1/scheduler").json["policy"] == "vtc"
    assert server.admin("GET", "/v1/scheduler").json["weights"] == {"alice": 2.0}
    assert say(server, "to_velar")
    refused = server.admin("PUT", "/v1/scheduler", {"policy": "lottery"})
    assert refused.status == 400
    assert "lottery" in refused.json["error"]["message"]
    assert server.admin("PUT", "/v1/scheduler", {"weights": {"alice": -1.0}}).status == 400
    assert server.admin("GET", "/v1/scheduler").json["policy"] == "vtc"
    assert server.admin("PUT", "/v1/scheduler", {"policy": "fcfs", "weights": {}}).status == 200


def test_fairness_shows_who_was_served(server: Live) -> None:
    server.ask("POST", "/v1/completions", {"prompt": "a"}, {"Authorization": "Bearer someone"})
    tenants = server.admin("GET", "/v1/fairness?window=600").json["tenants"]
    named = [name for name in tenants if name.startswith("key-")]
    assert named
    assert tenants[named[0]]["service"] > 0


def test_adapters_are_listed_with_what_they_take(server: Live) -> None:
    say(server, "to_velar")
    listed = {card["name"]: card for card in server.ask("GET", "/v1/adapters").json["adapters"]}
    card = listed["to_velar"]
    assert card["tier"] == "device"
    assert card["rank"] == 4
    assert card["bytes"] > 0
    assert len(card["identity"]) == 64
