"""The generator against a scripted server: its times against the server's own stamps, and every kind of end.

Client and server share a loop whose clock is virtual, so agreement is exact whatever the machine is doing;
`perf/measure_client.py` shows the same on a real clock, between processes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from inlaid.workload.plan import PlannedRequest
from perf.fake_server import Behaviour, FakeServer, Sent
from perf.protocols import PROTOCOLS, Backend, Event, WireOptions
from perf.records import Record
from perf.sender import Observed, Prepared, Sender, drive
from perf.summary import Options, summarize
from tests.perf.virtual_time import run_virtual

Script = Callable[[int], Behaviour]


def request(index: int, at: float, output_len: int = 6, adapter: str = "a") -> PlannedRequest:
    return PlannedRequest(index, at, adapter, adapter, "default", "x y z", 4, output_len)


def exchange(
    script: Script,
    requests: list[PlannedRequest],
    backend: Backend = "openai",
    timeout: float = 60.0,
    max_connections: int = 1000,
    stop_after: float | None = None,
) -> tuple[list[Record], list[Sent]]:
    """Run the requests; return records by index, and the server's log by request id."""

    async def job() -> tuple[list[Record], list[Sent]]:
        clock = asyncio.get_running_loop().time
        server = FakeServer(script, clock=clock)
        runner = web.AppRunner(server.app(), access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        records: list[Record] = []
        stop = asyncio.Event()
        if stop_after is not None:
            asyncio.get_running_loop().call_later(stop_after, stop.set)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session:
            sender = Sender(session, PROTOCOLS[backend], clock, max_connections)
            await drive(sender, [prepared(r, port, backend) for r in requests], records.append, stop)
            start = sender.start
        await runner.cleanup()
        for sent in server.log:
            sent.tokens = [at - start for at in sent.tokens]
            sent.received -= start
        key = {f"perf-{r.index}": r.index for r in requests}
        return sorted(records, key=lambda r: r.index), sorted(server.log, key=lambda s: key[s.request_id])

    return run_virtual(job())


def prepared(item: PlannedRequest, port: int, backend: Backend) -> Prepared:
    import msgspec

    protocol = PROTOCOLS[backend]
    body = msgspec.json.encode(protocol.body(item, WireOptions("fake")))
    headers = {"Content-Type": "application/json", "X-Request-Id": f"perf-{item.index}"}
    return Prepared(item, f"http://127.0.0.1:{port}{protocol.path}", body, headers)


def uneven(index: int) -> Behaviour:
    return Behaviour(ttft_s=0.020 + 0.007 * index, gaps_s=(0.003, 0.050, 0.001, 0.110, 0.025))


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "slora"])
def test_times_agree_with_the_servers_own(backend: Backend) -> None:
    """TTFT, inter-token latency, end to end and task completion within 2 ms (here: microseconds)."""
    records, log = exchange(uneven, [request(i, 0.010 * i) for i in range(8)], backend)
    for record, sent in zip(records, log, strict=True):
        assert record.status == "ok"
        assert record.sent == pytest.approx(record.due, abs=0.002)
        assert record.ttft == pytest.approx(sent.tokens[0] - sent.received, abs=0.002)
        assert record.token_times() == pytest.approx(sent.tokens, abs=0.002)
        assert record.itls == pytest.approx([0.003, 0.050, 0.001, 0.110, 0.025], abs=0.002)
        assert record.finished == pytest.approx(sent.tokens[-1], abs=0.002)
        assert (record.output_len, record.input_len) == (6, sent.prompt_tokens)


