"""A real Chromium, driven over its debugging protocol: load a page, ask it questions, take its picture."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
from pathlib import Path
from typing import Any

import aiohttp


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Page:
    """A page as a test uses it: its answers, its console, and its requests to the network."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.serial = socket, 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.loaded = False

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.serial += 1
        await self.socket.send_json({"id": self.serial, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=30)
            if message.get("id") == self.serial:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown" or (
            method == "Log.entryAdded" and parameters["entry"]["level"] == "error"
        ):
            self.errors.append(str(parameters))
        elif method == "Page.loadEventFired":
            self.loaded = True

    async def open(self, url: str, width: int) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        self.loaded = False
        await self.call("Page.navigate", url=url)
        while not self.loaded:
            self._note(await self.socket.receive_json(timeout=30))

    async def ask(self, expression: str) -> Any:
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def picture(self) -> bytes:
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])


async def with_page(browser: str, profile: Path, job: Any) -> Any:
    """Run `job(page)` in a fresh headless browser that ends with it."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
    with (profile / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            [browser, *flags, f"--user-data-dir={profile}", "about:blank"], stderr=log, stdout=log
        )
    try:
        port = await _port(profile, process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                pages = [entry for entry in await response.json() if entry["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                return await job(Page(socket))
    finally:
        process.kill()
        process.wait()


async def _port(profile: Path, process: subprocess.Popen[bytes]) -> int:
    """Read the port that the browser wrote into its profile."""
    file = profile / "DevToolsActivePort"
    for _ in range(600):
        if file.exists() and (text := file.read_text()):
            return int(text.splitlines()[0])
        assert process.poll() is None, (profile / "browser.log").read_text()
        await asyncio.sleep(0.05)
    raise AssertionError("the browser opened no debugging port within 30 s")
