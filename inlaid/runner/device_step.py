"""A step on a GPU: from `meta` to sampled tokens over fixed buffers, without allocation, so that it can be captured.

The runner owns one `DeviceStep`. What outlives a step lies here too: block tables and the newest token by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inlaid.kernels import lora_triton
from inlaid.kernels.arriving import Arriving
from inlaid.kernels.backend import Product
from inlaid.kernels.context import OnDevice, StepContext
from inlaid.kernels.decode import DecodeKernel
from inlaid.kernels.sample_triton import Sampler
from inlaid.layers.linear import PARTS_ROWS
from inlaid.model.kv import KVCache
from inlaid.model.transformer import LastSum, Transformer
from inlaid.runner.decode import surroundings
from inlaid.runner.layout import Layout
from inlaid.runner.workspace import fixed_memory


class DeviceStep:
    """The transformer, then sampling, over the buffers of the largest step."""

    def __init__(
        self,
        model: Transformer,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        max_rank: int,
        meta_size: int,
        device: torch.device,
        dtype: torch.dtype,
        max_queries: int = 1,
        decode: DecodeKernel | None = None,
    ) -> None:
        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.model, self.max_rank = model, max_rank
        self.meta = integers(meta_size)
        self.tables = integers(max_rows + 1, max_blocks)  # blocks by row; the last row is for padding
        self.newest = integers(max_rows + 1)  # each row's newest token
        self.sampled = integers(max_rows)
        self.workspace = fixed_memory(model, max_tokens, max_rows, max_blocks, max_rank, device, dtype, max_queries)
        self.sampler = Sampler(max_rows, model.spec.vocab_size, device)
        self.cache: KVCache = []
        self.decode = decode  # the kernel of small steps

    def set_cache(self, cache: KVCache) -> None:
        """Compute on this cache from now on. Graphs captured before keep theirs."""
        self.cache = cache
        if self.decode is not None:
            self.decode.bind(surroundings(self.model), cache)

    def context(self, layout: Layout, adapters: int, arriving: Arriving | None = None) -> StepContext:
        """Return the step that lies in `meta`, with adapters up to this level."""

        def piece(name: str) -> torch.Tensor:
            return layout.view(self.meta, name)

        return StepContext(
            ids_T=piece("ids"),
            positions_T=piece("positions"),
            kv_slots_T=piece("slots"),
            block_tables=self.tables,
            context_lens_S=piece("lengths"),
            logit_rows_L=piece("logit_rows"),
            block_size=self.cache[0][0].shape[1],
            num_decodes=layout.decodes,
            num_prefills=layout.prefills,
            adapters=adapters,
            few_queries=layout.queries,
            on_device=OnDevice(
                sources_T=piece("sources"),
                newest_R=self.newest,
                table_rows_S=piece("table_rows"),
                starts_P1=piece("starts"),
                tiles_2N=piece("tiles").view(2, layout.tiles),
                adapter_slots_T=piece("adapters"),
                segments=lora_triton.Segments(piece("segments"), piece("order"), layout.segments, layout.block_rows),
                token_rows_T=piece("token_rows"),
                leaders_T=piece("leaders"),
            ),
            arriving=arriving,
        )

    def run(self, layout: Layout, adapters: int, blocks: Sequence[int] | None = None) -> None:
        """Compute the step in `meta` and sample; or with these blocks only, to compile kernels."""
        step = self.context(layout, adapters)
        if blocks is None:
            last = self.forward(layout, step)
        else:
            last = self.model.forward(step, self.cache, self.workspace, blocks)
        self.sample(layout, step, last)

    def forward(self, layout: Layout, step: StepContext) -> LastSum:
        """Run all blocks, as one kernel where there is one for such a step."""
        if self.decode is None or not self.in_one_kernel(layout) or step.arriving or step.vocabulary:
            return self.model.forward(step, self.cache, self.workspace)
        product, residual = (
            self.workspace.take(name, layout.tokens, self.model.spec.hidden_size) for name in ("norm", "residual")
        )
        self.decode.run(step, product, residual)
        return LastSum(Product(product), residual)

    def in_one_kernel(self, layout: Layout) -> bool:
        """Return whether steps of this layout are one kernel."""
        return self.decode is not None and not layout.is_long and layout.rows in self.decode.longest

    def sample(self, layout: Layout, step: StepContext, last: LastSum) -> None:
        """Compute the logits of the wanted rows and sample their tokens into `sampled` and `newest`."""
        hidden_LD = self.model.hidden(last, self.workspace, step.logit_rows_L)
        logits_LV = self.model.logits(hidden_LD, self.workspace)
        if step.vocabulary is not None:
            step.vocabulary.head(hidden_LD, logits_LV, step.logit_rows_L)

        def piece(name: str) -> torch.Tensor:
            return layout.view(self.meta, name)

        self.sampler.sample(
            logits_LV, piece("temperature"), piece("top_k"), piece("top_p"), piece("min_p"), piece("keys"),
            piece("drawn_at"), piece("rows"), self.newest, self.sampled[: layout.samples],
        )  # fmt: skip

    def logits(self, count: int) -> torch.Tensor:
        """Return the logits [count, V] of the step computed last."""
        return self.workspace.take("logits", count, self.model.spec.vocab_size)

    def leaves_parts(self, layout: Layout) -> bool:
        """Return whether norms may have parts to add, as many as they are compiled for."""
        return self.workspace.room("parts") > 0 and layout.tokens <= PARTS_ROWS
