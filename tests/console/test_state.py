"""The difference between two states, merged into the first, gives the second; and how a viewer gets both."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlaid.console.feed import Feed, Level, TooManyViewers
from inlaid.console.history import LOAD, LoadHistory, ResidencyHistory
from inlaid.console.state import difference, merged

KEYS = st.sampled_from(["", "a", "b", "__proto__", "<i>"])
VALUES = st.sampled_from([None, 0, 1, [1], [2]])
STATES = st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, min_size=1))


@given(STATES, STATES)
def test_a_difference_merged_into_the_first_state_gives_the_second(before: Any, after: Any) -> None:
    assert merged(before, difference(before, after)) == after
    assert difference(after, after) == {}


def parsed(message: bytes) -> tuple[str, Any]:
    name, data = message.decode().strip().split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def state(number: int) -> dict[str, dict[str, Any]]:
    return {"load": {"t": number}, "tenants": {"a": number}, "paths": {"x": "/secret"}}


def test_each_viewer_sees_what_its_level_allows() -> None:
    async def look() -> None:
        feed = Feed()
        streams = [feed.follow(level) for level in Level]
        for stream in streams:
            assert (await anext(stream)).startswith(b":")
        feed.publish(state(1), {"t": [0]})
        feed.publish(state(2), {"t": [0, 1]})
        for level, stream in zip(Level, streams):
            name, whole = parsed(await anext(stream))
            assert name == "state"
            assert whole["history"] == {"t": [0]}
            name, delta = parsed(await anext(stream))
            assert (name, delta["load"]) == ("delta", {"set": {"t": 2}})
            assert ("tenants" in whole, "tenants" in delta) == (level >= Level.OPERATOR,) * 2
            assert ("paths" in whole) == (level is Level.ADMIN)
        assert feed.levels == set(Level)
        feed.close()
        for stream in streams:
            assert [each async for each in stream] == []
        assert feed.num_viewers == 0

    asyncio.run(look())


def test_a_slow_viewer_gets_a_whole_state_instead_of_what_it_missed() -> None:
    async def look() -> None:
        feed = Feed()
        stream = feed.follow(Level.READER)
        await anext(stream)
        for number in range(10):
            feed.publish(state(number), {})
        seen = [parsed(await anext(stream)) for _ in range(4)]
        assert [name for name, _ in seen] == ["state", "delta", "delta", "delta"]
        feed.publish(state(10), {})
        name, whole = parsed(await anext(stream))
        assert (name, whole["load"]) == ("state", {"t": 10})
        await stream.aclose()

    asyncio.run(look())


def test_the_number_of_viewers_is_bounded() -> None:
    async def look() -> None:
        feed = Feed(max_viewers=1)
        first = feed.follow(Level.READER)
        await anext(first)
        with pytest.raises(TooManyViewers, match="1 pages"):
            await anext(feed.follow(Level.READER))
        await first.aclose()
        assert not feed.watched.is_set()

    asyncio.run(look())


def test_histories_are_bounded_and_tell_who_thrashes() -> None:
    load = LoadHistory()
    for second in range(2000):
        load.add({name: float(second) for name in LOAD})
    assert {len(values) for values in load.columns().values()} == {900}
    residency = ResidencyHistory()
    for second in range(0, 7200, 20):
        times = second // 20
        residency.note(second, [("calm", True, 1, 0), ("busy", times % 2 == 0, times, times), ("idle", False, 0, 0)])
    assert len(residency.minutes()) == 60
    assert {name for present in residency.minutes().values() for name in present} == {"calm", "busy"}
    assert residency.thrashing().keys() == {"busy"}
    before = residency.minutes()
    residency.note(7180, [("busy", True, 1000, 1000)])
    assert difference({"residency": before}, {"residency": residency.minutes()}).keys() == {"residency"}
