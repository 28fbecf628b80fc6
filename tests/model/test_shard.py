"""Shards of every format: side by side they are the whole, and what does not divide is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from inlaid.adapters.adapter import AdapterEntry
from inlaid.adapters.base import Outputs
from inlaid.adapters.peft import lay_out
from inlaid.adapters.shard import divide
from inlaid.checkpoint import BITS, Checkpoint, QuantSpec, dequantize, from_codes, quantization_config, to_tensors
from inlaid.config import ConfigError
from inlaid.kernels.backend import MODULES
from inlaid.model.shard import BY_INPUTS, Shard, ShardReader, check_divides, why_not
from inlaid.model.spec import ModelSpec, module_path, spec_from_config
from inlaid.tensorfiles import CheckpointError
from tests.examples import examples

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
LLAMA_3_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "num_hidden_layers": 80,
}  # fmt: skip
W4 = QuantSpec(4, 128, True, False)


def spec_of(**config: Any) -> ModelSpec:
    return spec_from_config({"model_type": "llama", "vocab_size": 32000, **config})


def tiny(heads: int, kv_heads: int, vocab_size: int = 61) -> ModelSpec:
    """Return a model of 32-wide heads whose inputs and outputs are multiples of 32 for any number of members."""
    return spec_of(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=64 * heads, num_attention_heads=heads, head_dim=32,
        num_key_value_heads=kv_heads, num_hidden_layers=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "would_do"),
    [
        (LLAMA_2_7B, [1, 2]),
        (LLAMA_3_70B, [1, 2, 4, 8, 16, 32]),
        ({**LLAMA_3_70B, "group": -1}, [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_models_divide_by_the_numbers_that_keep_heads_and_groups_whole(
    config: dict[str, int], would_do: list[int]
) -> None:
    settings = dict(config)
    quant = QuantSpec(4, settings.pop("group", 128), True, False)
    spec = spec_of(**settings)
    assert [n for n in range(1, 65) if why_not(spec, quant, n) is None] == would_do


def test_what_does_not_divide_is_refused_with_what_would_do() -> None:
    with pytest.raises(
        ConfigError, match=r"size 4: down_proj has 86 groups of 128 inputs, .* by 4; .* divided by 1, 2$"
    ):
        check_divides(spec_of(**LLAMA_2_7B), W4, 4)
    with pytest.raises(ConfigError, match=r"size 3: its 32 heads do not divide by 3; .* by 1, 2, 4, 8, 16, 32"):
        check_divides(spec_of(**LLAMA_2_7B), None, 3)
    with pytest.raises(ConfigError, match="3 key/value heads neither divide by 2 nor divide it"):
        check_divides(tiny(6, 3), None, 2)
    with pytest.raises(ConfigError, match=r"48 outputs of q_proj, of 3 bits, do not fill whole 32-bit words"):
        check_divides(
            spec_of(hidden_size=96, intermediate_size=192, num_attention_heads=2, num_hidden_layers=1),
            QuantSpec(3, -1, True, False),
            2,
        )
    check_divides(spec_of(**LLAMA_2_7B), W4, 2)


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelSpec, int]:
    """Draw a model and a number of members that divides it, with copies of key/value heads and without."""
    heads, kv_heads = draw(st.sampled_from([(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]))
    count = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
    return tiny(heads, kv_heads, draw(st.integers(count, 70))), count


def save(folder: Path, spec: ModelSpec, quant: QuantSpec | None, zeros: str = "gptq", g_idx: bool = True) -> Checkpoint:
    """Write one layer of a random model, quantized or not."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(spec.vocab_size, spec.hidden_size, generator=random)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    tensors["model.norm.weight"] = torch.randn(spec.hidden_size, generator=random)
    for module in MODULES:
        name, (outputs, inputs) = module_path(0, module), spec.module_shape(module)
        tensors[f"{name}.bias"] = torch.randn(outputs, generator=random)
        if quant is None:
            tensors[f"{name}.weight"] = torch.randn(outputs, inputs, generator=random)
            continue
        group = torch.arange(inputs) // (inputs if quant.group_size == -1 else quant.group_size)
        if quant.act_order:
            group = group[torch.randperm(inputs, generator=random)]
        shape, top = (quant.groups(inputs), outputs), 2**quant.bits
        codes = torch.randint(top, (inputs, outputs), generator=random)
        zero = torch.full(shape, top // 2) if quant.symmetric else torch.randint(top, shape, generator=random)
        linear = from_codes(codes, zero, torch.rand(shape, generator=random), group, quant.group_size, quant.bits)
        tensors |= to_tensors(name, linear, zeros)
    kept = {name: tensor for name, tensor in tensors.items() if g_idx or not name.endswith("g_idx")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / "model.safetensors")
    config = {} if quant is None else {"quantization_config": quantization_config(quant, 0.01, False, zeros)}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def joined(parts: list[torch.Tensor], module: str, spec: ModelSpec, outputs: int, inputs: int) -> torch.Tensor:
    """Join shards along the dimension that is divided; of copied key/value heads one is taken."""
    if module in BY_INPUTS:
        return torch.cat(parts, dim=inputs)
    if module in ("k_proj", "v_proj") and len(parts) > spec.num_kv_heads:
        parts = parts[:: len(parts) // spec.num_kv_heads]
    return torch.cat(parts, dim=outputs)


@given(
    models(), st.sampled_from(BITS), st.sampled_from((-1, 32)), st.booleans(), st.sampled_from(("gptq", "gptq_v2")),
    st.booleans(),
)  # fmt: skip
@examples(24)
def test_quantized_shards_side_by_side_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    model: tuple[ModelSpec, int],
    bits: int,
    group_size: int,
    symmetric: bool,
    zeros: str,
    g_idx: bool,
) -> None:
    spec, count = model
    quant = QuantSpec(bits, group_size, symmetric, False)
    checkpoint = save(tmp_path_factory.mktemp("gptq"), spec, quant, zeros, g_idx)
    assert why_not(spec, quant, count) is None
    members = [ShardReader(checkpoint, spec, Shard(index, count)) for index in range(count)]
    for module in MODULES:
        name = module_path(0, module)
        parts = [member.linear(name) for member in members]
        outputs, inputs = members[0].shard.spec(spec).module_shape(module)
        assert {(part.out_features, part.in_features) for part in parts} == {(outputs, inputs)}
        whole = joined([dequantize(part) for part in parts], module, spec, outputs=1, inputs=0)
        assert torch.equal(whole, dequantize(checkpoint.linear(name)))


@given(models())
@examples(20)
def test_dense_shards_side_by_side_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, model: tuple[ModelSpec, int]
) -> None:
    spec, count = model
    checkpoint = save(tmp_path_factory.mktemp("dense"), spec, None)
    members = [ShardReader(checkpoint, spec, Shard(index, count)) for index in range(count)]
    for module in MODULES:
        name = module_path(0, module)
        weights = [member.tensor(f"{name}.weight") for member in members]
        whole = joined(weights, module, spec, outputs=0, inputs=1)
        assert torch.equal(whole, checkpoint.tensor(f"{name}.weight"))
        biases = [member.tensor(f"{name}.bias") for member in members]
        bias = sum(biases) if module in BY_INPUTS else joined(biases, module, spec, outputs=0, inputs=1)
        assert torch.equal(bias, checkpoint.tensor(f"{name}.bias"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        parts = [member.tensor(name) for member in members]
        assert {len(part) for part in parts} == {members[0].shard.vocab_rows(spec)}
        whole = torch.cat(parts)
        assert torch.equal(whole[: spec.vocab_size], checkpoint.tensor(name))
        assert not whole[spec.vocab_size :].any()
    assert all(
        torch.equal(member.tensor("model.norm.weight"), checkpoint.tensor("model.norm.weight")) for member in members
    )


def test_a_member_reads_no_more_than_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny(4, 2)
    checkpoint = save(tmp_path, spec, QuantSpec(4, 32, False, False))
    read: list[int] = []
    original = Checkpoint.tensor

    def noting(self: Checkpoint, name: str, part: Any = None) -> torch.Tensor:
        tensor = original(self, name, part)
        read.append(tensor.nbytes)
        return tensor

    def total(reader: Any) -> int:
        read.clear()
        for module in MODULES:
            reader.linear(module_path(0, module))
        return sum(read)

    monkeypatch.setattr(Checkpoint, "tensor", noting)
    whole, half = total(checkpoint), total(ShardReader(checkpoint, spec, Shard(1, 2)))
    indices = sum(4 * spec.module_shape(module)[1] for module in MODULES)  # g_idx, which some members need whole
    assert half <= whole / 2 + indices


def test_act_order_is_served_where_inputs_are_not_divided_and_refused_with_the_reason_where_they_are(
    tmp_path: Path,
) -> None:
    spec = tiny(4, 2)
    checkpoint = save(tmp_path, spec, QuantSpec(4, 32, False, True))
    reader = ShardReader(checkpoint, spec, Shard(1, 2))
    assert reader.linear(module_path(0, "q_proj")).spec.act_order
    with pytest.raises(
        CheckpointError, match=r"o_proj\.g_idx puts inputs of different members into one group .act-order."
    ):
        reader.linear(module_path(0, "o_proj"))


def test_a_file_of_another_shape_is_named(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, tiny(4, 2), None)
    reader = ShardReader(checkpoint, tiny(2, 2), Shard(0, 2))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is \(128, 64\), the config says \(64, 64\)"):
        reader.tensor(f"{module_path(0, 'q_proj')}.weight")


@given(models(), st.lists(st.integers(1, 9), min_size=7, max_size=7), st.integers(0, 1 << 30))
@examples(30)
def test_members_adapters_give_the_whole_adapters_product(
    model: tuple[ModelSpec, int], ranks: list[int], seed: int
) -> None:
    """Each member's product with its part, summed where inputs are divided, is that of the whole: any ranks, with
    scales of outputs and biases."""
    spec, count = model
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    factors, outputs = {}, {}
    for site, (module, rank) in enumerate(zip(MODULES, ranks, strict=True)):
        wide, inputs = spec.module_shape(module)
        factors[site] = normal(rank, inputs), normal(wide, rank)
        outputs[site] = Outputs(normal(wide), normal(wide)) if rank % 2 else Outputs()
    whole = lay_out("id", "path", factors, dict.fromkeys(factors, 0.5), torch.float32, False, outputs)
    divided = divide(whole, spec, count)
    size = divided.num_elements
    assert divided.flat.numel() == count * size
    for entry, part in zip(whole.entries, divided.entries, strict=True):
        assert (entry.site, entry.rank, entry.scale) == (part.site, part.rank, part.scale)
        module = MODULES[entry.site]
        x = normal(3, spec.module_shape(module)[1])
        made = []
        for index in range(count):
            shard, flat = Shard(index, count), divided.flat[index * size : (index + 1) * size]
            here = shard.inputs(spec, module)
            made.append(product(part, flat, shard.spec(spec).module_shape(module), x[:, here.start : here.stop]))
        got = sum(made) if module in BY_INPUTS else joined(made, module, spec, outputs=1, inputs=0)
        want = product(entry, whole.flat, spec.module_shape(module), x)
        assert torch.allclose(got, want, atol=1e-4, rtol=1e-4)


def product(entry: AdapterEntry, flat: torch.Tensor, shape: tuple[int, int], x: torch.Tensor) -> torch.Tensor:
    """Return an adapter's product with x, and what it does to outputs."""
    a, b = entry.factors(flat, shape)
    out = x @ a.T @ b.T
    for start, change in ((entry.out_scale, torch.mul), (entry.out_bias, torch.add)):
        if start:
            out = change(out, flat[start : start + shape[0]])
    return out


def test_a_single_member_has_the_whole_model() -> None:
    assert Shard(0, 1).spec(tiny(4, 2)) == tiny(4, 2)
