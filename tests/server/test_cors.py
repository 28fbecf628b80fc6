"""Pages of other origins: only those that are allowed may call the API."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from inlaid.config import ConfigError
from inlaid.server.cors import METHODS, allow_origins, check_origins
from inlaid.server.routes import ROUTES

PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


async def _ask(origin: str, method: str, headers: dict[str, str]) -> tuple[int, str | None, str | None]:
    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.router.add_post("/", hello)
    allow_origins(app, ["https://ours.example"])
    async with TestClient(TestServer(app)) as client:
        answer = await client.request(method, "/", headers={"Origin": origin, **headers})
        allowed = answer.headers.get("Access-Control-Allow-Origin")
        return answer.status, allowed, answer.headers.get("Access-Control-Allow-Headers")


def test_a_browser_may_use_the_method_of_every_route() -> None:
    assert {route.method for route in ROUTES} <= set(METHODS.split(", "))


def test_an_allowed_origin_may_ask_first_and_then_call() -> None:
    ours = "https://ours.example"
    assert asyncio.run(_ask(ours, "OPTIONS", PREFLIGHT)) == (204, ours, "authorization")
    assert asyncio.run(_ask(ours, "POST", {})) == (200, ours, None)


def test_another_origin_is_allowed_nothing() -> None:
    assert asyncio.run(_ask("https://theirs.example", "OPTIONS", PREFLIGHT)) == (204, None, None)
    assert asyncio.run(_ask("https://theirs.example", "POST", {})) == (200, None, None)


def test_other_requests_for_options_are_left_alone() -> None:
    assert asyncio.run(_ask("https://ours.example", "OPTIONS", {}))[0] == 405


@pytest.mark.parametrize("origin", ["ours.example", "https://ours.example/", "https://", "null", "ftp://ours.example"])
def test_what_no_browser_sends_as_an_origin_is_refused_at_the_start(origin: str) -> None:
    check_origins(["*", "https://ours.example", "http://localhost:8080"])
    with pytest.raises(ConfigError, match="is no origin"):
        check_origins([origin])
