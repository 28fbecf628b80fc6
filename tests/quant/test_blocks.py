"""Running by blocks against the whole model of transformers with the adapter of peft; Hessians against plain hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from inlaid.adapters.adapter import Adapter, AdapterError
from inlaid.adapters.peft import read_adapter
from inlaid.checkpoint import Checkpoint
from inlaid.model.spec import read_spec
from inlaid.quant.blocks import BlockModel
from inlaid.quant.calibration import Sequence, batches
from inlaid.quant.hessian import advance, block_hessians
from tests.quant.tiny import FAMILIES, VOCABULARY, write_adapter, write_base


def read(path: Path, base: Path) -> Adapter:
    """Read an adapter as the quantizer does."""
    return read_adapter(path, read_spec(base), torch.float32)


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sequences(seed: int = 0) -> tuple[Sequence, ...]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (7, 12, 20, 20)
    return tuple(Sequence(tuple(torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()), 3) for n in lengths)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_by_blocks_are_those_of_the_whole_model(tmp_path: Path, family: str, tied: bool) -> None:
    base = write_base(tmp_path / "base", family, tied=tied)
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}, "use_rslora": tied}
    path = write_adapter(tmp_path / "adapter", base, 1, ALL, **patterns)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()
    model, adapter = BlockModel(Checkpoint(base)), read(path, base)
    streams = model.start(batches(sequences()))
    for index in range(model.num_blocks):
        with model.loaded(index) as block:
            advance(model, block, index, adapter, streams)
    with model.head(), torch.no_grad():
        for stream in streams:
            for row, weight in zip(range(len(stream.hidden_BSD)), stream.batch.weight_BS, strict=True):
                length = int((weight > 0).sum())
                expected = whole(input_ids=stream.batch.ids_BS[row : row + 1, :length]).logits[0]
                torch.testing.assert_close(
                    model.logits(stream.hidden_BSD[row, :length]), expected, atol=2e-5, rtol=1e-4
                )


def test_no_weights_are_left_behind(tmp_path: Path) -> None:
    """One block at a time: after its turn every parameter is without memory again."""
    model = BlockModel(Checkpoint(write_base(tmp_path / "base")))
    streams = model.start(batches(sequences()))
    for index in range(model.num_blocks):
        with model.loaded(index) as block:
            held = [name for name, parameter in model.model.named_parameters() if not parameter.is_meta]
            assert held
            assert all(name.startswith(model.prefix(index)) for name in held)
            advance(model, block, index, None, streams)
    assert all(parameter.is_meta for parameter in model.model.parameters())


@pytest.mark.parametrize("highlight", [1.0, 4.0])
def test_hessians_are_weighted_second_moments_with_the_adapter(tmp_path: Path, highlight: float) -> None:
    base = write_base(tmp_path / "base")
    path = write_adapter(tmp_path / "adapter", base, 1, ALL)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()
    name = "model.layers.2.mlp.down_proj"
    seen: list[torch.Tensor] = []
    target = whole.get_submodule(f"base_model.model.{name}.base_layer")
    target.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double()))
    expected, total = torch.zeros(96, 96, dtype=torch.float64), 0.0
    for sequence in sequences():
        with torch.no_grad():
            whole(input_ids=torch.tensor([sequence.ids]))
        weight = torch.ones(len(sequence.ids), dtype=torch.float64)
        weight[sequence.answer :] = highlight
        expected += (seen[-1] * weight[:, None]).T @ seen[-1]
        total += float(weight.sum())
    model, adapter = BlockModel(Checkpoint(base)), read(path, base)
    streams = model.start(batches(sequences(), highlight))
    for index in range(model.num_blocks):
        with model.loaded(index) as block:
            sites = block_hessians(model, block, index, adapter, streams, advance=True)
    assert sites.total == total
    found = sites.hessians()
    assert [len(sites.members[site]) for site in found] == [3, 1, 2, 1]  # q k v; o; gate up; down
    torch.testing.assert_close(found[name].double(), expected / total, atol=1e-4, rtol=1e-4)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    good = write_adapter(tmp_path / "good", base, 1)
    wide, flat = replace(read_spec(base), intermediate_size=192), replace(read_spec(base), num_layers=2)
    with pytest.raises(AdapterError, match="for another base"):
        read_adapter(good, wide, torch.float32)
    with pytest.raises(AdapterError, match="no such module"):
        read_adapter(good, flat, torch.float32)
    dora = write_adapter(tmp_path / "dora", base, 1, use_dora=True)
    with pytest.raises(AdapterError, match="DoRA"):
        read(dora, base)
    head = write_adapter(tmp_path / "head", base, 1, ("q_proj",), modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"the head \(lm_head\), which is computed for serving only"):
        read(head, base)
    with pytest.raises(AdapterError, match="not a PEFT adapter"):
        read(tmp_path / "nowhere", base)


def test_identity_follows_weights_and_configuration(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    first = read(write_adapter(tmp_path / "a", base, 1), base).identity
    assert read(write_adapter(tmp_path / "b", base, 2), base).identity != first
    assert read(write_adapter(tmp_path / "c", base, 1, lora_alpha=16), base).identity != first
