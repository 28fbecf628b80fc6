"""Keys of BlitzScale's templates that have no meaning here, each with its reason. Used by `perf.template`.

They are refused by name rather than ignored: a run that silently left out what its template asks for would
be a result for another experiment.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

ONE_NODE = "servers of one machine are started here"
NO_SPLIT = "one server is started a point; `python -m perf.autoscale` runs templates with numbers of replicas"
NO_SCALING = "one server is started a point; `python -m perf.autoscale` runs templates that scale"
NO_RDMA = "weights do not move over RDMA"

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "server.ibv_rate": NO_RDMA,
        "server.inter_node": ONE_NODE,
        "server.config": ONE_NODE,
        "router.max_prefill_num": NO_SPLIT,
        "router.max_decode_num": NO_SPLIT,
        "router.min_prefill_num": NO_SPLIT,
        "router.min_decode_num": NO_SPLIT,
        "router.prefill_lower_bound": NO_SCALING,
        "router.prefill_upper_bound": NO_SCALING,
        "router.decode_lower_bound": NO_SCALING,
        "router.decode_upper_bound": NO_SCALING,
        "router.migration_lower_bound": NO_SCALING,
        "router.migration_upper_bound": NO_SCALING,
        "router.scale_down_threshold_millis": NO_SCALING,
        "router.mock_load_millis": "loads are real, not mocked",
        "router.mock_transfer_millis": "transfers are real, not mocked",
        "model.tokens_prefilled_per_sec": "it feeds a scaling rule, and one server is started",
        "model.tokens_transferred_per_sec": "it feeds a scaling rule, and one server is started",
    }
)
FEATURE_FLAGS = (
    "ngrok", "impl_sllm", "impl_blitz", "impl_live", "impl_live_pro", "impl_fast", "impl_fast_pro", "cache_replace",
    "cache_all_hit", "mutate", "motiv", "mock_transfer", "unidirect", "optimized_tanz",
)  # fmt: skip
FEATURE_REASON = "a build flag of BlitzScale's router; `python -m perf.autoscale` knows what it selects"


class Selected(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def dataset(self) -> str: ...
    @property
    def feature(self) -> str: ...


def refusals(table: dict[str, Any], selected: Selected, feature: str) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Split off keys that cannot be honoured: return table and feature without them, and them with their reasons."""
    kept: dict[str, Any] = {}
    found: dict[str, str] = {}
    for section, values in table.items():
        kept[section] = dict(values) if isinstance(values, dict) else values
        for key in list(kept[section]) if isinstance(values, dict) else ():
            reason = REASONS.get(f"{section}.{key}")
            if reason:
                found[_shown(section, key, selected)] = reason
                del kept[section][key]
    flags = [part.strip() for part in feature.split(",") if part.strip()]
    for flag in flags:
        if flag in FEATURE_FLAGS:
            found[f"features.{selected.feature}.{flag}"] = FEATURE_REASON
    return kept, ",".join(flag for flag in flags if flag not in FEATURE_FLAGS), found


def _shown(section: str, key: str, selected: Selected) -> str:
    owner = {"model": f"models.{selected.model}", "dataset": f"datasets.{selected.dataset}"}.get(section, section)
    return f"{owner}.{key}"
