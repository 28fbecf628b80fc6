"""The process itself: it ends with its socket, and reports what it cannot load."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from inlaid.config import EngineConfig, SchedulerConfig
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.worker import messages
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


def test_a_load_that_takes_long_lets_others_pass_but_those_of_its_name(tmp_path: Path) -> None:
    child = Child(start())
    assert isinstance(child.receive()[0], messages.Ready)
    for name in ("long", "short"):
        (tmp_path / name).mkdir()
    (tmp_path / "long" / "slow").touch()
    (tmp_path / "short" / "odd").touch()  # asked how long it takes, it raises: it is read as any other
    loads = ((1, "a", "long", False), (2, "b", "short", False), (3, "a", "short", True))
    child.send(
        *(
            messages.Call(
                call=call, name="load_adapter",
                arguments={"name": name, "path": str(tmp_path / folder), "in_place": in_place},
            )
            for call, name, folder, in_place in loads
        )
    )  # fmt: skip
    [first] = child.receive()
    assert isinstance(first, messages.Reply)
    assert first.call == 2
    (tmp_path / "long" / "slow").unlink()
    later: list[messages.Message] = []
    while len(later) < 2:
        later += child.receive()
    assert [getattr(reply, "call", None) for reply in later] == [1, 3]
    child.socket.close()
    assert child.process.wait(30) == 0


SERVER = """
import asyncio
from inlaid.config import EngineConfig
from inlaid.engine.request import NewRequest
from inlaid.worker.client import EngineClient
from tests.worker.fake_engine import ENVIRONMENT, FACTORY, STUCK

async def main():
    engine = EngineClient(EngineConfig(model="fake"), factory=FACTORY, environment=ENVIRONMENT)
    await engine.start()
    print(engine.process_id, flush=True)
    async for output in engine.generate(NewRequest(id="stuck", prompt=STUCK)):
        pass

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end the process")
def test_it_ends_with_a_server_that_is_killed_even_while_it_is_stuck() -> None:
    """Holding the interpreter's lock, no thread of it can see that the socket has closed."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    )
    assert server.stdout is not None
    engine = psutil.Process(int(server.stdout.readline()))
    while engine.cpu_times().user and engine.status() != psutil.STATUS_SLEEPING:
        pass
    server.kill()
    server.wait()
    server.stdout.close()
    engine.wait(60)


def test_too_little_memory_is_said_in_one_sentence() -> None:
    child = Child(start("huge"))
    [fatal] = child.receive()
    assert isinstance(fatal, messages.Fatal)
    assert fatal.message.startswith("not enough memory: lower --num-blocks")
    assert "\n" not in fatal.message
    assert child.process.wait(30) == 1
    child.socket.close()
