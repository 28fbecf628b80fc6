"""Prometheus metrics under vLLM's names, so that its dashboards work, with an `adapter` label beside them. One registry
per application. The routes meter each answer; gauges are read from the engine when somebody looks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from inlaid.console.traffic import Flight, Traffic
from inlaid.engine.request import NewRequest
from inlaid.server.mirrors import EngineFigures, Renamed
from inlaid.server.replica_figures import ReplicaFigures
from inlaid.text.stream import Piece
from inlaid.worker.interface import ReplicaState
from inlaid.worker.messages import WAITED, AdapterInfo, ModelInfo

OTHER = "other"  # adapters beyond the cap share this label
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_LABELS = ("model_name", "engine", "adapter")
_ENGINE = "0"
_LEVELS = MappingProxyType({"device": "gpu", "host": "cpu", "disk": "disk"})

# The engine's own figures: key, metric, help.
_GAUGES = (
    ("running", "num_requests_running", "Requests being computed"),
    ("waiting", "num_requests_waiting", "Requests waiting to be scheduled"),
)
_COUNTERS = (
    ("preemptions", "num_preemptions", "Requests preempted to free KV blocks"),
    ("prompt_tokens", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    ("cached_tokens", "prefix_cache_hits", "Prompt tokens found in the prefix cache"),
)
_ADAPTER_COUNTERS = (
    ("reads", "Reads from disk, after the first"),
    ("loads", "Loads to the device"),
    ("evictions", "Evictions from the device to make room"),
    ("hits", "Requests that found it on the device and did not have to wait for it"),
)


class Metrics:
    """All metrics of one server."""

    def __init__(self, model_name: str, max_adapters: int) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._max_adapters = max_adapters
        self.traffic = Traffic()
        self._labelled: set[str] = set()
        self._meters: dict[str, _Series] = {}
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests")
        self.cached_tokens = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache")
        self.generation_tokens = self._counter("generation_tokens", "Tokens made")
        self.success = Counter(
            "vllm:request_success",
            "Requests that ended, by how",
            [*_LABELS, "finished_reason"],
            registry=self.registry,
        )
        self.refused = Counter(
            "inlaid:requests_refused",
            "Requests that were refused, by HTTP status",
            [*_LABELS, "status"],
            registry=self.registry,
        )
        self.first = self._histogram("time_to_first_token_seconds", "Arrival to first token", _SECONDS)
        self.between = self._histogram("inter_token_latency_seconds", "Between two tokens of a request", _BETWEEN)
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between tokens of a request", _BETWEEN
        )
        self.whole = self._histogram("e2e_request_latency_seconds", "Arrival to last token", _SECONDS)
        self.queue = self._histogram("request_queue_time_seconds", "Arrival to first scheduled", _SECONDS)
        self.inference = self._histogram("request_inference_time_seconds", "First scheduled to last token", _SECONDS)
        self.prefill = self._histogram("request_prefill_time_seconds", "First scheduled to first token", _SECONDS)
        self.decode = self._histogram("request_decode_time_seconds", "First token to last token", _SECONDS)
        self.prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens per request", _TOKENS)
        self.output_length = self._histogram("request_generation_tokens", "Tokens made per request", _TOKENS)
        self.asked_length = self._histogram("request_params_max_tokens", "max_tokens per request", _TOKENS)
        self._engine = _EngineGauges(self.registry, model_name, max_adapters)
        self._figures = EngineFigures(model_name, _ENGINE)
        self.registry.register(self._figures)
        self._replicas = ReplicaFigures()
        self.registry.register(self._replicas)
        ProcessCollector(registry=self.registry)
        others = {
            "vllm:time_per_output_token_seconds": self.between,
            "vllm:request_max_num_generation_tokens": self.output_length,
            "vllm:gpu_cache_usage_perc": self._engine.kv_usage,
        }
        self.registry.register(Renamed(others))

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"vllm:{name}", help, _LABELS, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(f"vllm:{name}", help, _LABELS, registry=self.registry, buckets=tuple(buckets))

    def label(self, adapter: str | None) -> str:
        """Return an adapter's label, empty for the base. Adapters beyond the first `max_adapters` share one."""
        if adapter is None or adapter in self._labelled:
            return adapter or ""
        if len(self._labelled) >= self._max_adapters:
            return OTHER
        self._labelled.add(adapter)
        return adapter

    def meter(self, request: NewRequest) -> Meter:
        """Return the meter of a new request."""
        return Meter(self._series(request.adapter), request, self.traffic)

    def refuse(self, adapter: str | None, status: int) -> None:
        """Count a request that was refused before it had a meter."""
        self._series(adapter).refuse(status)

    def _series(self, adapter: str | None) -> _Series:
        label = self.label(adapter)
        if label not in self._meters:
            self._meters[label] = _Series(self, (self._model, _ENGINE, label))
        return self._meters[label]

    def render(
        self,
        stats: dict[str, float] | None,
        adapters: list[AdapterInfo],
        model: ModelInfo | None,
        num_restarts: int,
        replicas: Sequence[ReplicaState] = (),
    ) -> bytes:
        """Return the page, with the engine's own figures of this moment (None: it is not there); of several replicas
        they are sums, beside those of each."""
        self._replicas.set(replicas)
        if stats is not None and model is not None:
            self._figures.set(stats, model)
        self._engine.set(stats, adapters, model, num_restarts)
        return generate_latest(self.registry)


