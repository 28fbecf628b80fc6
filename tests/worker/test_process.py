"""The process itself: it ends with its socket, reports what it cannot load, and builds the demo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from inlaid.config import AdapterConfig, EngineConfig, SchedulerConfig
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.worker import adapters as worker_adapters
from inlaid.worker import build, loading, messages
from inlaid.worker.build import build_engine
from tests.worker.fake_engine import ENVIRONMENT, FACTORY

DEMO = Path(__file__).parents[2] / "models" / "demo"


class Child:
    """The process, spoken to by hand."""

    def __init__(self, start: messages.Start) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "inlaid.worker.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **ENVIRONMENT},
            )
        self.framing = messages.Framing(messages.Event)
        self.socket.settimeout(60)
        self.send(start)

    def send(self, *sent: messages.Message) -> None:
        self.socket.sendall(b"".join(messages.frame(message) for message in sent))

    def receive(self) -> list[messages.Message]:
        data = self.socket.recv(1 << 20)
        return self.framing.feed(data) if data else []


def start(model: str = "fake", **scheduler: Any) -> messages.Start:
    config = EngineConfig(model=model, scheduler=SchedulerConfig(**scheduler))
    return messages.Start(config=config, adapters={}, factory=FACTORY)


def test_it_ends_when_the_other_end_closes_even_in_the_middle_of_work() -> None:
    child = Child(start())
    assert isinstance(child.receive()[0], messages.Ready)
    child.send(
        messages.Add(request=NewRequest(id="a", prompt=[1], params=SamplingParams(max_tokens=800, ignore_eos=True)))
    )
    assert isinstance(child.receive()[0], messages.Outputs)
    child.socket.close()
    assert child.process.wait(30) == 0


def test_what_the_predictor_learned_is_kept_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    child = Child(start(predictor_file=str(file)))
    assert isinstance(child.receive()[0], messages.Ready)
    child.socket.close()
    assert child.process.wait(30) == 0
    assert file.exists()


def test_commands_that_came_during_the_load_are_obeyed() -> None:
    child = Child(start())
    child.send(messages.Call(call=1, name="stats"), messages.Call(call=2, name="scheduler"))
    replies: list[messages.Message] = []
    while len(replies) < 3:
        replies += child.receive()
    assert [getattr(reply, "call", None) for reply in replies] == [None, 1, 2]
    child.socket.close()
    assert child.process.wait(30) == 0


def test_what_cannot_be_loaded_is_said_in_one_sentence() -> None:
    child = Child(start("broken"))
    assert child.receive() == [messages.Fatal(message="the model is broken; mend it")]
    assert child.process.wait(30) == 1
    child.socket.close()


def test_an_adapter_that_cannot_be_served_ends_a_strict_start_and_is_left_out_of_others(tmp_path: Path) -> None:
    config = EngineConfig(model=str(DEMO / "base"))
    adapters = {"good": str(DEMO / "adapters" / "to_velar"), "bad": str(tmp_path)}
    with pytest.raises(ValueError, match=str(tmp_path)):
        build_engine(config, adapters)
    loaded = build_engine(config, adapters, strict=False)
    assert [info.name for info in loaded.adapters.list()] == ["good"]
    assert list(loaded.left_out) == ["bad"]


def test_adapters_are_read_while_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights come only when an adapter has been read, and graphs would be captured only when all have been."""
    first, real, load_model = threading.Event(), loading.read_adapter, loading.load_model

    def read(*args: Any, **more: Any) -> Any:
        adapter = real(*args, **more)
        first.set()
        return adapter

    def load(config: EngineConfig, opened: Any, settle: Any) -> Any:
        assert first.wait(30)
        settle()
        assert len(readers[0].reads) == 2
        assert all(done.done() for _, done in readers[0].reads)
        return load_model(config, opened=opened, settle=settle)

    class Readers(worker_adapters.Readers):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            readers.append(self)

    readers: list[worker_adapters.Readers] = []
    monkeypatch.setattr(loading, "read_adapter", read)
    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(build, "Readers", Readers)
    adapters = {name: str(DEMO / "adapters" / name) for name in ("to_velar", "maths")}
    loaded = build_engine(EngineConfig(model=str(DEMO / "base")), adapters)
    assert {info.name for info in loaded.adapters.list()} == set(adapters)


def test_no_more_adapters_are_read_ahead_than_may_be_held() -> None:
    """Of 40, five at a time; each is let go when it was taken."""
    alive: list[weakref.ref[Any]] = []
    most = 0

    class Read:
        pass

    def read(path: str) -> Read:
        made = Read()
        alive.append(weakref.ref(made))
        return made

    taken = []
    with worker_adapters.Readers({str(number): "" for number in range(40)}, read, ahead=5) as readers:
        readers.wait()
        assert len(alive) == 5
        for name, done in readers:
            done.result()
            taken.append(name)
            del done
            most = max(most, sum(one() is not None for one in alive))
    assert taken == [str(number) for number in range(40)]
    assert most <= 6


def test_with_require_eval_only_adapters_with_a_passing_record_are_served(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    adapters = {"velar": str(DEMO / "adapters" / "to_velar"), "maths": str(DEMO / "adapters" / "maths")}
    loaded = build_engine(EngineConfig(model=str(DEMO / "base")), adapters)
    identities = {info.name: info.identity for info in loaded.adapters.list()}
    records = [
        {"base_version": loaded.model.base_version, "adapter_identity": identities[name], "adapter": name, "task": name}
        | {"metric": "exact", "score": 90.0, "drop": drop}
        for name, drop in {"velar": 0.5, "maths": 5.0}.items()
    ]
    report.write_text(json.dumps({"records": records}))
    config = EngineConfig(model=str(DEMO / "base"), adapters=AdapterConfig(require_eval=str(report), max_drop=2.0))
    gated = build_engine(config, adapters, strict=False)
    assert [info.name for info in gated.adapters.list()] == ["velar"]
    assert "drops 5.00 points" in gated.left_out["maths"]


def test_the_same_load_asked_for_twice_is_done_once(tmp_path: Path) -> None:
    """The second would be refused, as its name would be taken, had it been done on its own."""
    child = Child(start())
    assert isinstance(child.receive()[0], messages.Ready)
    arguments = {"name": "a", "path": str(tmp_path), "in_place": False}
    child.send(*(messages.Call(call=call, name="load_adapter", arguments=arguments) for call in (1, 2)))
    answers: list[messages.Message] = []
    while len(answers) < 2:
        answers += child.receive()
    assert [type(answer) for answer in answers] == [messages.Reply, messages.Reply], answers
    child.send(messages.Call(call=3, name="load_adapter", arguments=arguments))
    refused = child.receive()[0]
    assert isinstance(refused, messages.Failure)
    assert "already loaded" in refused.refusal.message
    child.socket.close()
    assert child.process.wait(30) == 0
