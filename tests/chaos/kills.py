"""Random kills of the engine and of the server while changes and answers are asked for: what was answered holds after
every kill, no answer is wrong, and nothing is kept that nobody asked for.

The model is the fake one of `tests/engine`, whose every answer is known, so that hundreds of kills take minutes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tests.chaos.fake_server import Nursery, ended
from tests.engine.fake_runner import generate
from tests.server.live import ADMIN_KEY, Answer, Live

_NAMES = ("a", "b", "c", "d")
_TENANTS = ("x", "y", "z")


class Kills:
    """A server, what it has promised, and a hand that kills."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._draw = random.Random(seed)
        self._state, self._root = folder / "state.json", folder / "root"
        for name in _NAMES:
            (self._root / name).mkdir(parents=True)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._loaded: set[str] = set()
        self._weights: dict[str, float] = {}
        self._unsure: set[str] = set()  # adapters whose last change was not answered
        self._weights_unsure: list[dict[str, float]] = []

    def run(self, kills: int, seconds: float) -> None:
        """Kill so many times, or for so many seconds."""
        ends, nursery = time.monotonic() + seconds, Nursery()
        server = nursery.started(self._state, self._root)
        try:
            while self.counts["kills"] < kills and time.monotonic() < ends:
                killer = threading.Timer(self._draw.uniform(0.0, 0.3), self._kill, [server, self._draw.random() < 0.3])
                killer.start()
                for _ in range(self._draw.randrange(1, 12)):
                    self._act(server)
                killer.join()
                if server.process.poll() is not None:
                    ended(server)
                    server = nursery.started(self._state, self._root)
                self._check(server, self._settings(server))
        finally:
            ended(server)
            nursery.close()

    def _kill(self, server: Live, whole: bool) -> None:
        children = server.children() if server.process.poll() is None else []
        target = server.process.pid if whole or not children else children[0]
        os.kill(target, signal.SIGKILL)
        if target == server.process.pid:
            server.process.wait()
        self.counts["kills"] += 1
        self.counts["kills of the server" if target == server.process.pid else "kills of the engine"] += 1

    def _settings(self, server: Live) -> dict[str, Any]:
        """Return the scheduler's settings, as soon as an engine tells them."""
        while True:
            try:
                answer = server.admin("GET", "/v1/scheduler")
            except (OSError, HTTPException):
                answer = None
            if answer is not None and answer.status == 200:
                return dict(answer.json)
            assert server.process.poll() is None, "the server ended by itself"
            time.sleep(0.05)

    # What is asked meanwhile.

    def _act(self, server: Live) -> None:
        self._draw.choice((self._load, self._unload, self._weigh, self._ask, self._ask))(server)

    def _admin(self, server: Live, method: str, path: str, body: Any) -> Answer | None:
        """Ask; None: it is not known whether the change was made."""
        try:
            answer = server.admin(method, path, body)
        except (OSError, HTTPException):
            return None
        if answer.status not in (200, 400, 404, 409, 503):
            self.faults.append(f"{method} {path} {body}: {answer.status} {answer.body!r}")
        return None if answer.status == 503 else answer

    def _load(self, server: Live) -> None:
        name = self._draw.choice(_NAMES)
        answer = self._admin(
            server, "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": name, "load_inplace": True}
        )
        self._changed(name, None if answer is None else True if answer.status == 200 else name in self._loaded)

    def _unload(self, server: Live) -> None:
        name = self._draw.choice(_NAMES)
        answer = self._admin(server, "POST", "/v1/unload_lora_adapter", {"lora_name": name})
        self._changed(name, None if answer is None else False)

    def _changed(self, name: str, loaded: bool | None) -> None:
        if loaded is None:
            self._unsure.add(name)
            return
        self._unsure.discard(name)
        self.counts["changes"] += 1
        (self._loaded.add if loaded else self._loaded.discard)(name)

    def _weigh(self, server: Live) -> None:
        weights = {tenant: float(self._draw.randrange(1, 9)) for tenant in _TENANTS}
        answer = self._admin(server, "PUT", "/v1/scheduler", {"weights": weights})
        if answer is None:
            self._weights_unsure.append(weights)
        elif answer.status == 200:
            self._weights, self._weights_unsure = weights, []
            self.counts["changes"] += 1

    def _ask(self, server: Live) -> None:
        prompt = [self._draw.randrange(8, 40) for _ in range(self._draw.randrange(1, 6))]
        body = {"prompt": prompt, "max_tokens": 8, "return_token_ids": True, "temperature": 0, "ignore_eos": True}
        try:
            answer = server.ask("POST", "/v1/completions", body)
        except (OSError, HTTPException):
            return
        if answer.status == 503 or b"engine process ended" in answer.body:
            return
        expected = generate(prompt, None, 8, frozenset())
        if answer.status != 200 or answer.json["choices"][0].get("token_ids") != expected:
            self.faults.append(f"{prompt}: {answer.status} {answer.body!r}, not {expected}")
        self.counts["answers"] += 1

    def _check(self, server: Live, settings: dict[str, Any]) -> None:
        """Compare what holds with what was answered; then nothing is unsure any more."""
        models = {card["id"] for card in server.ask("GET", "/v1/models").json["data"]} & set(_NAMES)
        sure = set(_NAMES) - self._unsure
        if models & sure != self._loaded & sure:
            self.faults.append(
                f"after kill {self.counts['kills']}: {models} instead of {self._loaded}; unsure {self._unsure}"
            )
        self._loaded, self._unsure = models, set()
        weights = settings["weights"]
        if weights not in (self._weights, *self._weights_unsure):
            self.faults.append(f"after kill {self.counts['kills']}: weights {weights} instead of {self._weights}")
        self._weights, self._weights_unsure = weights, []
        kept = json.loads(self._state.read_text())
        if not set(kept["loaded"]) <= set(_NAMES) or ADMIN_KEY in self._state.read_text():
            self.faults.append(f"the state file holds {kept}")
