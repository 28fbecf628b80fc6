"""`inlaid cluster` on CPUs for real: three replicas of the demo under load; one is killed, one drained, one added."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from inlaid.engine.request import SamplingParams
from inlaid.llm import LLM
from tests.console.stream import first_state
from tests.server.live import ADMIN_KEY, DEMO, Live, serving

TOKENS = 24
ADAPTERS = ["to_velar", "to_mirun", None]
TEXTS = ["the old river runs to the sea", "a small bird sings", "we go home now", "tell me a story of the moon"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Live]:
    flags = ["--replicas", "3", "--admin-key", ADMIN_KEY, "--served-model-name", "demo"]
    with serving(*flags, "--num-blocks", "100", command="cluster", engines=4) as live:
        yield live


def bodies() -> list[dict[str, Any]]:
    """Return greedy requests and drawn ones with a seed, for adapters and for the base."""
    return [
        {
            "model": adapter or "demo",
            "prompt": text,
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "temperature": temperature,
            "seed": 11,
        }
        for adapter in ADAPTERS
        for text in TEXTS
        for temperature in (0.0, 1.0)
    ]


def of_one_engine() -> list[str]:
    """Return the answers of one engine in this process."""
    llm = LLM(str(DEMO / "base"), {name: str(DEMO / "adapters" / name) for name in ADAPTERS if name})
    params = [
        SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=body["temperature"], seed=11)
        for body in bodies()
    ]
    adapters = [None if body["model"] == "demo" else body["model"] for body in bodies()]
    return [made.text for made in llm.generate([body["prompt"] for body in bodies()], params, adapters, False)]


def test_no_request_is_lost_and_answers_are_those_of_one_engine(cluster: Live) -> None:
    def ask(body: dict[str, Any]) -> str:
        answer = cluster.ask("POST", "/v1/completions", body)
        assert answer.status == 200, answer.body
        return str(answer.json["choices"][0]["text"])

    expected = of_one_engine()
    with ThreadPoolExecutor(12) as pool:
        first = pool.map(ask, bodies())
        os.kill(cluster.children()[0], signal.SIGKILL)
        second = pool.map(ask, bodies())
        added = pool.submit(cluster.admin, "POST", "/v1/replicas")
        drained = pool.submit(cluster.admin, "DELETE", "/v1/replicas/replica-1")
        assert list(first) == expected
        assert list(second) == expected
        assert added.result().status == drained.result().status == 200
    cluster.until_metric("inlaid:replica_up", 3.0)
    states = cluster.ask("GET", "/health").json["replicas"]
    assert states == dict.fromkeys(("replica-0", "replica-2", "replica-3"), "serving")
    assert cluster.metric("inlaid:replica_restarts") == 1.0
    assert "replica-3: INFO weights come from the image of a running engine" in "".join(cluster.log)


def test_the_console_shows_the_replicas_as_one_and_pins_on_all(cluster: Live) -> None:
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    assert cluster.admin("POST", "/v1/change_lora_adapter", {"lora_name": "code", "pinned": True}).json["pinned"]
    state = first_state(cluster, admin)
    assert set(state["server"]["replicas"].values()) == {"serving"}
    row = dict(zip(state["server"]["columns"], state["adapters"]["code"], strict=True))
    assert (row["pinned"], row["tier"]) == (True, "device")
    assert state["fairness"]["queue"] == []
    assert state["service"]["pace"] == 5.0
    assert cluster.ask("GET", "/console/adapters/code").json["parts"]["q_proj"]["ranks"]
    assert not cluster.admin("POST", "/v1/change_lora_adapter", {"lora_name": "code", "pinned": False}).json["pinned"]


def test_the_cluster_is_seen_as_one_and_by_replica(cluster: Live) -> None:
    served = cluster.admin("GET", "/v1/replicas").json["replicas"]
    assert {each["state"] for each in served} == {"serving"}
    names = {each["name"] for each in served}
    cards = {card["name"]: card for card in cluster.ask("GET", "/v1/adapters").json["adapters"]}
    assert set(cards["to_velar"]["replicas"]) == names
    models = [model["id"] for model in cluster.ask("GET", "/v1/models").json["data"]]
    assert models[0] == "demo"
    assert len(models) == len(cards) + 1
    page = cluster.ask("GET", "/metrics").body.decode()
    assert set(re.findall(r'^inlaid:replica_generation_tokens_total\{replica="([^"]+)"\}', page, re.M)) == names
    assert cluster.admin("GET", "/v1/fairness").json["service"] > 0
    assert cluster.admin("DELETE", "/v1/replicas/no-such").status == 404
    command = [sys.executable, "-m", "inlaid", "cluster", "status", "--url", cluster.url]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert {line.split()[0] for line in printed.splitlines()} == names
