"""Compare the bundled demo on the GPU with the CPU: greedy tokens of evaluation prompts of every task, each with its
adapter, and the CPU's lead where they first differ; in 16 bits, or rounded to 4 bits and served by one linear backend.
Stages of bench.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from inlaid.checkpoint import Checkpoint, QuantSpec, quantization_config, to_tensors
from inlaid.config import AdapterConfig, EngineConfig
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.quant.grid import Grid
from inlaid.quant.solver import round_to_nearest
from inlaid.worker.build import Loaded, build_engine
from perf.gpu import ROOT

MODEL = Path("models/demo/base")
ADAPTERS = Path("models/demo/adapters")
PROMPTS, TOKENS = 25, 48  # prompts of each task, and tokens of each answer
Answers = dict[str, tuple[list[int], list[float]]]  # by prompt: tokens, and the lead of each over the runner-up


def questions() -> list[tuple[str, str, list[int]]]:
    """Return (id, adapter, prompt tokens) of each prompt."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    found = []
    for adapter in sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir()):
        lines = Path(f"data/{adapter}/eval.jsonl").read_text().splitlines()[:PROMPTS]
        for index, line in enumerate(lines):
            ids = tokenizer.encode(json.loads(line)["prompt"]).ids
            found.append((f"{adapter}/{index}", adapter, ids))
    return found


def rounded(folder: Path, grid: Grid | None = None) -> Path:
    """Write the demo's base with every linear rounded to 4 bits: good enough to compare machines on."""
    base, grid = Checkpoint(MODEL), grid or Grid(4, 64, symmetric=True, clip=False)
    tensors: dict[str, Any] = {}
    for name in base.dense:
        value = base.tensor(name)
        if name.endswith("_proj.weight"):
            linear = round_to_nearest(value.float().t(), grid).packed(grid)
            tensors |= to_tensors(name.removesuffix(".weight"), linear)
        else:
            tensors[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    quantization = quantization_config(QuantSpec(grid.bits, grid.group_size, True, False), 0.0, False)
    (folder / "config.json").write_text(json.dumps({**base.config, "quantization_config": quantization}))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def answer(device: str, dtype: str, num_top: int | None, model: Path = MODEL, backend: str = "auto") -> Answers:
    """Answer every prompt; with `num_top`, note the lead of each token over the runner-up."""
    names = sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir())
    config = EngineConfig(
        model=str(model),
        device=device,
        dtype=dtype,
        adapters=AdapterConfig(max_loras=len(names), max_lora_rank=64),
        linear_backend=backend,
        deterministic=backend != "exllama",
    )
    loaded: Loaded = build_engine(config, {name: str(ADAPTERS / name) for name in names})
    for name, adapter, ids in questions():
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, logprobs=num_top)
        loaded.engine.add(NewRequest(id=name, prompt=ids, adapter=adapter, params=params))
    found: Answers = {}
    while loaded.engine.has_work:
        for output in loaded.engine.step():
            assert output.refusal is None, output.refusal
            tokens, leads = found.setdefault(output.id, ([], []))
            tokens += output.tokens
            leads += [one.top[0][1] - one.top[1][1] for one in output.logprobs or []]
    return found


def run(backend: str | None = None) -> dict[str, Any]:
    """Return the share of prompts with equal tokens, and the CPU's lead at every first difference.

    With a backend, compare the rounded demo on it."""
    model, chosen = (MODEL, "auto") if backend is None else (rounded(ROOT / "demo-4-bit"), backend)
    cpu = answer("cpu", "float32", 2, model)
    gpu = answer("cuda", "float16", None, model, chosen)
    again = answer("cuda", "float16", None, model, chosen)
    report = differences(cpu, gpu)
    report["same_on_the_gpu_twice"] = sum(gpu[name][0] == again[name][0] for name in gpu) / len(gpu)
    print(report, flush=True)
    return report


def differences(cpu: Answers, gpu: Answers) -> dict[str, Any]:
    """Return the prompts whose tokens differ, and by how much the CPU's token led where they first do."""
    differing = {}
    for name, (tokens, leads) in cpu.items():
        other = gpu[name][0]
        if other != tokens:
            place = next((i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), None)
            differing[name] = None if place is None else round(leads[place], 4)
    return {
        "prompts": len(cpu), "equal": len(cpu) - len(differing), "share": 1 - len(differing) / len(cpu),
        "lead_at_first_difference": differing,
    }  # fmt: skip
