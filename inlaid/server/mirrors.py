"""Metrics made when the page is asked for: figures under names of other releases, and what the engine counts itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from inlaid.engine.sizes import STEP_SIZES
from inlaid.worker.messages import ModelInfo


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
    """The engine's histogram of steps, and its configuration, as they were when the engine was last asked."""

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
        if self._model is not None:
            facts = {
                "block_size": str(self._model.block_size),
                "num_gpu_blocks": str(self._model.num_blocks),
                "num_cpu_blocks": "0",
                "cache_dtype": self._model.dtype,
                "engine": self._labels[1],
            }
            info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache; the value is 1", labels=list(facts))
            info.add_metric(list(facts.values()), 1)
            yield info


def _buckets(stats: Mapping[str, float]) -> Sequence[tuple[str, float]]:
    """Return the steps of at most each size, as histograms have them."""
    total, made = 0.0, []
    for size in STEP_SIZES:
        total += stats[f"steps_of_{size}"]
        made.append((str(float(size)), total))
    return [*made, ("+Inf", stats["steps"])]
