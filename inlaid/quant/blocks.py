"""A Hugging Face model that runs one decoder block at a time, so that only one block's weights are ever in memory.

The model is built without weights. Sequences enter through `start`, which runs the model's own forward with every block
replaced by a recorder: masks, positions and rotary tables come from the model's own code, for any family. Then block
after block is loaded, run over everything, and dropped; `logits` ends it. Hessians, the gate and the sequential mode
all run through here, on full-precision and on quantized folders alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from inlaid.checkpoint import Checkpoint, dequantize
from inlaid.quant.calibration import Batch
from inlaid.quant.stopwatch import Stopwatch
from inlaid.tensorfiles import CheckpointError

_LOGIT_ROWS = 256  # tokens whose logits are in memory at a time


@dataclass(eq=False)
class Stream:
    """A batch on its way through the blocks; `hidden_BSD` is what enters the next one."""

    batch: Batch
    hidden_BSD: Tensor
    arguments: list[dict[str, Any]]  # of each block's call, besides the hidden state


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with and passes the hidden state on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_states


class BlockModel:
    """One model folder, opened for running by blocks on a device. `offload` keeps hidden states on the host."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device, self.dtype = torch.device(device), dtype
        self.stopwatch = stopwatch or Stopwatch(self.device)
        self.hold = torch.device("cpu") if offload else self.device
        config = AutoConfig.from_pretrained(checkpoint.path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.use_cache = False
        with torch.device("meta"):
            from_config: Any = AutoModelForCausalLM.from_config
            self.model: Any = from_config(config, dtype=dtype).eval()
        inner = self.model.model
        if not all(hasattr(inner, part) for part in ("layers", "embed_tokens", "norm", "rotary_emb")):
            raise CheckpointError(f"{checkpoint.path}: models of type {config.model_type} cannot be run by blocks")
        inner.rotary_emb = type(inner.rotary_emb)(config).to(self.device)
        self.blocks = list(inner.layers)
        self.num_blocks = len(self.blocks)
        self._check_names()

    @staticmethod
    def prefix(index: int) -> str:
        return f"model.layers.{index}."

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the linears of a block by their full name."""
        named = self.blocks[index].named_modules()
        return {self.prefix(index) + name: module for name, module in named if isinstance(module, nn.Linear)}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (outputs, inputs) of every linear of every block."""
        return {
            name: (linear.out_features, linear.in_features)
            for index in range(self.num_blocks)
            for name, linear in self.linears(index).items()
        }

    def tensor(self, name: str) -> Tensor:
        """Return a parameter in the compute type on the device, dequantized if the folder holds it quantized."""
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and name not in self.checkpoint and f"{linear}.qweight" in self.checkpoint:
            return dequantize(self.checkpoint.linear(linear), self.dtype).T.contiguous()
        return self.checkpoint.tensor(name).to(self.device, self.dtype)

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Load the block's weights for as long as the body runs."""
        block = self.blocks[index]
        names = list(block.state_dict())
        with self.stopwatch.part("reading"):
            block.load_state_dict({name: self.tensor(self.prefix(index) + name) for name in names}, assign=True)
        block.requires_grad_(False)
        try:
            yield block
        finally:
            block.to("meta")

    @torch.no_grad()
    def start(self, batches: list[Batch]) -> list[Stream]:
        """Embed the batches and note how each block wants to be called for them."""
        inner = self.model.model
        recorders = [_Recorder(block) for block in self.blocks]
        inner.layers = nn.ModuleList(recorders)
        norm, inner.norm = inner.norm, nn.Identity()
        inner.embed_tokens.load_state_dict({"weight": self.tensor("model.embed_tokens.weight")}, assign=True)
        streams = []
        try:
            for batch in batches:
                hidden_BSD = inner(input_ids=batch.ids_BS.to(self.device), use_cache=False).last_hidden_state
                streams.append(Stream(batch, hidden_BSD.to(self.hold), [recorder.arguments for recorder in recorders]))
        finally:
            inner.layers, inner.norm = nn.ModuleList(self.blocks), norm
            inner.embed_tokens.to("meta")
        return streams

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, stream: Stream) -> Tensor:
        """Run a loaded block on a stream's hidden state and return the result; the stream is left as it is."""
        output: Any = block(stream.hidden_BSD.to(self.device), **stream.arguments[index])
        hidden_BSD: Tensor = output[0] if isinstance(output, tuple) else output
        self.stopwatch.rest()
        return hidden_BSD.to(self.hold)

    @contextmanager
    def head(self) -> Iterator[None]:
        """Load the final norm and the output matrix for as long as the body runs."""
        tied = "lm_head.weight" not in self.checkpoint
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        self.model.model.norm.load_state_dict({"weight": self.tensor("model.norm.weight")}, assign=True)
        self.model.lm_head.weight = nn.Parameter(self.tensor(head), requires_grad=False)
        try:
            yield
        finally:
            self.model.model.norm.to("meta")
            self.model.lm_head.to("meta")

    @torch.no_grad()
    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Return the logits of hidden states that have passed every block; only inside `head()`."""
        logits_BSV: Tensor = self.model.lm_head(self.model.model.norm(hidden_BSD.to(self.device)))
        return logits_BSV

    def losses(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Return the loss of each token, from logits of few tokens at a time: those of a batch of a large vocabulary
        take gigabytes. Only inside `head()`."""
        losses_T = torch.empty(len(targets_T), device=targets_T.device)
        for start in range(0, len(targets_T), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            logits_PV = self.logits(hidden_TD[part]).float()
            losses_T[part] = nn.functional.cross_entropy(logits_PV, targets_T[part], reduction="none")
        return losses_T

    def _check_names(self) -> None:
        for name in self.model.state_dict():
            linear = name.removesuffix(".weight")
            if name not in self.checkpoint and f"{linear}.qweight" not in self.checkpoint and name != "lm_head.weight":
                raise CheckpointError(f"{self.checkpoint.path} has no tensor {name}, which its configuration asks for")
