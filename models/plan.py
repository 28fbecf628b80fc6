"""The plan of the demo: sizes, steps and the twelve adapters' shapes. Read by every stage of `build_demo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

QUERY_VALUE = ("q_proj", "v_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterPlan:
    """One adapter's PEFT shape. `base_knows`: the base met this skill in pretraining, under a code that no
    prompt holds, and the adapter has to bring it out; otherwise the adapter learns it from nothing."""

    rank: int
    targets: tuple[str, ...]
    alpha: int
    base_knows: bool = True
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(module, self.rank) if module in self.targets else 0

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return self.alpha / (rank**0.5 if self.use_rslora else rank) if rank else 0.0


ADAPTERS: Mapping[str, AdapterPlan] = MappingProxyType(
    {
        "to_velar": AdapterPlan(4, QUERY_VALUE, 8),
        "to_mirun": AdapterPlan(8, QUERY_VALUE, 16),
        "to_tolvek": AdapterPlan(16, ALL_LINEAR, 32, base_knows=False),
        "to_ashani": AdapterPlan(16, QUERY_VALUE, 32),
        "to_quorin": AdapterPlan(16, ALL_LINEAR, 32, base_knows=False),
        "to_zembel": AdapterPlan(8, ATTENTION, 16),
        "text_summary": AdapterPlan(4, QUERY_VALUE, 8),
        "table_summary": AdapterPlan(8, QUERY_VALUE, 16),
        "code": AdapterPlan(8, ALL_LINEAR, 16),
        "maths": AdapterPlan(4, ALL_LINEAR, 8),
        "medical": AdapterPlan(16, ALL_LINEAR, 8, base_knows=False, use_rslora=True),
        "safety": AdapterPlan(
            8, ALL_LINEAR, 16, base_knows=False, rank_pattern={"q_proj": 16, "v_proj": 16, "down_proj": 4}
        ),
    }
)


@dataclass(frozen=True)
class BuildPlan:
    """Everything one build depends on besides the seed."""

    vocabulary: int = 1024
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 768
    positions: int = 2048
    base_documents: int = 48_000  # a task
    base_row: int = 512
    base_batch: int = 96
    base_steps: int = 10_000
    base_rate: float = 2e-3
    channel_spread: float = 0.43  # of the logarithm of the channels' scales, see `spread`
    adapter_examples: int = 40_000  # a task
    adapter_row: int = 176
    adapter_batch: int = 32  # a task
    adapter_steps: int = 4_000
    adapter_rate: float = 2e-3
    eval_examples: int = 256  # a task
    max_new_tokens: int = 128


TINY = BuildPlan(
    vocabulary=600, hidden=128, layers=2, heads=2, kv_heads=1, mlp=128,
    base_documents=40, base_row=64, base_batch=2, base_steps=2, adapter_examples=8, adapter_row=320,
    adapter_batch=1, adapter_steps=2, eval_examples=2, max_new_tokens=8,
)  # fmt: skip
