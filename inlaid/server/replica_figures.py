"""ReplicaFigures: the figures of each replica of a cluster, with the label `replica`. One engine alone has none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inlaid.worker.interface import ReplicaState

# The engine's figure, the metric and its help.
_GAUGES = (
    ("running", "inlaid:replica_requests_running", "Requests that the replica computes"),
    ("waiting", "inlaid:replica_requests_waiting", "Requests that wait at the replica"),
    ("kv_blocks_used", "inlaid:replica_kv_blocks_used", "KV blocks of the replica in use"),
    ("adapters_running", "inlaid:replica_adapters_running", "Adapters that the replica's running requests use"),
)
_COUNTERS = (
    ("prompt_tokens", "inlaid:replica_prompt_tokens", "Prompt tokens that the replica computed"),
    ("cached_tokens", "inlaid:replica_prompt_tokens_cached", "Prompt tokens that the replica found in its cache"),
    ("output_tokens", "inlaid:replica_generation_tokens", "Tokens that the replica made"),
)


class ReplicaFigures(Collector):
    """The replicas as last set."""

    def __init__(self) -> None:
        self._replicas: Sequence[ReplicaState] = ()

    def set(self, replicas: Sequence[ReplicaState]) -> None:
        """Show these from now on."""
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics; prometheus_client calls it."""
        if not self._replicas:
            return
        up = GaugeMetricFamily("inlaid:replica_up", "1 while the replica takes requests", labels=["replica", "state"])
        restarts = GaugeMetricFamily("inlaid:replica_restarts", "Its engine's starts but one", labels=["replica"])
        for each in self._replicas:
            up.add_metric([each.name, each.state], float(each.state == "serving"))
            restarts.add_metric([each.name], each.restarts)
        yield from (up, restarts)
        for kinds, family in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for key, name, help in kinds:
                metric = family(name, help, labels=["replica"])
                for each in self._replicas:
                    if key in each.stats:
                        metric.add_metric([each.name], each.stats[key])
                yield metric
