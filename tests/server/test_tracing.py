"""Spans of answers: their names, times and attributes, in OpenTelemetry's own exporter."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from inlaid.config import ConfigError
from inlaid.engine.request import SamplingParams
from inlaid.server.tracing import Traces, make_traces

LINE: dict[str, Any] = {
    "method": "POST", "path": "/v1/completions", "status": 200, "seconds": 1.0, "peer": "127.0.0.1", "error": None,
    "id": "cmpl-1", "model": "maths", "tenant": None, "answers": 1, "prompt_tokens": 7, "cached_tokens": 0,
    "output_tokens": 3, "first_token_seconds": 0.5, "queue_seconds": 0.3, "adapter_seconds": 0.2,
    "adapter_read_seconds": 0.125, "adapter_copy_seconds": 0.075, "adapter_wait_seconds": 0.0, "prefill_seconds": 0.2,
    "decode_seconds": 0.4, "host_seconds": 0.05, "finish": "length",
}  # fmt: skip


def spans_of(line: dict[str, Any], params: SamplingParams | None = None, **headers: str) -> dict[str, Any]:
    exporter = InMemorySpanExporter()
    traces = Traces(exporter, at_once=True)
    traces.record(line, params, headers)
    traces.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_has_a_span_with_vllms_attributes_and_one_for_each_part() -> None:
    found = spans_of(LINE, SamplingParams(max_tokens=5, temperature=0.5))
    assert list(found) == ["queue", "adapter read", "adapter copy", "prefill", "decode", "llm_request"]
    whole = found["llm_request"]
    expected = {
        "gen_ai.request.id": "cmpl-1",
        "gen_ai.usage.prompt_tokens": 7,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.latency.time_in_queue": 0.3,
        "gen_ai.latency.time_to_first_token": 0.5,
        "gen_ai.latency.e2e": 1.0,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "inlaid.host.seconds": 0.05,
    }
    assert expected.items() <= dict(whole.attributes).items()
    assert "inlaid.tenant" not in whole.attributes
    for span in found.values():
        assert span.start_time >= whole.start_time
        if span is not whole:
            assert span.parent.span_id == whole.context.span_id
    seconds = {name: (span.end_time - span.start_time) / 1e9 for name, span in found.items()}
    assert seconds["adapter copy"] == pytest.approx(0.075, abs=1e-5)
    assert found["adapter copy"].end_time == pytest.approx(found["prefill"].start_time, abs=5000)
    assert sum(seconds[name] for name in ("queue", "prefill", "decode")) == pytest.approx(0.9, abs=1e-5)


def test_a_clients_trace_is_continued() -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    span = spans_of(LINE, Traceparent=f"00-{trace}-{parent}-01")["llm_request"]
    assert f"{span.context.trace_id:032x}" == trace
    assert f"{span.parent.span_id:016x}" == parent


def test_a_refused_request_is_one_span_with_its_error() -> None:
    line = {name: LINE[name] for name in ("path", "seconds")} | {"status": 404, "error": "no such model"}
    found = spans_of(line)
    assert list(found) == ["llm_request"]
    assert found["llm_request"].status.description == "no such model"


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_traces("") is None
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"install\.sh otel"):
        make_traces("http://127.0.0.1:1/v1/traces")
