"""Outlier channels: the outputs stay, the weights do not."""

from __future__ import annotations

import pytest
import torch

from models.plan import BuildPlan
from models.spread import spread_channels
from models.training import new_model

PLAN = BuildPlan(vocabulary=64, hidden=128, layers=2, heads=4, kv_heads=2, mlp=96)
SPECIALS = {"<|pad|>": 0, "<|bos|>": 1, "<|end|>": 2}


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (4, 1)])
def test_outputs_stay_and_channels_spread(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    plan = BuildPlan(vocabulary=64, hidden=128, layers=2, heads=heads, kv_heads=kv_heads, mlp=96)
    model = new_model(plan, SPECIALS).eval()
    ids = torch.randint(64, (3, 17))
    before = model(input_ids=ids).logits.detach()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    spread_channels(model, 0.8, seed=1)
    torch.testing.assert_close(model(input_ids=ids).logits.detach(), before, atol=2e-5, rtol=1e-4)
    untouched = {name for name, weight in model.named_parameters() if torch.equal(weight, weights[name])}
    assert untouched == {"model.embed_tokens.weight", "model.norm.weight"}
    norm = model.model.layers[0].input_layernorm.weight.detach()
    assert float(norm.max() / norm.min()) > 5


def test_no_deviation_changes_nothing() -> None:
    model = new_model(PLAN, SPECIALS)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    spread_channels(model, 0.0, seed=1)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
