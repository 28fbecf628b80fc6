"""A task comes into the base of a server under load: tokens before and after the switch, bits, and the way back."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from inlaid.quant import command
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid
from inlaid.quant.quantize import add_task, quantize
from inlaid.quant.settings import Gate, Settings, TaskSource
from tests.quant.tiny import write_adapter, write_base, write_data
from tests.server.live import ADMIN_KEY, Live, serving

ANYWAY = Gate(force=True)  # random adapters fit nothing; the gate has tests of its own
SETTINGS = Settings(Grid(2, 32), CalibrationSettings(), "mean")
PROMPTS = {"a": "w5 w9 w12 w40", "b": "w7 w7 w30", "base": "w50 w61 w8 w9 w10", "c": "w20 w21"}


@dataclass
class World:
    """A base quantized for tasks a and b, and a third task."""

    root: Path
    sources: dict[str, TaskSource]

    @property
    def out(self) -> Path:
        return self.root / "out"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("online")
    base = write_base(root / "base")
    sources = {
        name: TaskSource(name, write_adapter(root / name, base, i), write_data(root / f"{name}.jsonl", i, 8))
        for i, name in enumerate("abc")
    }
    quantize(base, [sources["a"], sources["b"]], SETTINGS, root / "out", gate=ANYWAY)
    return World(root, sources)


@pytest.fixture(scope="module")
def live(world: World) -> Iterator[Live]:
    flags = ["--admin-key", ADMIN_KEY, "--lora-root", str(world.root), "--allow-runtime-lora"]
    adapters = [f"{name}={world.root / name}" for name in "ab"]
    online = ["--online-tasks", str(world.root / "out.bank"), "--task-gpu-share", "1"]
    with serving(str(world.out), "--max-model-len", "128", *flags, *online, "--adapter", *adapters) as server:
        yield server


def answer(live: Live, name: str) -> str:
    body = {"prompt": PROMPTS[name], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    done = live.ask("POST", "/v1/completions", body | {"model": "out" if name == "base" else name})
    assert done.status == 200, done.body
    return str(done.json["choices"][0]["text"])


@dataclass
class Load:
    """Clients that ask again and again: for each answer its name, its text, and when it began and ended."""

    live: Live
    answers: list[tuple[str, str, float, float]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self, name: str) -> None:
        while not self.ended.is_set():
            began = time.time()
            self.answers.append((name, answer(self.live, name), began, time.time()))


def task(live: Live, *words: str) -> int:
    """Run `inlaid task … --server`."""
    parser = argparse.ArgumentParser()
    command.add_task_arguments(parser)
    return command.run_task(parser.parse_args([*words, "--server", live.url, "--admin-key", ADMIN_KEY]))


def quantizer(live: Live) -> int | None:
    """Return the process that quantizes, whichever of the server's threads started it."""
    for thread in Path(f"/proc/{live.process.pid}/task").iterdir():
        try:
            for child in (thread / "children").read_text().split():
                if b"inlaid.quant.online" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        except OSError:  # it has ended
            continue
    return None


def test_a_task_is_added_under_load_and_rolled_back(
    live: Live, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inlaid.progress.log.hasHandlers", lambda: False)  # pytest's take a bar's lines for a log's
    shutil.copytree(world.out, world.root / "offline")
    shutil.copytree(world.root / "out.bank", world.root / "offline.bank")
    names = ["a", "b", "base"]
    old = {name: answer(live, name) for name in names}
    load = Load(live)
    clients = [threading.Thread(target=load.run, args=(name,), daemon=True) for name in names]
    for client in clients:
        client.start()
    adding = threading.Thread(target=task, args=(live, "add", f"c=c:{world.root / 'c.jsonl'}", "--force"), daemon=True)
    adding.start()
    while (process := quantizer(live)) is None:
        assert adding.is_alive(), "the job ended before its process was seen"
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)  # it is started again, and goes on
    adding.join()
    shown = capsys.readouterr()
    assert "task c: serving; version 1" in shown.out
    assert "new" in shown.out
    assert "quantizing: 8," in shown.err  # of the progress bar
    card = live.admin("GET", "/v1/tasks/c").json
    asked = len(load.answers)
    while len(load.answers) < asked + 6:
        time.sleep(0.05)
    load.ended.set()
    for client in clients:
        client.join()

    new = {name: answer(live, name) for name in [*names, "c"]}  # c came with the base
    assert any(old[name] != new[name] for name in names)
    switch = live.admin("GET", "/v1/base").json["last_switch"]
    for name, text, began, ended in load.answers:
        if ended < switch["time"] - switch["seconds"]:
            assert text == old[name]
        elif began > switch["time"]:
            assert text == new[name]
        else:  # it was in flight, and finished on the base that it began on
            assert text in (old[name], new[name])

    assert card["version"] == 1
    assert set(card["before"]) == {"a", "b"}
    assert set(card["after"]) == {"a", "b", "c"}
    assert {"forward", "Hessians", "solving", "checking"} <= set(card["seconds"])
    assert 0 < card["memory"]["peak"] < card["memory"]["expected"]
    add_task(world.root / "offline", world.sources["c"], gate=ANYWAY)
    for file in sorted((world.root / "offline").glob("*.safetensors")):
        assert file.read_bytes() == (world.root / "out.bank" / "versions" / "0001" / file.name).read_bytes()

    base = live.admin("POST", "/v1/base/rollback").json
    assert base["current"] == 0
    assert {name: answer(live, name) for name in names} == old
    capsys.readouterr()
    assert task(live, "rollback") == 2
    assert "there is none before" in capsys.readouterr().err
    assert task(live, "switch", "c") == 0
    assert "task c: serving" in capsys.readouterr().out
    assert task(live, "list") == 0
    assert "job add c: serving" in capsys.readouterr().out
    assert {name: answer(live, name) for name in names} == {name: new[name] for name in names}


def test_what_cannot_be_done_is_refused_by_name(live: Live) -> None:
    for method, path, body, status, words in (
        ("POST", "/v1/tasks", {"name": "a", "adapter": "a", "data": "a.jsonl"}, 409, "in the base already"),
        ("POST", "/v1/tasks", {"name": "d", "adapter": "/etc", "data": "a.jsonl"}, 403, "lora_path must be a folder"),
        ("POST", "/v1/tasks", {"name": "d", "adapter": "a", "data": "gone.jsonl"}, 403, "data must be a file"),
        ("POST", "/v1/tasks", {"name": "d", "adapter": "a"}, 400, "either examples or data"),
        ("GET", "/v1/tasks/d", None, 404, "no task 'd'"),
        ("DELETE", "/v1/tasks/d", None, 404, "no task 'd'"),
        ("POST", "/v1/tasks/d/switch", None, 404, "has no job"),
    ):
        found = live.admin(method, path, body)
        assert found.status == status, found.body
        assert words in found.json["error"]["message"]
    assert live.ask("GET", "/v1/tasks").status == 401
