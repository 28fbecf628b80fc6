"""Faults of adapters while a live server serves: files that are cut short, change or vanish, ranks above the
limit, places that are all taken, floods of loads, unloads under load. Each is refused or waits with a reason, and
others are served as before."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.server.live import ADMIN_KEY, DEMO, Answer, Live, serving
from tests.server.test_server_faults import LONG, Stream

HELLO = {"messages": [{"role": "user", "content": "hello there"}], "temperature": 0, "max_tokens": 6}
SLOW_DISK = """
import pathlib, time
read = pathlib.Path.read_bytes
def slowly(path):
    data = read(path)
    if path.parent.name == "slow":
        if (path.parent / "asked").exists():  # the first look tells only which thread reads it
            (path.parent / "reading").touch()
            while not (path.parent / "go").exists():
                time.sleep(0.01)
        (path.parent / "asked").touch()
    return data
pathlib.Path.read_bytes = slowly
"""


def adapter(root: Path, name: str, task: str = "to_velar") -> Path:
    """Copy an adapter, with an identity of its own."""
    folder = Path(shutil.copytree(DEMO / "adapters" / task, root / name))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "revision": name}))
    return folder


def load(server: Live, name: str, **more: Any) -> Answer:
    return server.admin("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": name, **more})


def unload(server: Live, name: str) -> Answer:
    return server.admin("POST", "/v1/unload_lora_adapter", {"lora_name": name})


def ask(server: Live, model: str) -> Answer:
    return server.ask("POST", "/v1/chat/completions", {**HELLO, "model": model})


def served(server: Live, model: str) -> str:
    answer = ask(server, model)
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roots") / "adapters"


@pytest.fixture(scope="module")
def strict(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Two places, ranks up to 8, a disk that waits on request, and host memory for little more than one adapter."""
    slow = tmp_path_factory.mktemp("site")
    (slow / "sitecustomize.py").write_text(SLOW_DISK)
    good = adapter(root, "good")
    size = (good / "adapter_model.safetensors").stat().st_size
    flags = ["--allow-runtime-lora", "--admin-key", ADMIN_KEY, "--lora-root", str(root), "--max-loras", "2"]
    flags += ["--max-lora-rank", "8", "--max-cpu-adapter-gib", str(2.5 * 2 * size / 2**30)]
    with serving(str(DEMO / "base"), *flags, environment={"PYTHONPATH": str(slow)}) as server:
        assert load(server, "good").status == 200
        yield server


def test_truncated_weights(strict: Live, root: Path) -> None:
    before = served(strict, "good")
    weights = adapter(root, "cut") / "adapter_model.safetensors"
    for length in (0, 4, 1000, weights.stat().st_size - 1):
        os.truncate(weights, length)
        answer = load(strict, "cut")
        assert answer.status == 400
        assert "damaged or cut short" in answer.json["error"]["message"]
    assert ask(strict, "cut").status == 404
    assert served(strict, "good") == before


def test_a_rank_above_the_limit(strict: Live, root: Path) -> None:
    ranks = {path.name: json.loads((path / "adapter_config.json").read_text())["r"] for path in adapters()}
    large = max(ranks, key=ranks.__getitem__)
    assert ranks[large] > 8
    adapter(root, "large", large)
    answer = load(strict, "large")
    assert answer.status == 400
    assert f"rank {ranks[large]}, above the limit of 8 (--max-lora-rank)" in answer.json["error"]["message"]
    assert served(strict, "good")


def adapters() -> list[Path]:
    return [path for path in (DEMO / "adapters").iterdir() if path.is_dir()]


def test_files_that_change_while_they_are_read(strict: Live, root: Path) -> None:
    slow = adapter(root, "slow")
    answers: list[Answer] = []
    loading = threading.Thread(target=lambda: answers.append(load(strict, "slow")))
    loading.start()
    while not (slow / "reading").exists():
        time.sleep(0.01)
    assert served(strict, "good")  # the step loop does not wait for the disk
    shutil.copy(DEMO / "adapters" / "maths" / "adapter_config.json", slow)
    (slow / "go").touch()
    loading.join()
    assert answers[0].status == 400
    assert "changed while they were read" in answers[0].json["error"]["message"]


