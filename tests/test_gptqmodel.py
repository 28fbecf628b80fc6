"""Checkpoints of GPTQModel and of ours, each read by the other, which shares no code: logits are its torch kernel's.

Set INLAID_GPTQMODEL_PYTHON to the interpreter of an environment that holds it (third_party/gptqmodel/README.md).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inlaid.checkpoint import Checkpoint, dequantize
from tests.oracle.oracle import ask, family_config, load_engine, save_gptq, save_model, serve

PYTHON = os.environ.get("INLAID_GPTQMODEL_PYTHON")
FOLDER = Path(__file__).parents[1] / "third_party" / "gptqmodel"
DEMO = Path(__file__).parents[1] / "models" / "demo"
_PATIENCE = 900  # seconds; an import of GPTQModel alone takes a minute on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="GPTQModel is not installed here: set INLAID_GPTQMODEL_PYTHON"),
    pytest.mark.timeout(_PATIENCE),
]


def run(script: str, *arguments: str | Path, cwd: Path) -> None:
    """Run a script where GPTQModel is. It refuses to work with fewer workers than two, and compiles what it computes
    with, which takes minutes and gives the same numbers."""
    assert PYTHON is not None
    two = {"GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "2", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": ""}
    subprocess.run([PYTHON, FOLDER / script, *arguments], check=True, timeout=_PATIENCE, cwd=cwd, env=os.environ | two)


@pytest.mark.parametrize(("bits", "flags"), [(4, []), (4, ["--desc-act"]), (3, ["--desc-act"])])
def test_same_logits_as_gptqmodel(tmp_path: Path, bits: int, flags: list[str]) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    run("make_checkpoint.py", "--base", base, "--out", out, "--bits", str(bits), *flags, cwd=tmp_path)
    made = load_file(out / "expected.safetensors")
    (out / "expected.safetensors").unlink()
    weights = {name.removeprefix("weight/"): tensor for name, tensor in made.items() if name.startswith("weight/")}
    assert len(weights) == 14
    for name, weight_KN in weights.items():
        linear = Checkpoint(out).linear(name)
        assert (linear.bits, linear.group_size, linear.spec.act_order) == (bits, 32, bool(flags))
        assert torch.equal(dequantize(linear, torch.float16), weight_KN)
    same_logits(out, made, 0.01)


@pytest.mark.parametrize(("bits", "act_order"), [(4, False), (4, True), (3, True), (8, False)])
def test_gptqmodel_loads_what_inlaid_writes(tmp_path: Path, bits: int, act_order: bool) -> None:
    """Asymmetric, as `inlaid quantize` writes it by default."""
    base, out, answers = tmp_path / "base", tmp_path / "out", tmp_path / "answers.safetensors"
    save_model(base, family_config("llama"))
    save_gptq(out, base, tmp_path / "judged", bits, 32, act_order)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # GPTQModel reads no folder without
        shutil.copy(DEMO / "base" / name, out)
    run("load_checkpoint.py", out, answers, cwd=tmp_path)
    same_logits(out, load_file(answers), 0.05)  # these logits are larger


def same_logits(checkpoint: Path, made: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare the engine's logits with those that GPTQModel gave for the same tokens, in half precision."""
    engine, _ = load_engine(checkpoint)
    prompts = made["ids"].tolist()
    asked = [ask(str(i), prompt, max_tokens=1, prompt_logprobs=0) for i, prompt in enumerate(prompts)]
    answers = serve(engine, asked)
    for i, prompt in enumerate(prompts):
        wanted = made["logits"][i].log_softmax(-1)
        answer = answers[str(i)]
        assert answer.tokens == [int(wanted[-1].argmax())]
        found = torch.tensor([*answer.prompt_logprobs[1:], answer.logprobs[0]])
        following = torch.tensor([*prompt[1:], answer.tokens[0]])
        assert (found - wanted.gather(1, following[:, None])[:, 0]).abs().max() < tolerance
