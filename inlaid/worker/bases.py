"""Another base for an engine that runs: read, checked and prepared beside the one that serves, then put in its place.

device   both bases lie on the device until the old one is not used any more; the switch exchanges them (on a CPU by
         exchanging two lists, on a GPU by copying, so that captured graphs keep their addresses)
host     the new base is prepared layer by layer, one layer on the device at a time, and its packed weights wait in
         host memory; the switch copies them over the old ones while nothing runs
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from inlaid.adapters.gate import GateError, check
from inlaid.checkpoint import Checkpoint
from inlaid.config import EngineConfig
from inlaid.engine.engine import Engine
from inlaid.model.spec import read_spec
from inlaid.model.transformer import Block, Transformer
from inlaid.model.weights import load_blocks
from inlaid.runner.base_weights import (
    check_same,
    copy_in,
    exchange_contents,
    tensors_of,
    with_blocks,
)
from inlaid.runner.two_bases import TwoBases
from inlaid.worker.adapters import LoraAdapters
from inlaid.worker.loading import LoadedModel

log = logging.getLogger("inlaid.engine")

ON_DEVICE, ON_HOST = "device", "host"
_SPARE = 1.25  # times the weights' bytes that must be free on the device for both bases to lie there


class BaseError(ValueError):
    """Another base cannot be served; the message says why."""


@dataclass
class StagedBase:
    """A base that is ready to take the place of the one that serves."""

    folder: Path
    version: str
    where: str
    blocks: list[Block] = field(default_factory=list)  # on the device
    tensors: list[list[torch.Tensor]] = field(default_factory=list)  # in host memory, by layer
    adapters: dict[str, Any] = field(default_factory=dict)  # read, to be served with it, by name
    seconds: float = 0.0


class Bases:
    """The base that an engine serves, and the next."""

    def __init__(self, config: EngineConfig, model: LoadedModel, engine: Engine, adapters: LoraAdapters) -> None:
        self._config, self._model, self._engine, self._adapters = config, model, engine, adapters

    @property
    def version(self) -> str:
        return self._model.base_version

    def stage(self, folder: str, version: str, where: str, adapters: Mapping[str, str], rest: float) -> StagedBase:
        """Read and prepare a base and the adapters that come with it; nothing that is served changes. Runs on a thread
        and sleeps `rest` times as long as it works between layers. BaseError says why the base cannot be served.
        """
        began, path = time.monotonic(), Path(folder)
        checkpoint = Checkpoint(path)
        self._check(checkpoint, version)
        staged = StagedBase(path, version, self._where(where))
        device = self._model.runner.device
        side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side), torch.no_grad():
            since = time.monotonic()
            kernels = self._model.runner.model.kernels
            reader = Checkpoint(path, device if device.type == "cuda" else None)
            for layer, block in enumerate(load_blocks(reader, self._model.spec, kernels, device, self._model.dtype)):
                check_same(self._model.runner.model, layer, block)
                if staged.where == ON_DEVICE:
                    staged.blocks.append(block)
                else:
                    staged.tensors.append([_to_host(tensor) for tensor in tensors_of(block)])
                if side is not None:
                    side.synchronize()
                time.sleep(rest * (time.monotonic() - since))
                since = time.monotonic()
        staged.adapters = {name: self._read(name, path) for name, path in adapters.items()}
        if bound := [name for name, (adapter, _) in staged.adapters.items() if adapter.fits_one_base]:
            raise BaseError(
                f"adapters {', '.join(bound)} (DoRA) would be computed for the base that is served; load them after "
                "the switch"
            )
        self._check_gate(version, staged)
        staged.seconds = time.monotonic() - began
        return staged

    def exchange(self, staged: StagedBase) -> Transformer:
        """Serve a base that lies on the device; returns a model of the old one. Nothing may run meanwhile."""
        running = self._model.runner.model
        if getattr(self._model.runner, "graphs", ()):
            for block, other in zip(running.blocks, staged.blocks, strict=True):
                exchange_contents(block, other)
            self._synchronize()
            return with_blocks(running, staged.blocks)
        old = with_blocks(running, running.blocks)
        running.blocks = staged.blocks
        return old

    def copy_in(self, staged: StagedBase) -> None:
        """Serve a base that lies in host memory. Nothing may run meanwhile."""
        for block, tensors in zip(self._model.runner.model.blocks, staged.tensors, strict=True):
            copy_in(block, tensors)
        self._synchronize()

    def check_free(self) -> None:
        """Refuse to change the base while adapters are served that were computed for its weights."""
        store = self._model.adapters
        held = {name: store.identity(name) for name in store.names()}
        bound = sorted(name for name, identity in held.items() if identity and store.fits_one_base(identity))
        if bound:
            raise BaseError(
                f"adapters {', '.join(bound)} (DoRA) are computed for the base that is served; unload them, switch, "
                "and load them again"
            )

    def enter(self, staged: StagedBase) -> None:
        """Let the staged base's version and adapters be those that are served."""
        self._model.base.change(staged.folder, staged.version)
        known = self._model.adapters.names()
        for name, (adapter, seconds) in staged.adapters.items():
            if name not in known:
                self._adapters.install(name, adapter, False, seconds)

    def both(self, old: Transformer, staying: frozenset[str]) -> TwoBases:
        """Return a runner that runs the requests named on the old base."""
        return TwoBases(self._model.runner, old, staying)

    def _where(self, wanted: str) -> str:
        device = self._model.runner.device
        if wanted != "auto" or device.type != "cuda":
            return ON_DEVICE if wanted == "auto" else wanted
        need = sum(t.nbytes for block in self._model.runner.model.blocks for t in tensors_of(block))
        free, _ = torch.cuda.mem_get_info(device)
        return ON_DEVICE if free > _SPARE * need else ON_HOST

    def _check(self, checkpoint: Checkpoint, version: str) -> None:
        """Refuse files that are not what was checked, another model, and another part than the linears changed; and all
        where a kernel keeps a copy of the weights, which would go on computing with the old ones."""
        if self._model.runner.model.kernels.decode is not None:
            raise BaseError("the decode kernel keeps a copy of the base's weights; start with --decode-kernel layers")
        found = checkpoint.fingerprint()
        if found != version:
            raise BaseError(
                f"{checkpoint.path} is not the base that was checked: its files have changed (they were "
                f"{version[:12]}, they are {found[:12]}); it is not served"
            )
        self.check_free()
        spec = read_spec(checkpoint.path)
        if spec != self._model.spec:
            raise BaseError(f"{checkpoint.path} is another model than the one that is served")
        running = Checkpoint(self._model.folder)
        for name in checkpoint.dense:
            outside = not name.startswith("model.layers.")
            if outside and (name not in running or not torch.equal(checkpoint.tensor(name), running.tensor(name))):
                raise BaseError(f"{checkpoint.path} has another {name}; only the linears of the layers can be replaced")

    def _read(self, name: str, path: str) -> tuple[Any, float]:
        began = time.monotonic()
        try:
            return self._adapters.read_ungated(path), time.monotonic() - began
        except (ValueError, OSError) as error:
            raise BaseError(f"the adapter of task {name} cannot be served: {error}") from error

    def _check_gate(self, version: str, staged: StagedBase) -> None:
        """Ask the accuracy gate about every adapter that would be served on the new base."""
        config, store = self._config.adapters, self._model.adapters
        if not config.require_eval:
            return
        wanted = {name: store.identity(name) for name in store.names()}
        wanted |= {name: adapter.identity for name, (adapter, _) in staged.adapters.items()}
        refused = []
        for name, identity in sorted(wanted.items()):
            try:
                check(config.require_eval, version, identity or "", config.max_drop)
            except GateError as error:
                refused.append(f"{name}: {error}")
        if refused:
            raise BaseError(
                f"{len(refused)} adapters have no passing record for the new base, which --require-eval asks for: "
                f"{'; '.join(refused[:3])}; evaluate them on {staged.folder}, or unload them"
            )

    def _synchronize(self) -> None:
        if self._model.runner.device.type == "cuda":
            torch.cuda.synchronize(self._model.runner.device)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory, pinned where a GPU will read it, of the same layout."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)
