"""The console's routes on a server of the demo: headers, keys, the stream, an adapter's details."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from inlaid.config import ServerConfig
from inlaid.server.app import routes_of
from inlaid.server.console_state import accuracy, cold_start
from inlaid.worker.messages import AdapterInfo
from tests.console.stream import first_state
from tests.server.live import ADMIN_KEY, DEMO, Live, serving

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with serving("--admin-key", ADMIN_KEY, "--tenant", "header") as live:
        yield live


def test_the_page_has_strict_headers_and_is_asked_again_by_its_tag(server: Live) -> None:
    page = server.ask("GET", "/")
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert server.ask("GET", "/", headers={"If-None-Match": page.headers["ETag"]}).status == 304
    script = server.ask("GET", "/console/files/app.js", headers={"Accept-Encoding": "gzip"})
    assert script.headers["Content-Encoding"] == "gzip"
    assert script.headers["Content-Type"].startswith("text/javascript")
    for path in ("/console/files/none.js", "/console/files/../static.py", "/console/files/%2e%2e/static.py"):
        assert server.ask("GET", path).status == 404


def test_the_stream_tells_readers_no_tenants_and_no_paths(server: Live) -> None:
    body = {"model": "to_velar", "prompt": "the small chair", "max_tokens": 3}
    assert server.ask("POST", "/v1/completions", body, {"X-Tenant": "anna"}).status == 200
    reader, admin = first_state(server, {}), first_state(server, ADMIN)
    assert {"load", "server", "adapters", "history"} <= reader.keys()
    assert not {"tenants", "fairness", "scheduler", "service", "paths"} & reader.keys()
    assert str(DEMO) not in json.dumps(reader)
    assert admin["paths"]["to_velar"].startswith(str(DEMO))
    assert admin["tenants"]["anna"]["requests"] == 1
    row: dict[str, Any] = {"tier": None}
    while row["tier"] != "device":  # a busy engine is asked for its adapters less often than once a second
        reader = first_state(server, {})
        row = dict(zip(reader["server"]["columns"], reader["adapters"]["to_velar"], strict=True))
    assert (row["tokens"], row["requests"], row["queue"]) == (3, 1, 0)
    assert row["ttft_p50"] > 0
    assert reader["step"]["how"] == "measured"
    assert reader["step"]["floor"]["seconds"] > 0


def test_a_cold_start_says_where_the_adapter_came_from() -> None:
    times = {"load_seconds": 0.5, "check_seconds": 0.2, "copy_seconds": 0.1}
    info = AdapterInfo(name="a", identity="i", path="p", rank=4, bytes=1, tier="device", loads=1, **times)
    parts = {"read": 0.3, "check": 0.2, "copy": 0.1}
    assert cold_start(info, True, 0.9) == {"origin": "disk", **parts, "ttft": 0.9}
    assert cold_start(info, True, 0.3) == {"origin": "registered", **parts, "ttft": 0.3}  # no request waited for a read
    again = msgspec.structs.replace(info, loads=2, evictions=1)
    assert cold_start(again, False, 0.9) == {"origin": "host", **parts, "read": 0.0, "check": 0.0, "ttft": 0.9}
    assert cold_start(again, True, 0.9)["origin"] == "disk"


def test_a_probe_of_the_stream_ends(server: Live) -> None:
    assert server.ask("HEAD", "/console/events").status == 200


def test_an_adapters_page_says_what_was_matched(server: Live) -> None:
    found = server.ask("GET", "/console/adapters/to_velar").json
    assert found["parts"]["q_proj"]["ranks"] == [4] * 6
    assert found["parts"]["down_proj"]["layers"] == []
    assert len(found["identity"]) == 64
    assert server.ask("GET", "/console/adapters/none").status == 404


def test_changes_need_the_admin_key(server: Live) -> None:
    change = {"lora_name": "to_velar", "pinned": True, "draining": True}
    assert server.ask("POST", "/v1/change_lora_adapter", change).status == 401
    changed = server.admin("POST", "/v1/change_lora_adapter", change)
    assert (changed.json["pinned"], changed.json["draining"]) == (True, True)
    refused = server.ask("POST", "/v1/completions", {"model": "to_velar", "prompt": "a"})
    assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
    back = server.admin("POST", "/v1/change_lora_adapter", {**change, "pinned": False, "draining": False})
    assert (back.json["pinned"], back.json["draining"]) == (False, False)
    assert server.ask("POST", "/v1/completions", {"model": "to_velar", "prompt": "a", "max_tokens": 1}).status == 200
    assert server.admin("POST", "/v1/change_lora_adapter", {"lora_name": "none"}).status == 404
    assert server.ask("POST", "/console/what-if", {}).status == 401
    assert server.admin("POST", "/console/what-if", {"policy": "none"}).status == 400


def test_the_console_can_be_left_out() -> None:
    assert "/" in {route.path for route in routes_of(ServerConfig())}
    assert not [route for route in routes_of(ServerConfig(console=False)) if route.path in ("/", "/console/events")]


def test_the_record_of_a_quantized_base_is_told(tmp_path: Path) -> None:
    task = {"adapter_hash": "abc", "loss_full": 0.5, "loss_quantized": 0.6, "checked": "2026-11-30T08:00:00+00:00"}
    record = {"settings": {"grid": {"bits": 4}, "dtype": "float32"}, "tasks": {"maths": task}}
    (tmp_path / "inlaid.json").write_text(json.dumps(record))
    found = accuracy(tmp_path, "", "version", 1.0, {"abc": "served"})
    assert found["settings"] == {"bits": 4, "dtype": "float32"}
    assert found["tasks"]["maths"]["adapter"] == "served"
    report = tmp_path / "report.json"
    scored = {"adapter_identity": "abc", "adapter": "x", "task": "t", "metric": "bleu", "score": 1.0, "drop": 3.0}
    report.write_text(json.dumps({"records": [{"base_version": "version", **scored}]}))
    (row,) = accuracy(tmp_path, str(report), "version", 1.0, {"abc": "served"})["records"]
    assert row["adapter"] == "served"
    assert "drops 3.00 points" in row["why"]
    (tmp_path / "inlaid.json").write_text("{")
    assert accuracy(tmp_path, "", "version", 1.0, {})["fault"] == "inlaid.json cannot be read: JSONDecodeError"