def test_summary_agrees_with_an_independent_count() -> None:
    """Every figure recomputed here from the script alone."""
    requests = [request(i, 0.5 * i, adapter="ab"[i % 2]) for i in range(6)]
    records, _ = exchange(lambda i: Behaviour(ttft_s=0.1 * (i + 1), itl_s=0.02), requests)
    summary = summarize(records, Options())
    ttfts = [100.0, 200, 300, 400, 500, 600]
    ends = [0.5 * i + 0.1 * (i + 1) + 0.1 for i in range(6)]
    assert summary["completed"] == 6
    assert summary["mean_ttft_ms"] == pytest.approx(sum(ttfts) / 6, abs=2)
    assert summary["median_ttft_ms"] == pytest.approx(350, abs=2)
    assert summary["p90_ttft_ms"] == pytest.approx(550, abs=2)
    assert summary["mean_itl_ms"] == pytest.approx(20, abs=2)
    assert summary["mean_tpot_ms"] == pytest.approx(20, abs=2)
    assert summary["mean_e2el_ms"] == pytest.approx(450, abs=2)
    assert summary["duration"] == pytest.approx(ends[-1], abs=0.002)
    assert summary["output_throughput"] == pytest.approx(36 / ends[-1], rel=1e-3)
    assert summary["jct"]["per_task_s"]["a"] == pytest.approx(ends[4], abs=0.002)
    assert summary["jct"]["per_task_s"]["b"] == pytest.approx(ends[5] - 0.5, abs=0.002)
    assert summary["max_concurrent_requests"] == 2


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        ("http-500", "error", "scripted"),
        ("http-429", "refused", "scripted"),
        ("hang", "timeout", "no end within 6.0 s"),
        ("cut", "cut", "before it said it was done"),
        ("reset", "cut", "Error"),
        ("garbage", "error", "unreadable event"),
        ("error-event", "error", "scripted"),
        ("slora-reject", "refused", "rejected"),
    ],
)
def test_every_bad_end_has_its_status(fault: Any, status: str, error: str) -> None:
    """A request that goes wrong after three tokens keeps them, is told apart, and harms no other."""
    script = [Behaviour(itl_s=0.01), Behaviour(itl_s=0.01, fault=fault, fault_after=3)]
    backend: Backend = "slora" if fault == "slora-reject" else "openai"
    records, log = exchange(lambda i: script[i % 2], [request(i, i * 0.5) for i in range(4)], backend, timeout=6.0)
    assert [record.status for record in records] == ["ok", status, "ok", status]
    bad = records[1]
    assert re.search(error, bad.error)
    tokens = 0 if fault.startswith("http") else 3
    assert (bad.output_len, len(log[1].tokens)) == (tokens, tokens)
    assert bad.http_status == (int(fault[5:]) if tokens == 0 else 200)
    summary = summarize(records, Options())
    assert (summary["completed"], summary["failed"]) == (2, 2)
    assert summary["statuses"] == {"ok": 2, status: 2}
    assert summary["mean_ttft_ms"] == pytest.approx(20, abs=2)


def test_a_server_that_is_gone_is_an_error() -> None:
    async def job() -> Record:
        clock = asyncio.get_running_loop().time
        async with aiohttp.ClientSession() as session:
            sender = Sender(session, PROTOCOLS["openai"], clock, 10)
            return await sender.send(prepared(request(0, 0.0), 9, "openai"))

    record = run_virtual(job())
    assert (record.status, record.http_status) == ("error", None)


def test_the_loop_is_open() -> None:
    """A slow answer does not hold the next request back."""
    records, _ = exchange(lambda _: Behaviour(ttft_s=5.0), [request(i, 0.1 * i) for i in range(10)])
    assert [record.lateness for record in records] == pytest.approx([0] * 10, abs=0.002)


def test_a_bound_on_connections_shows_as_lateness() -> None:
    script = lambda _: Behaviour(ttft_s=1.0, itl_s=0.0)  # noqa: E731
    records, _ = exchange(script, [request(i, 0.0) for i in range(6)], max_connections=2)
    assert sorted(record.lateness for record in records) == pytest.approx([0, 0, 1, 1, 2, 2], abs=0.01)
    assert all(record.ttft == pytest.approx(1.0, abs=0.002) for record in records)


def test_stopping_keeps_what_was_done_and_sends_no_more() -> None:
    records, log = exchange(
        lambda _: Behaviour(ttft_s=0.1, itl_s=0.1), [request(i, 0.3 * i) for i in range(9)], stop_after=1.0
    )
    assert [record.status for record in records] == ["ok", "ok", "cancelled", "cancelled"]
    assert len(log) == 4
    assert 3 <= records[2].output_len <= 4


def test_a_full_disk_ends_the_run_with_its_own_error() -> None:
    def full(_: Record) -> None:
        raise OSError("No space left on device")

    async def job() -> None:
        clock = asyncio.get_running_loop().time
        async with aiohttp.ClientSession() as session:
            sender = Sender(session, PROTOCOLS["openai"], clock, 10)
            items = [prepared(request(i, 0.1 * i), 9, "openai") for i in range(50)]
            await drive(sender, items, full, asyncio.Event())

    with pytest.raises(OSError, match="No space left"):
        run_virtual(job())


def test_events_may_be_split_anywhere() -> None:
    stream = (
        b'data: {"choices":[{"text":"a"}]}\r\n\r\n: comment\n\ndata: {"choices":[{"text":"b"}]}\n\ndata: [DONE]\n\n'
    )
    for cut in range(len(stream)):
        seen = Observed(PROTOCOLS["openai"].parse)
        seen.feed(stream[:cut], 1.0)
        seen.feed(stream[cut:], 2.0)
        assert (seen.texts, seen.status()) == (["a", "b"], "ok")


@pytest.mark.parametrize(
    ("data", "event"),
    [
        (b"[DONE]", Event(done=True)),
        (b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', Event()),
        (b'{"choices":[{"delta":{"content":"hi"}}]}', Event("hi", True)),
        (b'{"choices":[{"text":"","finish_reason":"stop"}]}', Event(done=True)),
        (b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}', Event("", False, False, False, "", 3, 4)),
    ],
)
def test_openai_events(data: bytes, event: Event) -> None:
    assert PROTOCOLS["openai"].parse(data) == event


def test_an_aborted_stream_is_an_error() -> None:
    assert "abort" in PROTOCOLS["openai"].parse(b'{"choices":[{"text":"","finish_reason":"abort"}]}').error
