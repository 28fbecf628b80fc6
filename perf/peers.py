"""Flags of peers' command lines: a command that they would refuse is refused before anything is started.

The names are those of `vllm serve --help` (0.26) and of S-LoRA's `slora.server.api_server --help` with VTC's additions,
as far as a measurement may want them. Their parsers take prefixes of some of them; only whole names are sent.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

VLLM = frozenset(
    "host port model tokenizer tokenizer-mode trust-remote-code dtype quantization load-format max-model-len seed "
    "gpu-memory-utilization kv-cache-dtype num-gpu-blocks-override block-size enable-prefix-caching "
    "no-enable-prefix-caching swap-space cpu-offload-gb max-num-seqs max-num-batched-tokens enable-chunked-prefill "
    "no-enable-chunked-prefill scheduling-policy enforce-eager tensor-parallel-size pipeline-parallel-size "
    "data-parallel-size enable-lora lora-modules max-loras max-lora-rank max-cpu-loras lora-dtype fully-sharded-loras "
    "served-model-name api-key chat-template compilation-config disable-log-stats generation-config "
    "async-scheduling".split()
)
SLORA = frozenset(
    "host port model_dir tokenizer_mode max_total_token_num batch_max_tokens eos_id running_max_req_size tp "
    "max_req_input_len max_req_total_len nccl_port mode trust_remote_code disable_log_stats log_stats_interval "
    "lora-dirs dummy swap pool-size-lora prefetch prefetch-size scheduler profile batch-num-adapters enable-abort "
    "no-lora-swap no-lora-compute no-kernel no-mem-pool bmm no-lora fair-weights rate-limit predict-range "
    "cost-func".split()
)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank


def spelled(flag: str, known: frozenset[str], whose: str) -> str:
    """Return a flag as its parser spells it, with dashes or underscores. ValueError: it has none like it."""
    plain = flag.replace("_", "-")
    for name in known:
        if name.replace("_", "-") == plain:
            return name
    close = difflib.get_close_matches(plain, known, n=1)
    raise ValueError(f"{whose} has no flag --{plain}{f': did you mean --{close[0]}?' if close else ''}")


def flags(arguments: Mapping[str, Any], known: frozenset[str], whose: str) -> list[str]:
    """Return arguments as flags: true gives the flag alone, false leaves it out."""
    found: list[str] = []
    for name, value in arguments.items():
        flag = f"--{spelled(name, known, whose)}"
        if value is not False:
            found += [flag] if value is True else [flag, str(value)]
    return found


def largest_rank(adapters: Sequence[tuple[str, str]]) -> int:
    """Return the largest rank of adapters whose folders are here, of patterns too; 0: none is here."""
    most = 0
    for _, path in adapters:
        file = Path(path) / "adapter_config.json"
        if file.is_file():
            config = json.loads(file.read_text())
            most = max([most, int(config.get("r", 0)), *map(int, (config.get("rank_pattern") or {}).values())])
    return most


def lora_flags(adapters: Sequence[tuple[str, str]], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return vLLM's sizes for these adapters where none are given: all of them in a batch, at their largest rank.

    Its own defaults are one adapter a batch, and ranks of 16 at most."""
    asked = {name.replace("_", "-") for name in given}
    rank = largest_rank(adapters)
    fitting = next((size for size in RANKS if size >= rank), None)
    if fitting is None:
        raise ValueError(f"an adapter has rank {rank}; vLLM serves up to {RANKS[-1]}")
    sizes = {"max-loras": len(adapters), "max-cpu-loras": len(adapters), "max-lora-rank": fitting if rank else 0}
    return MappingProxyType({name: size for name, size in sizes.items() if size and name not in asked})
