"""The bundled adapters for SmolLM2: one for each of its tasks, fit for the base, and small enough for a clone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval import task
from inlaid.adapters.peft import read_adapter
from inlaid.model.spec import spec_from_config

ADAPTERS = task.ROOT / "models/smollm2/adapters"
BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NAMES = sorted(name for name in task.names() if task.load(name).base == "smollm2")


def test_each_task_has_its_adapter_and_there_are_no_others() -> None:
    assert len(NAMES) == 12
    assert sorted(folder.name for folder in ADAPTERS.iterdir()) == NAMES
    assert sum(file.stat().st_size for file in ADAPTERS.rglob("*")) < 12 << 20


@pytest.mark.parametrize("name", NAMES)
def test_each_is_read_for_the_base_and_says_how_it_was_trained(name: str) -> None:
    adapter = read_adapter(ADAPTERS / name, spec_from_config(BASE), torch.float16)
    assert (adapter.rank, len(adapter.entries)) == (8, 60)
    about = json.loads((ADAPTERS / name / "training.json").read_text())
    assert (about["task"], len(about["losses"])) == (name, about["settings"]["steps"])
    assert about["adapter"]["loss"] < about["base"]["loss"] / 5
    assert about["adapter"]["exact"] > 0.6
    assert f"| `{name}` |" in (Path(ADAPTERS).parent / "README.md").read_text()


def test_the_command_that_trains_them_has_their_settings() -> None:
    words = (task.ROOT / "models/train_smollm2.sh").read_text().replace("\\\n", " ").split()
    settings = json.loads((ADAPTERS / NAMES[0] / "training.json").read_text())["settings"]
    for flag in ("rank", "steps", "batch", "rate"):
        assert float(words[words.index(f"--{flag}") + 1]) == settings[flag]
    first = words.index("--targets") + 1
    assert words[first : first + len(settings["targets"])] == settings["targets"]
