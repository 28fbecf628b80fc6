"""A watched folder: loaded when complete and at rest, swapped when changed, unloaded when gone; and over HTTP."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest

from inlaid.config import ConfigError
from inlaid.server.names import ModelNames
from inlaid.server.watcher import Watcher
from tests.server.fake_loads import FakeLoads, write
from tests.server.live import DEMO, Live, serving


class Watched:
    """A watcher over a folder, looked at by hand."""

    def __init__(self, folder: Path) -> None:
        self.engine = FakeLoads()
        self.watcher = Watcher(folder, self.engine, ModelNames("base", "/base"))

    def look(self, times: int = 1) -> list[str]:
        """Reconcile so many times and return the calls to the engine."""
        before = len(self.engine.calls)
        for _ in range(times):
            done(self.watcher.reconcile())
        return self.engine.calls[before:]


def done(work: Awaitable[None]) -> None:
    async def wait() -> None:
        await work

    asyncio.run(wait())


def test_nothing_is_loaded_before_it_is_at_rest(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    assert watched.look(3) == []
    for length in range(3):  # it grows from look to look
        (tmp_path / "a" / "adapter_model.safetensors").write_text("x" * length)
        assert watched.look() == []
    assert watched.look(3) == ["load a"]
    write(tmp_path / ".b.partial", "half")
    (tmp_path / "file").write_text("")
    assert watched.look(3) == []
    (tmp_path / ".b.partial").rename(tmp_path / "b")
    assert watched.look(3) == ["load b"]


def test_changes_are_swapped_in_and_what_is_gone_is_unloaded(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    write(tmp_path / "a", "one")
    assert watched.look(2) == ["load a"]
    write(tmp_path / "a", "other")
    assert watched.look() == []
    assert watched.look(3) == ["swap a"]
    assert watched.engine.adapters == {"a": "other"}
    shutil.rmtree(tmp_path / "a")
    assert watched.look() == []
    assert watched.look(3) == ["unload a"]
    write(tmp_path / "a", "back")
    assert watched.look(3) == ["load a"]


def test_what_cannot_be_served_is_tried_once_and_the_old_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(tmp_path)
    write(tmp_path / "a", "one")
    write(tmp_path / "broken", "bad")
    assert sorted(watched.look(4)) == ["load a", "load broken"]
    write(tmp_path / "a", "bad")
    assert watched.look(4) == ["swap a"]
    assert watched.engine.adapters == {"a": "one"}
    assert "cannot be served anew: damaged" in caplog.text
    write(tmp_path / "broken", "mended")
    assert watched.look(2) == ["load broken"]


def test_names_that_are_taken_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(tmp_path)
    watched.engine.adapters["mine"] = "loaded by hand"
    write(tmp_path / "mine", "other")
    write(tmp_path / "base", "other")
    assert watched.look(3) == []
    assert caplog.text.count("is not served: its name is taken") == 1
    assert caplog.text.count("is not served: it is a name of the base") == 1
    shutil.rmtree(tmp_path / "mine")
    assert watched.look(3) == []
    assert "mine" in watched.engine.adapters


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        Watcher(tmp_path / "nowhere", FakeLoads(), ModelNames("base", "/base"))


def test_over_http(tmp_path: Path) -> None:
    """Dropped in, changed, damaged and removed while a live server serves."""
    ask = {"messages": [{"role": "user", "content": "hello there"}], "temperature": 0, "max_tokens": 8}

    def say(server: Live, model: str) -> str:
        answer = server.ask("POST", "/v1/chat/completions", {**ask, "model": model})
        assert answer.status == 200, answer.body
        return str(answer.json["choices"][0]["message"]["content"])

    def copy(task: str) -> None:
        (tmp_path / "new").mkdir(exist_ok=True)
        for file in (DEMO / "adapters" / task).iterdir():
            (tmp_path / "new" / file.name).write_bytes(file.read_bytes())

    def models(server: Live) -> set[str]:
        return {card["id"] for card in server.ask("GET", "/v1/models").json["data"]}

    def until(server: Live, wanted: str) -> None:
        while say(server, "new") != wanted:
            time.sleep(0.05)

    with serving("--lora-watch", str(tmp_path), "--lora-watch-interval", "0.05") as server:
        assert "new" not in models(server)
        copy("to_velar")
        while "new" not in models(server):
            time.sleep(0.05)
        until(server, say(server, "to_velar"))
        copy("maths")
        until(server, say(server, "maths"))
        weights = tmp_path / "new" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        while not any("cannot be served anew" in line for line in server.log):
            time.sleep(0.05)
        assert say(server, "new") == say(server, "maths")
        shutil.rmtree(tmp_path / "new")
        while "new" in models(server):
            time.sleep(0.05)


def test_a_defect_with_one_folder_leaves_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It once ended the watcher, and nothing said so."""
    watched = Watched(tmp_path)

    async def defect(name: str, path: str, in_place: bool = False) -> None:
        if name == "a":
            raise KeyError("a defect")
        await load(name, path, in_place)

    load = watched.engine.load_adapter
    watched.engine.load_adapter = defect  # type: ignore[method-assign]
    for name in ("a", "b"):
        write(tmp_path / name, "one")
    assert watched.look(3) == ["load b"]
    assert "a defect" in caplog.text
