"""Changes over the API survive kills of the engine and, with --state, of the server; what is no state file is named."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from inlaid.config import ConfigError
from inlaid.server import state as module
from inlaid.server.errors import NotKept
from inlaid.server.state import ServerState
from tests.server.live import ADMIN_KEY, DEMO, Live, serving


def content(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is damaged"),
        ('{"kind": "inlaid server state", "version": 1, "sched', "is damaged"),
        ('{"kind": "inlaid server state", "version": 1, "more": 1}', "is damaged.*more"),
        ('{"kind": "inlaid server state", "version": 1, "loaded": {"a": 5}}', "is damaged"),
        ('{"kind": "inlaid server state", "version": 2}', "has version 2, this inlaid reads 1"),
        ('{"kind": "package"}', "is not a state file"),
        ("[1, 2]", "is not a state file"),
        ("[" * 100_000, "is damaged"),
        ('"\\ud800"', "is damaged"),
    ],
)
def test_a_file_that_is_no_state_is_refused_by_name_and_left_as_it_is(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"--state {path} {reason}"):
        ServerState(str(path))
    assert path.read_text() == text


def test_a_place_that_cannot_hold_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(5 << 30)
    for name in ("fifo", "folder", "sparse", "missing/state.json"):
        with pytest.raises(ConfigError, match=f"--state {tmp_path / name}"):
            ServerState(str(tmp_path / name))


def test_two_servers_cannot_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "state.json")
    first = ServerState(path)
    with pytest.raises(ConfigError, match="in use by another server"):
        ServerState(path)
    first.close()
    ServerState(path).close()


def test_what_is_written_is_what_was_answered_and_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "state.json"

    async def main() -> None:
        state = ServerState(str(path), ["given", "other"])
        await asyncio.gather(*(state.note_loaded(str(n), f"/adapters/{n}", n % 2 == 0) for n in range(50)))
        assert len(content(path)["loaded"]) == 50
        await state.note_unloaded("3")
        await state.note_unloaded("given")
        await state.note_scheduler({"policy": "vtc"})
        state.close()
        again = ServerState(str(path))
        assert again.kept == state.kept
        assert again.starting_adapters({"given": "/g", "other": "/o", "7": "/elsewhere"}) == {"other": "/o"}
        await again.note_loaded("given", "/g", False)
        assert content(path)["unloaded"] == []
        again.close()

    before = os.umask(0o027)
    try:
        asyncio.run(main())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_full_disk_is_told_and_the_next_change_keeps_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def main() -> None:
        state = ServerState(str(path))
        with monkeypatch.context() as patched:
            patched.setattr(module, "write_atomically", full)
            with pytest.raises(NotKept, match="No space left on device"):
                await state.note_scheduler({"policy": "vtc"})
        assert content(path)["scheduler"] == {}
        await state.note_unloaded("unknown")
        assert content(path)["scheduler"] == {"policy": "vtc"}
        state.close()

    asyncio.run(main())


def test_a_change_is_carried_through_although_its_client_leaves() -> None:
    async def main() -> None:
        state, begun, allowed, done = ServerState(""), asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def change() -> None:
            begun.set()
            await allowed.wait()
            done.set()

        client = asyncio.ensure_future(state.finish(change()))
        await begun.wait()
        client.cancel()
        allowed.set()
        await done.wait()

    asyncio.run(main())


# A live server: changed, its engine killed, then the server itself.

CHANGES = {
    "policy": "vtc",
    "weights": {"alice": 3.0},
    "limits": {"alice": {"requests_per_minute": 2}},
    "max_num_waiting": 77,
}
MODELS = {"demo", "kept", "pinned", "to_velar"}


def models(server: Live) -> dict[str, Any]:
    cards = server.ask("GET", "/v1/models").json["data"]
    return {card["id"]: card.get("adapter", {}).get("pinned") for card in cards}


def settings(server: Live) -> dict[str, Any]:
    described = server.admin("GET", "/v1/scheduler").json
    return {name: described[name] for name in CHANGES}


def ask(server: Live, model: str, tenant: str = "") -> Any:
    body = {"model": model, "prompt": "hello there", "max_tokens": 8, "temperature": 0}
    return server.ask("POST", "/v1/completions", body, {"X-Tenant": tenant})


def test_changes_survive_the_engine_and_the_server(tmp_path: Path, adapter_root: Path) -> None:
    state = tmp_path / "state.json"
    for name in ("kept", "passing"):
        shutil.copytree(DEMO / "adapters" / "maths", tmp_path / "root" / name)
    shutil.copytree(DEMO / "adapters" / "to_ashani", tmp_path / "root" / "pinned")
    adapters = [f"{name}={DEMO / 'adapters' / name}" for name in ("to_velar", "code")]
    flags = [str(DEMO / "base"), "--served-model-name", "demo", "--adapter", *adapters]
    flags += ["--state", str(state), "--tenant", "header", "--lora-root", str(tmp_path / "root")]
    flags += ["--allow-runtime-lora", "--admin-key", ADMIN_KEY]

    def load(name: str, **more: Any) -> None:
        body = {"lora_name": name, "lora_path": name, **more}
        assert server.admin("POST", "/v1/load_lora_adapter", body).status == 200

    with serving(*flags) as server:
        load("kept")
        load("pinned", pinned=True)
        load("passing")
        for name in ("passing", "code"):
            assert server.admin("POST", "/unload_lora_adapter", {"lora_name": name}).status == 200
        expected = {**settings(server), **CHANGES}
        assert server.admin("PUT", "/v1/scheduler", CHANGES).status == 200
        answers = {name: ask(server, name).json["choices"][0]["text"] for name in sorted(MODELS)}
        assert ask(server, "demo", "alice").status == 200
        assert ask(server, "kept", "alice").status == 200

        [engine] = server.children()
        os.kill(engine, signal.SIGKILL)
        while server.children() in ([], [engine]) or server.ask("GET", "/health").status != 200:
            time.sleep(0.05)
        assert ask(server, "demo", "alice").status == 429, "rate limits count on"
        survived = models(server), settings(server)
        assert (survived[0].keys(), survived[0]["pinned"], survived[0]["kept"]) == (MODELS, True, False)
        assert survived[1] == {**expected, "limits": {"alice": {**expected["limits"]["alice"], "max_waiting": None}}}
        log = "".join(server.log)
        assert 'the scheduler is changed by="admin key, 127.0.0.1"' in log
        assert "starting the engine process again changed=" in log
        server.process.kill()
        server.process.wait()

    assert ADMIN_KEY not in state.read_text()
    shutil.rmtree(tmp_path / "root" / "pinned")
    with serving(*flags) as server:
        assert settings(server) == survived[1]
        assert models(server).keys() == MODELS - {"pinned"}
        for name in sorted(MODELS - {"pinned"}):
            assert ask(server, name).json["choices"][0]["text"] == answers[name]
        assert "adapter 'pinned' of" in "".join(server.log)
        assert content(state)["loaded"].keys() == {"kept", "pinned"}
        assert server.admin("POST", "/v1/unload_lora_adapter", {"lora_name": "pinned"}).status == 200
        assert content(state)["loaded"].keys() == {"kept"}
