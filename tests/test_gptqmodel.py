"""A checkpoint made by GPTQModel, which shares no code with us: our engine gives the logits of its own torch kernel.

Set INLAID_GPTQMODEL_PYTHON to the interpreter of an environment that holds it (third_party/gptqmodel/README.md).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inlaid.checkpoint import Checkpoint, dequantize
from tests.oracle.oracle import ask, load_engine, serve

PYTHON = os.environ.get("INLAID_GPTQMODEL_PYTHON")
SCRIPT = Path(__file__).parents[1] / "third_party" / "gptqmodel" / "make_checkpoint.py"


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="GPTQModel is not installed here: set INLAID_GPTQMODEL_PYTHON")
@pytest.mark.parametrize(("bits", "flags"), [(4, []), (4, ["--desc-act"]), (3, ["--desc-act"])])
def test_same_logits_as_gptqmodel(tmp_path: Path, bits: int, flags: list[str]) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    assert PYTHON is not None
    command = [PYTHON, SCRIPT, "--base", base, "--out", out, "--bits", str(bits), *flags]
    two = {"GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "2", "PYTHONPATH": ""}  # fewer workers and it refuses
    subprocess.run(command, check=True, timeout=280, cwd=tmp_path, env=os.environ | two)
    made = load_file(out / "expected.safetensors")
    (out / "expected.safetensors").unlink()
    weights = {name.removeprefix("weight/"): tensor for name, tensor in made.items() if name.startswith("weight/")}
    assert len(weights) == 14
    for name, weight_KN in weights.items():
        linear = Checkpoint(out).linear(name)
        assert (linear.bits, linear.group_size, linear.spec.act_order) == (bits, 32, bool(flags))
        assert torch.equal(dequantize(linear, torch.float16), weight_KN)
    engine, _ = load_engine(out)
    prompts = made["ids"].tolist()
    asked = [ask(str(i), prompt, max_tokens=1, prompt_logprobs=0) for i, prompt in enumerate(prompts)]
    answers = serve(engine, asked)
    for i, prompt in enumerate(prompts):
        wanted = made["logits"][i].log_softmax(-1)
        answer = answers[str(i)]
        assert answer.tokens == [int(wanted[-1].argmax())]
        found = torch.tensor([*answer.prompt_logprobs[1:], answer.logprobs[0]])
        following = torch.tensor([*prompt[1:], answer.tokens[0]])
        assert (
            found - wanted.gather(1, following[:, None])[:, 0]
        ).abs().max() < 0.01  # its kernel is in half precision, ours is not