def test_a_disk_that_is_gone(strict: Live, root: Path) -> None:
    """Adapters in memory are served; one that must be read again ends with the reason, and comes back with the disk."""
    for number in range(4):
        adapter(root, f"more-{number}")
        assert load(strict, f"more-{number}").status == 200
    expected = served(strict, "more-0")
    tiers = {card["name"]: card["tier"] for card in strict.ask("GET", "/v1/adapters").json["adapters"]}
    lost = next(name for name, tier in tiers.items() if tier == "disk")
    away = root.rename(root.with_name("away"))
    assert load(strict, "new").status == 403
    answer = ask(strict, lost)
    assert answer.status == 500
    assert answer.json["error"]["message"] == f"adapter {lost!r}: there is no such folder, so it is not a PEFT adapter"
    assert served(strict, "more-0") == expected
    away.rename(root)
    assert served(strict, lost)


def test_files_that_change_while_they_are_on_disk_only(strict: Live, root: Path) -> None:
    weights = adapter(root, "spoilt") / "adapter_model.safetensors"
    assert load(strict, "spoilt").status == 200
    expected = served(strict, "spoilt")
    for number in range(4):
        adapter(root, f"pushes-{number}")
        assert load(strict, f"pushes-{number}").status == 200
        assert served(strict, f"pushes-{number}")
    os.truncate(weights, 1000)
    refused = ask(strict, "spoilt")
    assert refused.status == 500
    assert refused.json["error"]["message"].startswith("adapter 'spoilt': adapter_model.safetensors is damaged or cut")
    shutil.copy(DEMO / "adapters" / "text_summary" / "adapter_config.json", weights.parent)
    shutil.copy(DEMO / "adapters" / "text_summary" / "adapter_model.safetensors", weights)
    refused = ask(strict, "spoilt")
    assert refused.status == 500
    assert "has changed on disk since it was loaded" in refused.json["error"]["message"]
    assert served(strict, "good") == expected
    assert load(strict, "spoilt", load_inplace=True).status == 200
    assert served(strict, "spoilt") != expected


def test_a_request_waits_for_its_adapter_no_longer_than_said(root: Path) -> None:
    flags = ["--max-loras", "1", "--adapter-timeout", "0.2"]
    with serving(*flags) as server:
        running = Stream(server, LONG)
        running.event()
        for more in ({}, {"stream": True}):
            answer = server.ask("POST", "/v1/chat/completions", {**HELLO, **more, "model": "maths"})
            assert (answer.status, answer.json["error"]["code"]) == (503, "adapter_not_ready")
            assert "adapter 'maths': it was not on the device within 0.2 s" in answer.json["error"]["message"]
            assert int(answer.headers["Retry-After"]) >= 1
        assert 'inlaid:requests_refused_total{adapter="maths",engine="0",model_name="demo",status="503"} 2.0' in (
            server.ask("GET", "/metrics").body.decode()
        )
        assert ask(server, "demo").status == 200  # nobody else waits
        sampling = {"max_new_tokens": 8, "ignore_eos": True}
        body = {"text": ["one", "two"], "lora_path": [None, "maths"], "sampling_params": sampling, "stream": True}
        *events, error, done = server.ask("POST", "/generate", body).body.strip().split(b"\n\n")
        assert {json.loads(event[len(b"data: ") :])["index"] for event in events} == {0}
        assert json.loads(error[len(b"data: ") :])["error"]["code"] == "adapter_not_ready"
        assert done == b"data: [DONE]"
        running.leave()
        server.until_metric("vllm:num_requests_running", 0)
        assert served(server, "maths")


def test_unloading_waits_for_the_requests_that_run_on_it(strict: Live, root: Path) -> None:
    adapter(root, "leaving")
    assert load(strict, "leaving").status == 200
    running = Stream(strict, {**LONG, "model": "leaving", "max_tokens": 400})
    running.event()
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(unload(strict, "leaving")))
    thread.start()
    while ask(strict, "leaving").status == 200:
        pass  # the call has not come through yet
    last = None
    while (event := running.event()) not in (None, "done"):
        assert "error" not in event
        assert thread.is_alive() or event["choices"][0]["finish_reason"] is not None
        last = event
    assert last is not None
    assert last["choices"][0]["finish_reason"] == "length"
    thread.join()
    assert answers[0].body == b"Success: LoRA adapter 'leaving' removed successfully"
    running.close()


