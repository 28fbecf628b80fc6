"""Features of one client, checked one after another: each prints a line that `run.py` reads. No other package."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

URL = os.environ.get("INLAID_URL", "http://127.0.0.1:8000")
QUESTION = "What is the weather in Oslo?"


def _loop() -> asyncio.AbstractEventLoop:
    """Return the one loop of this process: clients keep connections that belong to it."""
    try:
        return asyncio.get_event_loop_policy().get_event_loop()
    except RuntimeError:
        made = asyncio.new_event_loop()
        asyncio.set_event_loop(made)
        return made


def feature(name: str, tries: int = 1) -> Callable[[Callable[[], Any]], None]:
    """Run the decorated function now, and say whether it went through. What rests on words that the model chose itself
    has several `tries`: clients ask at a temperature of 1."""

    def check(function: Callable[[], Any]) -> None:
        failures: list[str] = []
        while len(failures) < tries:
            try:
                made = function()
                if inspect.isawaitable(made):
                    _loop().run_until_complete(made)
            except Exception as error:  # noqa: BLE001 - whatever a client raises is what users would see
                traceback.print_exc(file=sys.stderr)
                failures.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
            else:
                print(f"{name}\tyes\t", flush=True)
                return
        print(f"{name}\tno\t{failures[-1]}", flush=True)

    return check
