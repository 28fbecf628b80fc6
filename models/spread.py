"""Gives a trained model the outlier channels that large models have, without changing what it computes.

Large language models carry some channels at many times the scale of others, and that is what makes rounding
their weights hard; a small one trained for minutes does not. So channels are rescaled by log-normal factors:
what produces a channel is multiplied, what consumes it divided. In exact arithmetic every output stays the
same; activations and columns of weights then differ in scale as they do in models worth quantizing.
Called by `build_demo` between training the base and training the adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import LlamaForCausalLM


def spread_channels(model: LlamaForCausalLM, deviation: float, seed: int) -> None:
    """Rescales the channels behind both norms, between up and down, and between value and output."""
    generator = torch.Generator().manual_seed(seed)
    heads = model.model.layers[0].self_attn

    def factors(count: int) -> torch.Tensor:
        return torch.exp(deviation * torch.randn(count, generator=generator)).to(model.device)

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            _rescale(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), factors)
            _rescale(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), factors)
            _rescale(mlp.up_proj, (mlp.down_proj,), factors)
            _rescale(attention.v_proj, (attention.o_proj,), factors, heads.num_key_value_groups, heads.head_dim)


def _rescale(
    producer: nn.Module,
    consumers: Sequence[nn.Linear],
    factors: Callable[[int], torch.Tensor],
    heads_per_value: int = 1,
    head_dim: int = 1,
) -> None:
    """Multiplies what `producer` puts out, divides what `consumers` take in; a value head feeds several heads."""
    weight = producer.get_parameter("weight")
    scale_O = factors(len(weight))
    weight.mul_(scale_O if weight.ndim == 1 else scale_O[:, None])
    scale_I = scale_O.view(-1, 1, head_dim).expand(-1, heads_per_value, -1).reshape(-1)
    for consumer in consumers:
        consumer.weight.div_(scale_I)
