"""PEFT adapters with random weights, for measuring with more adapters than anyone has trained.

`python -m perf.random_adapters BASE OUT --count 100 --ranks 8 16` writes folders; the runner makes the ones a
template asks for. Weights are small, so that answers stay text; each adapter differs from every other.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from inlaid.flags import Parser
from inlaid.progress import Bar

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class RandomAdapters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The i-th adapter has rank ranks[i % len(ranks)]."""

    count: int
    ranks: tuple[int, ...] = (16,)
    targets: tuple[str, ...] = TARGETS
    scale: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or not self.ranks or any(rank < 1 for rank in self.ranks) or not self.targets:
            raise ValueError("random adapters need a count, ranks of at least 1 and targets")


def shapes(config: dict[str, Any]) -> dict[str, tuple[str, int, int]]:
    """Map each module to (path inside a layer, inputs, outputs), from a Llama-like config.json."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = head * config["num_attention_heads"]
    keys = head * config.get("num_key_value_heads", config["num_attention_heads"])
    return {
        "q_proj": ("self_attn.q_proj", hidden, queries),
        "k_proj": ("self_attn.k_proj", hidden, keys),
        "v_proj": ("self_attn.v_proj", hidden, keys),
        "o_proj": ("self_attn.o_proj", queries, hidden),
        "gate_proj": ("mlp.gate_proj", hidden, mlp),
        "up_proj": ("mlp.up_proj", hidden, mlp),
        "down_proj": ("mlp.down_proj", mlp, hidden),
    }


def folder_for(base: str, spec: RandomAdapters, root: Path) -> Path:
    """Name the folder of a base and a spec; `count` is not in the name, so that grids can share it."""
    key = msgspec.json.encode(msgspec.structs.replace(spec, count=1)) + base.encode()
    return root / hashlib.sha256(key).hexdigest()[:12]


def paths_for(base: str, spec: RandomAdapters, root: Path) -> list[tuple[str, str]]:
    """Name and path of each, whether or not they have been written yet."""
    return [(name, str(folder_for(base, spec, root) / name)) for name in names(spec)]


def names(spec: RandomAdapters) -> list[str]:
    return [f"random-{i:04d}-r{spec.ranks[i % len(spec.ranks)]}" for i in range(spec.count)]


def make_adapters(base: Path, spec: RandomAdapters, folder: Path, progress: bool = True) -> list[tuple[str, str]]:
    """Write missing adapters and return name and path of each; a folder appears whole or not at all."""
    config = _config(base)
    made = []
    for index, name in enumerate(Bar(names(spec), desc="random adapters", disable=not progress)):
        path = folder / name
        if not (path / "adapter_config.json").is_file():
            _write_adapter(config, spec, index, path)
        made.append((name, str(path)))
    return made


def bytes_to_make(base: Path, spec: RandomAdapters, folder: Path) -> int:
    """Count the bytes of the adapters that are still to be made, without their headers."""
    config = _config(base)
    known = shapes(config)
    a_rank = 2 * config["num_hidden_layers"] * sum(known[target][1] + known[target][2] for target in spec.targets)
    missing = [i for i, name in enumerate(names(spec)) if not (folder / name / "adapter_config.json").is_file()]
    return sum(spec.ranks[i % len(spec.ranks)] * a_rank for i in missing)


def _config(base: Path) -> dict[str, Any]:
    file = base / "config.json"
    if not file.is_file():
        raise ValueError(f"random adapters need the shape of the base: {file} does not exist")
    return dict(json.loads(file.read_text()))


def _write_adapter(config: dict[str, Any], spec: RandomAdapters, index: int, path: Path) -> None:
    from safetensors.numpy import save_file

    rank = spec.ranks[index % len(spec.ranks)]
    rng = np.random.default_rng([spec.seed, index])
    known = shapes(config)
    unknown = [target for target in spec.targets if target not in known]
    if unknown:
        raise ValueError(f"unknown target {unknown[0]}: use {', '.join(known)}")
    tensors: dict[str, Any] = {}
    for layer in range(config["num_hidden_layers"]):
        for target in spec.targets:
            inside, inputs, outputs = known[target]
            prefix = f"base_model.model.model.layers.{layer}.{inside}"
            draw = rng.standard_normal((rank, inputs), dtype=np.float32)
            tensors[f"{prefix}.lora_A.weight"] = (draw / np.sqrt(inputs)).astype(np.float16)
            draw = rng.standard_normal((outputs, rank), dtype=np.float32)
            tensors[f"{prefix}.lora_B.weight"] = (draw * spec.scale).astype(np.float16)
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    adapter |= {"target_modules": list(spec.targets), "lora_dropout": 0.0, "inference_mode": True}
    adapter |= {"base_model_name_or_path": None, "fan_in_fan_out": False, "modules_to_save": None}
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(partial / "adapter_model.safetensors"))
    (partial / "adapter_config.json").write_text(json.dumps(adapter, indent=1))
    partial.rename(path)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="perf.random_adapters", description="Write random PEFT adapters.")
    parser.add_argument("base", type=Path, help="the base model's folder (its config.json is read)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        spec = RandomAdapters(arguments.count, tuple(arguments.ranks), tuple(arguments.targets), seed=arguments.seed)
        make_adapters(arguments.base, spec, arguments.out)
    except (ValueError, OSError, KeyError) as error:
        print(f"perf.random_adapters: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
