"""Spans of answers for OpenTelemetry: one for each request, and one for each part of its seconds. This is the only file
that imports the extra `otel`. Names of attributes are vLLM's where vLLM has them; ours begin with `inlaid.`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from inlaid.config import ConfigError
from inlaid.engine.request import SamplingParams

_ATTRIBUTES = (  # of the request's span: its name, and the field of the log's line
    ("gen_ai.request.id", "id"),
    ("gen_ai.response.model", "model"),
    ("gen_ai.request.n", "answers"),
    ("gen_ai.usage.prompt_tokens", "prompt_tokens"),
    ("gen_ai.usage.completion_tokens", "output_tokens"),
    ("gen_ai.latency.e2e", "seconds"),
    ("gen_ai.latency.time_in_queue", "queue_seconds"),
    ("gen_ai.latency.time_to_first_token", "first_token_seconds"),
    ("gen_ai.latency.time_in_model_prefill", "prefill_seconds"),
    ("gen_ai.latency.time_in_model_decode", "decode_seconds"),
    ("http.response.status_code", "status"),
    ("url.path", "path"),
    ("error.message", "error"),
)
_OURS = (("tenant", "tenant"), ("cached_tokens", "cached_tokens"), ("finish", "finish"),
         ("adapter.seconds", "adapter_seconds"), ("host.seconds", "host_seconds"))  # fmt: skip
PREFIX = "inlaid."  # of attributes that vLLM does not have
_NANOSECONDS = 1_000_000_000


class Traces:
    """The maker of spans, and its exporter."""

    def __init__(self, exporter: Any, at_once: bool = False) -> None:
        """Export in batches from a thread, or each span `at_once`."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "inlaid"}), shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(exporter) if at_once else BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("inlaid")

    def record(self, line: Mapping[str, Any], params: SamplingParams | None, headers: Mapping[str, str]) -> None:
        """Make the spans of a request that is over, given its line of the log. A trace that the client's `traceparent`
        header names is continued."""
        from opentelemetry import trace
        from opentelemetry.propagate import extract

        end = time.time()
        begin = end - float(line["seconds"])
        context = extract({name.lower(): value for name, value in headers.items()})
        span = self._tracer.start_span("llm_request", context, trace.SpanKind.SERVER, start_time=_nanoseconds(begin))
        names = (*_ATTRIBUTES, *((f"{PREFIX}{name}", field) for name, field in _OURS))
        span.set_attributes({name: line[field] for name, field in names if line.get(field) is not None})
        if params is not None:
            span.set_attributes(
                {
                    "gen_ai.request.max_tokens": params.max_tokens,
                    "gen_ai.request.temperature": params.temperature,
                    "gen_ai.request.top_p": params.top_p,
                }
            )
        if line.get("error") is not None:
            span.set_status(trace.StatusCode.ERROR, str(line["error"]))
        inside = trace.set_span_in_context(span)
        for name, first, last in parts(line, begin):
            child = self._tracer.start_span(name, inside, start_time=_nanoseconds(first))
            child.end(_nanoseconds(last))
        span.end(_nanoseconds(end))

    def close(self) -> None:
        """Send what there is, and stop the exporter's thread."""
        self._provider.shutdown()


def parts(line: Mapping[str, Any], begin: float) -> Iterator[tuple[str, float, float]]:
    """Yield the parts of an answered request with their begin and end. The wait for an adapter ends the queue: waiting
    for a place, reading, copying."""
    if line.get("queue_seconds") is None:
        return
    admitted = begin + line["queue_seconds"]
    yield "queue", begin, admitted
    at = admitted - line["adapter_seconds"]
    for name in ("wait", "read", "copy"):
        seconds = line[f"adapter_{name}_seconds"]
        if seconds > 0:
            yield f"adapter {name}", at, at + seconds
        at += seconds
    first = admitted + line["prefill_seconds"]
    yield "prefill", admitted, first
    yield "decode", first, first + line["decode_seconds"]


def make_traces(endpoint: str) -> Traces | None:
    """Make the spans' maker that a configuration asks for; ConfigError says what to install."""
    if not endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return Traces(OTLPSpanExporter(endpoint=endpoint))
    except ImportError as error:
        raise ConfigError(
            "--otlp-traces-endpoint needs OpenTelemetry: pip install 'inlaid[otel]', or bash install.sh otel"
        ) from error


def _nanoseconds(moment: float) -> int:
    return int(moment * _NANOSECONDS)
