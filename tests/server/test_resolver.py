"""Adapters found when they are first named: confined, absent ones remembered, one load each, few at a time."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path

import pytest

from inlaid.config import ConfigError, ServerConfig
from inlaid.server.errors import BadRequest, TooMany
from inlaid.server.names import ModelNames
from inlaid.server.resolver import Resolver, _within, make_resolver
from inlaid.server.safety import AllowedFolders
from tests.server.fake_loads import FakeLoads, write
from tests.server.live import DEMO, serving

NAMES = ModelNames("base", "/base")


def find(name: str) -> str | None:
    """Resolve names for the server of test_over_http."""
    return str(DEMO / "adapters" / name.removeprefix("my-")) if name.startswith("my-") else None


class Tried:
    """A resolver over a folder, with a clock that stands still until it is moved."""

    def __init__(self, root: Path, most: int = 4, room: int = 100) -> None:
        self.engine = FakeLoads()
        self.now = 0.0
        self.asked: list[str] = []
        self.resolver = Resolver(
            self.find,
            AllowedFolders([str(root)]),
            self.engine,
            NAMES,
            most=most,
            room=room,
            canonical=partial(_within, root),
            clock=lambda: self.now,
        )

    def find(self, name: str) -> str | None:
        self.asked.append(name)
        return None if name == "nobody" else name

    def __call__(self, name: str) -> str | None:
        return asyncio.run(self.resolver.resolve(name))


def test_found_by_name_inside_the_root_only(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", write(tmp_path / "outside", "x")
    write(root / "a", "x")
    write(root / "team" / "b", "x")
    (root / "link").symlink_to(outside)
    tried = Tried(root)
    for name in ("a", "team/b", "../outside", str(outside), "link", "none", "", "x" * 300, "new\nline", "nul\0"):
        tried(name)
    assert sorted(tried.engine.adapters) == ["a", "team/b"]


def test_a_folder_is_served_under_one_name(tmp_path: Path) -> None:
    """Other names for it once filled the table of adapters."""
    root = tmp_path / "root"
    write(root / "sql", "x")
    (root / "link").symlink_to(root / "sql")
    tried = Tried(root)
    for name in ("./sql", "sql/", "sql", ".//sql", str(root / "sql"), "link", "link"):
        assert tried(name) == "sql"
    assert tried.engine.calls == ["load sql"]
    assert tried.asked == ["sql", "link"]


def test_the_idle_adapter_named_least_recently_makes_room(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write(tmp_path / name, "x")
    write(tmp_path / "busy", "busy")
    tried = Tried(tmp_path, room=3)
    for name in ("busy", "a", "b", "a", "c"):
        assert tried(name) == name
    assert set(tried.engine.adapters) == {"busy", "a", "c"}
    assert tried("b") == "b"
    assert set(tried.engine.adapters) == {"busy", "b", "c"}
    full = Tried(tmp_path, room=1)
    full("busy")
    with pytest.raises(TooMany, match="in use"):
        full("a")


def test_absent_names_are_remembered_for_a_while(tmp_path: Path) -> None:
    tried = Tried(tmp_path)
    for _ in range(3):
        tried("late")
        tried("nobody")
    assert tried.asked == ["late", "nobody"]
    write(tmp_path / "late", "x")
    tried.now = 31.0
    tried("late")
    assert tried.engine.calls == ["load late"]


def test_the_memory_of_absent_names_is_bounded(tmp_path: Path) -> None:
    tried = Tried(tmp_path)

    async def many() -> None:
        for n in range(4200):
            tried.resolver._refuse(f"name-{n}", "")

    asyncio.run(many())
    assert len(tried.resolver._refused) == 4096
    tried("name-0")
    assert tried.asked == ["name-0"]


def test_one_that_cannot_be_served_is_said_and_not_read_again(tmp_path: Path) -> None:
    tried = Tried(tmp_path)
    write(tmp_path / "broken", "bad")
    for _ in range(3):
        with pytest.raises(BadRequest, match="'broken' was found but cannot be served"):
            tried("broken")
    assert tried.engine.calls == ["load broken"]


def test_concurrent_asks_make_one_load_and_others_are_told_to_come_again(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / name, "x")
    tried, go = Tried(tmp_path, most=2), threading.Event()
    tried.resolver._find = lambda name: go.wait(60) and name

    async def ask() -> list[object]:
        waiting = [asyncio.create_task(tried.resolver.resolve(name)) for name in ("a", "b", "a", "a")]
        await asyncio.sleep(0)
        waiting[0].cancel()  # the client that came first leaves
        refused = await asyncio.gather(tried.resolver.resolve("c"), return_exceptions=True)
        go.set()
        return [*refused, *(await asyncio.gather(*waiting, return_exceptions=True))]

    refused, left, *others = asyncio.run(ask())
    assert isinstance(refused, TooMany)
    assert isinstance(left, asyncio.CancelledError)
    assert others == ["b", "a", "a"]
    assert sorted(tried.engine.calls) == ["load a", "load b"]


def test_a_function_that_fails_finds_nothing(tmp_path: Path) -> None:
    tried = Tried(tmp_path)

    async def broken(name: str) -> str:
        raise KeyError(name)

    tried.resolver._find = broken
    tried("a")
    assert tried.engine.calls == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_resolver_root": "/", "lora_resolver": "a:b"}, "not both"),
        ({"lora_resolver": "tests.server.test_resolver:find"}, "needs --lora-root"),
        ({"lora_resolver": "nowhere:at_all", "lora_root": ("/",)}, "write MODULE:FUNCTION"),
        ({"lora_resolver": "tests.server.test_resolver:absent", "lora_root": ("/",)}, "write MODULE:FUNCTION"),
        ({"lora_resolver_root": "/does/not/exist"}, "cannot be used"),
        ({"lora_resolver_root": "/", "max_lora_resolving": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_resolver(ServerConfig(**settings), FakeLoads(), NAMES, 10)  # type: ignore[arg-type]


def test_over_http() -> None:
    flags = ["--lora-resolver", "tests.server.test_resolver:find", "--lora-root", str(DEMO / "adapters")]
    with serving(*flags) as server:
        body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 6}
        first = server.ask("POST", "/v1/chat/completions", {**body, "model": "my-maths"})
        named = server.ask("POST", "/v1/chat/completions", {**body, "model": "maths"})
        assert first.status == 200, first.body
        assert first.json["choices"][0]["message"] == named.json["choices"][0]["message"]
        assert server.ask("POST", "/v1/completions", {"model": "demo:my-code", "prompt": "a"}).status == 200
        assert server.ask("POST", "/v1/chat/completions", {**body, "model": "my-nothing"}).status == 404
        assert server.ask("POST", "/v1/chat/completions", {**body, "model": "other"}).status == 404
        names = {card["id"] for card in server.ask("GET", "/v1/models").json["data"]}
        assert {"my-maths", "my-code"} <= names
        assert "my-nothing" not in names
