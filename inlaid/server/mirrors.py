"""Metrics made when the page is asked for: figures under names of other releases, and what the engine counts itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from inlaid.engine.sizes import STEP_SIZES
from inlaid.worker.messages import ModelInfo

_SPECULATION = (
    ("spec_drafts", "num_drafts", "Drafts that steps checked"),
    ("spec_draft_tokens", "num_draft_tokens", "Guesses in drafts"),
    ("spec_accepted_tokens", "num_accepted_tokens", "Guesses that were right"),
)


class Renamed(Collector):
    """The same figures under other names: dashboards ask for those of several releases of vLLM."""

    def __init__(self, sources: Mapping[str, Collector]) -> None:
        self._sources = sources

    def collect(self) -> Iterable[Metric]:
        """Yield each source's figures under its other name."""
        for name, source in self._sources.items():
            for metric in source.collect():
                copy = Metric(name, metric.documentation, metric.type)
                for sample in metric.samples:
                    copy.samples.append(sample._replace(name=name + sample.name[len(metric.name) :]))
                yield copy


class EngineFigures(Collector):
    """The engine's histogram of steps, its speculation and its configuration, as they were when it was last asked."""

    def __init__(self, model_name: str, engine: str) -> None:
        self._labels = (model_name, engine)
        self._stats: Mapping[str, float] = {}
        self._model: ModelInfo | None = None

    def set(self, stats: Mapping[str, float], model: ModelInfo) -> None:
        """Keep the figures for the next page."""
        self._stats, self._model = stats, model

    def collect(self) -> Iterable[Metric]:
        """Yield them."""
        steps = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens computed per step", labels=["model_name", "engine"]
        )
        if self._stats:
            steps.add_metric(self._labels, _buckets(self._stats), self._stats["step_tokens"])
        yield steps
        yield from self._speculation()
        if self._model is not None:
            facts = {
                "block_size": str(self._model.block_size),
                "num_gpu_blocks": str(self._model.num_blocks),
                "num_cpu_blocks": "0",
                "cache_dtype": kv if (kv := self._model.kv_cache_dtype) != "auto" else self._model.dtype,
                "engine": self._labels[1],
            }
            info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache; the value is 1", labels=list(facts))
            info.add_metric(list(facts.values()), 1)
            yield info

    def _speculation(self) -> Iterable[Metric]:
        """Yield the counters of drafts, where drafts are made."""
        stats, labels = self._stats, ["model_name", "engine"]
        if "spec_drafts" not in stats:
            return
        for key, name, help in _SPECULATION:
            total = CounterMetricFamily(f"vllm:spec_decode_{name}", help, labels=labels)
            total.add_metric(self._labels, stats[key])
            yield total
        places = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Guesses that were right, by place",
            labels=[*labels, "position"],
        )
        for place in itertools.takewhile(lambda at: f"spec_accepted_at_{at}" in stats, itertools.count()):
            places.add_metric((*self._labels, str(place)), stats[f"spec_accepted_at_{place}"])
        yield places
        for key, name, help in _SPECULATION:
            each = CounterMetricFamily(f"inlaid:spec_decode_{name}", f"{help}, by adapter", labels=[*labels, "adapter"])
            for given, value in stats.items():
                prefix, by, adapter = given.partition(" of ")
                if by and prefix == key:
                    each.add_metric((*self._labels, adapter), value)
            yield each


def _buckets(stats: Mapping[str, float]) -> Sequence[tuple[str, float]]:
    """Return the steps of at most each size, as histograms have them."""
    total, made = 0.0, []
    for size in STEP_SIZES:
        total += stats[f"steps_of_{size}"]
        made.append((str(float(size)), total))
    return [*made, ("+Inf", stats["steps"])]
