"""The runner of a group's members other than the lead: it computes the same steps on its shard, and samples nothing."""

from __future__ import annotations

import torch

from inlaid.kernels.workspace import FreshMemory
from inlaid.model.kv import KVCache
from inlaid.model.transformer import Transformer
from inlaid.runner.eager_step import EagerStep


class FollowingRunner:
    """A shard of a model and its KV pages."""

    def __init__(
        self, model: Transformer, cache: KVCache, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.cache, self.block_size, self.device = model, cache, block_size, device
        self._memory = FreshMemory(device, dtype)

    def run(self, step: EagerStep) -> None:
        """Compute a step; make the same exchanges as the lead's runner, which has the logits."""
        model, memory = self.model, self._memory
        with torch.inference_mode():
            context = step.context(self.block_size, self.device)
            last = model.forward(context, self.cache, memory)
            if len(step.logit_rows):
                model.logits(model.hidden(last, memory, context.logit_rows_L), memory)
            if len(step.scored):
                hidden_TD = model.hidden(last, memory)
                for first, count in step.scored.tolist():
                    model.logits(hidden_TD[first : first + count], memory)