class _Series:
    """The metrics of one label, looked up once."""

    def __init__(self, metrics: Metrics, labels: tuple[str, ...]) -> None:
        self._success = metrics.success
        self._refused = metrics.refused
        self._labels = labels
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.cached_tokens = metrics.cached_tokens.labels(*labels)
        self.generation_tokens = metrics.generation_tokens.labels(*labels)
        self.first = metrics.first.labels(*labels)
        self.between = metrics.between.labels(*labels)
        self.per_token = metrics.per_token.labels(*labels)
        self.whole = metrics.whole.labels(*labels)
        self.queue = metrics.queue.labels(*labels)
        self.inference = metrics.inference.labels(*labels)
        self.prefill = metrics.prefill.labels(*labels)
        self.decode = metrics.decode.labels(*labels)
        self.prompt_length = metrics.prompt_length.labels(*labels)
        self.output_length = metrics.output_length.labels(*labels)
        self.asked_length = metrics.asked_length.labels(*labels)

    def end(self, reason: str) -> None:
        """Count a request that has ended."""
        self._success.labels(*self._labels, reason).inc()

    def refuse(self, status: int) -> None:
        """Count a request that was refused."""
        self._refused.labels(*self._labels, str(status)).inc()


class Meter:
    """The times and tokens of one request. `close` counts it, however it ended."""

    def __init__(self, series: _Series, request: NewRequest, traffic: Traffic) -> None:
        self._series = series
        self._request = request
        self._arrival = self._last = time.monotonic()
        self._flight: Flight = traffic.begin(request, self._arrival)
        self._first: float | None = None
        self._queue = 0.0
        self._num_tokens = 0
        self._reason: str | None = None
        self._refused = False

    def refuse(self, status: int) -> None:
        """Count it as refused, with an HTTP status."""
        self._refused = True
        self._series.refuse(status)

    def note(self, piece: Piece) -> None:
        """Record a piece of the answer, as it comes."""
        now = time.monotonic()
        series = self._series
        if self._first is None:
            self._first = now
            self._queue = piece.queue_time or 0.0
            series.first.observe(now - self._arrival)
            self._flight.first(now - self._arrival, len(piece.tokens))
            series.queue.observe(self._queue)
            series.prompt_tokens.inc(len(self._request.prompt))
            series.cached_tokens.inc(piece.num_cached)
        else:
            series.between.observe(now - self._last)
            self._flight.between(now - self._last, len(piece.tokens))
        series.generation_tokens.inc(len(piece.tokens))
        self._num_tokens += len(piece.tokens)
        self._last = now
        if piece.finish_reason is not None:
            self._reason = piece.finish_reason.value

    def close(self) -> None:
        """Record the whole request."""
        self._flight.end(self._reason, self._num_tokens, self._last)
        if self._refused:
            return
        series = self._series
        series.end(self._reason or "abort")
        if self._reason is None or self._first is None:
            return
        scheduled = self._arrival + self._queue
        series.whole.observe(self._last - self._arrival)
        series.inference.observe(max(0.0, self._last - scheduled))
        series.prefill.observe(max(0.0, self._first - scheduled))
        series.decode.observe(self._last - self._first)
        series.prompt_length.observe(len(self._request.prompt))
        series.output_length.observe(self._num_tokens)
        series.asked_length.observe(self._request.params.max_tokens)
        if self._num_tokens > 1:
            series.per_token.observe((self._last - self._first) / (self._num_tokens - 1))