def test_a_pinned_adapter_stays_on_the_device(strict: Live, root: Path) -> None:
    for name in ("kept", "second"):
        adapter(root, name, "text_summary" if name == "kept" else "to_velar")
    assert load(strict, "kept", pinned=True).status == 200
    refused = load(strict, "second", pinned=True)
    assert refused.status == 400
    assert "one must stay free for the others" in refused.json["error"]["message"]
    for name in ("more-0", "more-1", "good", "more-2"):
        assert served(strict, name)
    cards = {card["name"]: card for card in strict.ask("GET", "/v1/adapters").json["adapters"]}
    assert (cards["kept"]["tier"], cards["kept"]["pinned"], cards["good"]["pinned"]) == ("device", True, False)
    assert cards["kept"]["evictions"] == 0
    page = strict.ask("GET", "/metrics").body.decode()
    assert 'vllm:lora_adapter_loaded{adapter_name="kept",level="gpu",pinned="true"} 1.0' in page
    assert load(strict, "kept", pinned=False, load_inplace=True).status == 200
    assert unload(strict, "kept").status == 200


def test_load_seconds_are_of_loads_that_were(strict: Live, root: Path) -> None:
    def seconds(level: str) -> list[str]:
        start = f'vllm:lora_adapter_load_seconds{{adapter_name="timed",level="{level}"}} '
        page = strict.ask("GET", "/metrics").body.decode()
        return [line.removeprefix(start) for line in page.splitlines() if line.startswith(start)]

    adapter(root, "timed")
    assert load(strict, "timed").status == 200
    (first,) = seconds("cpu")
    assert float(first) > 0
    assert seconds("gpu") == []
    assert served(strict, "timed")
    assert float(seconds("gpu")[0]) > 0
    for number in range(4):
        adapter(root, f"pushing-{number}")
        assert load(strict, f"pushing-{number}").status == 200
        assert served(strict, f"pushing-{number}")
    assert strict.ask("GET", "/v1/models/timed").json["adapter"]["tier"] == "disk"
    assert served(strict, "timed")
    state = strict.ask("GET", "/v1/models/timed").json["adapter"]
    assert (state["tier"], state["reads"], state["loads"], state["evictions"]) == ("device", 1, 2, 1)
    assert seconds("cpu") == [str(state["load_seconds"])] != [first]


def test_a_flood_of_loads(strict: Live, root: Path, long: bool) -> None:
    """Refused or done, each with its reason, while somebody else is served."""
    for number in range(3):
        adapter(root, f"flood-{number}")

    async def flood() -> Counter[int]:
        statuses: Counter[int] = Counter()
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        host, port = strict.address
        todo = iter(range(10_000 if long else 1_000))

        async def client(session: aiohttp.ClientSession) -> None:
            for number in todo:
                name = f"flood-{number % 4}"  # the last has no folder
                body = {"lora_name": name, "lora_path": name, "load_inplace": bool(number % 3)}
                async with session.post(f"http://{host}:{port}/v1/load_lora_adapter", json=body) as response:
                    statuses[response.status] += 1
                    if response.status != 200:
                        assert (await response.json())["error"]["message"]

        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=64)) as session:
            clients = asyncio.gather(*(client(session) for _ in range(64)))
            while not clients.done():
                assert (await asyncio.to_thread(ask, strict, "good")).status == 200
            await clients
        return statuses

    statuses = asyncio.run(flood())
    assert sum(statuses.values()) == (10_000 if long else 1_000)
    assert set(statuses) <= {200, 400, 403, 409, 429}  # 400: its name was taken while it was read
    assert statuses[200] > 0
    assert statuses[403] > 0
    names = [card["name"] for card in strict.ask("GET", "/v1/adapters").json["adapters"]]
    assert len(names) == len(set(names))
    for number in range(3):
        assert served(strict, f"flood-{number}") == served(strict, "good")
