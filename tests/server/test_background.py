"""Background tasks: one that fails is started again, and said to have failed."""

from __future__ import annotations

import asyncio

import pytest

from inlaid.server.background import Background


def test_a_task_that_fails_is_started_again_and_its_failures_show(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        background, starts, third = Background(pause=0.0), 0, asyncio.Event()

        async def fail_twice() -> None:
            nonlocal starts
            starts += 1
            if starts < 3:
                raise RuntimeError("a defect")
            third.set()
            await asyncio.Event().wait()

        async def go_on() -> None:
            await asyncio.Event().wait()

        background.start("weak", fail_twice)
        background.start("strong", go_on)
        await third.wait()
        assert background.states == {"weak": "failed 2 times", "strong": "running"}
        await background.close()

    asyncio.run(main())
    assert "weak failed" in caplog.text
    assert "a defect" in caplog.text