class _EngineGauges:
    """Metrics that the engine process counts itself. Counters go on when the process is a new one."""

    def __init__(self, registry: CollectorRegistry, model_name: str, max_adapters: int) -> None:
        self._model = model_name
        self._max_adapters = max_adapters
        self._labels = ("model_name", "engine")
        self._registry = registry
        self._gauges = {key: self._gauge(f"vllm:{name}", help) for key, name, help in _GAUGES}
        self._counters = {
            key: Counter(f"vllm:{name}", help, self._labels, registry=registry) for key, name, help in _COUNTERS
        }
        self._seen: dict[str, float] = {}
        self.kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1")
        self._kv_blocks = self._gauge("inlaid:kv_blocks_used", "KV blocks in use")
        self._kv_lent = self._gauge("inlaid:kv_blocks_lent", "KV blocks that adapters have borrowed")
        self._waited = Gauge(
            "inlaid:member_wait_seconds",
            "Seconds that a member of the tensor-parallel group has waited for others",
            ["member"],
            registry=registry,
        )
        self._up = self._gauge("inlaid:engine_up", "1 when the engine process serves")
        self._restarts = self._gauge("inlaid:engine_restarts", "Starts of the engine process after the first")
        self._lora_info = Gauge(
            "vllm:lora_requests_info",
            "Adapters with requests; the value is the time of the reading",
            ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            registry=registry,
        )
        self._loaded = Gauge(
            "vllm:lora_adapter_loaded", "1 where the adapter is", ["adapter_name", "level", "pinned"], registry=registry
        )
        self._on_gpu = self._gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters on the device")
        self._on_cpu = self._gauge("vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory")
        self._most = self._gauge("vllm:max_gpu_lora_adapters", "Most adapters on the device at once")
        self._seconds = Gauge(
            "vllm:lora_adapter_load_seconds",
            "The last load: to the cpu from disk, to the gpu from the cpu",
            ["adapter_name", "level"],
            registry=registry,
        )
        self._counted: set[str] = set()
        self._adapter_counters = {
            key: Counter(f"inlaid:lora_adapter_{key}", help, ["adapter_name"], registry=registry)
            for key, help in _ADAPTER_COUNTERS
        }
        self._bytes = Gauge("inlaid:lora_adapter_bytes", "Bytes of its weights", ["adapter_name"], registry=registry)
        self._rank = Gauge("inlaid:lora_adapter_rank", "Its largest rank", ["adapter_name"], registry=registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(name, help, self._labels, registry=self._registry)

    def set(
        self, stats: dict[str, float] | None, adapters: list[AdapterInfo], model: ModelInfo | None, num_restarts: int
    ) -> None:
        labels = (self._model, _ENGINE)
        self._up.labels(*labels).set(stats is not None)
        self._restarts.labels(*labels).set(num_restarts)
        if stats is None or model is None:
            return
        for key, gauge in self._gauges.items():
            gauge.labels(*labels).set(stats[key])
        for key, counter in self._counters.items():
            counter.labels(*labels).inc(self._growth(key, stats[key]))
        self.kv_usage.labels(*labels).set(stats["kv_blocks_used"] / max(1, stats["kv_blocks"]))
        self._kv_blocks.labels(*labels).set(stats["kv_blocks_used"])
        self._kv_lent.labels(*labels).set(stats["kv_blocks_lent"])
        for key in filter(lambda key: key.startswith(WAITED), stats):
            self._waited.labels(key.removeprefix(WAITED)).set(stats[key])
        self._set_adapters(adapters, model)

    def _growth(self, key: str, value: float) -> float:
        """Return the growth since the last time; a value that fell belongs to a new process."""
        before = self._seen.get(key, 0.0)
        self._seen[key] = value
        return value - before if value >= before else value

    def _set_adapters(self, adapters: list[AdapterInfo], model: ModelInfo) -> None:
        labels = (self._model, _ENGINE)
        resident = [info for info in adapters if info.tier == "device"]
        self._on_gpu.labels(*labels).set(len(resident))
        self._on_cpu.labels(*labels).set(sum(info.on_host for info in adapters))
        self._most.labels(*labels).set(model.max_loras)
        busy = [info for info in adapters if info.requests]
        running = ",".join(info.name for info in busy if info.tier == "device")
        waiting = ",".join(info.name for info in busy if info.tier != "device")
        self._lora_info.clear()
        self._lora_info.labels(str(model.max_loras), running, waiting).set(time.time())
        for gauge in (self._loaded, self._seconds, self._bytes, self._rank):
            gauge.clear()
        shown = adapters[: self._max_adapters]
        self._forget_counts({info.name for info in shown})
        for info in shown:
            self._loaded.labels(info.name, _LEVELS[info.tier], str(info.pinned).lower()).set(1)
            self._seconds.labels(info.name, "cpu").set(info.load_seconds)
            if info.copy_seconds:
                self._seconds.labels(info.name, "gpu").set(info.copy_seconds)
            for (key, name), counter in self._adapter_counts(info.name).items():
                counter.labels(name).inc(self._growth(f"{key} {name}", getattr(info, key)))
            self._bytes.labels(info.name).set(info.bytes)
            self._rank.labels(info.name).set(info.rank)

    def _adapter_counts(self, name: str) -> dict[tuple[str, str], Counter]:
        self._counted.add(name)
        return {(key, name): counter for key, counter in self._adapter_counters.items()}

    def _forget_counts(self, shown: AbstractSet[str]) -> None:
        """Drop the counts of adapters that are gone, as names come and go without end."""
        for name in self._counted - shown:
            for (key, _), counter in self._adapter_counts(name).items():
                counter.remove(name)
                del self._seen[f"{key} {name}"]
        self._counted &= shown
