"""A runner that can be stepped, made from the configuration: weights, kernels, KV pages, room for adapters and the way
in which they come there. The engine process and LLM call it; which runner and kernels a device gets is decided here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from inlaid.adapters.adapter import Adapter
from inlaid.adapters.base import BaseLinears
from inlaid.adapters.device import Mirror
from inlaid.adapters.gate import check
from inlaid.adapters.loader import Loader, copy_seconds
from inlaid.adapters.modes import PIPELINED, why_not
from inlaid.adapters.peft import read_adapter
from inlaid.adapters.shard import divide
from inlaid.adapters.store import AdapterStore
from inlaid.adapters.tables import default_pool_elements
from inlaid.checkpoint import Checkpoint
from inlaid.config import AdapterConfig, ConfigError, EngineConfig
from inlaid.engine.request import Grammar
from inlaid.kernels import shared_group
from inlaid.kernels.arriving import Arriving
from inlaid.kernels.backend import AdapterPages, Kernels
from inlaid.kernels.cpu import cpu_kernels
from inlaid.kernels.library import BuildError
from inlaid.kernels.packed import native_kernels, packed_kernels
from inlaid.kernels.timed import StepSplit
from inlaid.kv_format import AUTO, KVFormat, kv_format
from inlaid.model.image import WeightImage
from inlaid.model.kv import KVLayout
from inlaid.model.shard import Shard, check_divides, quant_of
from inlaid.model.spec import ModelSpec, read_spec
from inlaid.model.weights import base_version, compute_dtype, fetch, load
from inlaid.runner.memory import count_blocks
from inlaid.runner.model_runner import ModelRunner
from inlaid.runner.unified import unify
from inlaid.text.grammar import GrammarCompiler, GrammarState
from inlaid.worker.lead import Lead, MemberProcess, StartMember

if TYPE_CHECKING:
    from inlaid.runner.cuda_runner import CudaRunner

log = logging.getLogger(__name__)


class ServedBase:
    """The base that is served now: its folder, and its version once that is hashed."""

    def __init__(self, folder: Path, version: Future[str]) -> None:
        self.folder = folder
        self._version = version

    @property
    def version(self) -> str:
        return self._version.result()

    def change(self, folder: Path, version: str) -> None:
        """Serve another base from now on."""
        known: Future[str] = Future()
        known.set_result(version)
        self.folder, self._version = folder, known


@dataclass(frozen=True)
class OpenedModel:
    """A model's folder before its weights are read; reading adapters needs no more."""

    folder: Path
    checkpoint: Checkpoint
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    base: ServedBase  # hashing takes seconds where its version is not known yet: beside the loading
    kv: KVFormat = AUTO
    members: int = 1  # of the tensor-parallel group


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be stepped, and the facts that the engine needs. `spec` is the whole model's; with a `lead` the
    runner has a shard of it."""

    runner: ModelRunner | CudaRunner
    spec: ModelSpec
    base: ServedBase
    dtype: torch.dtype
    max_model_len: int
    adapters: AdapterStore
    grammars: GrammarFactory
    lead: Lead | None = None

    @property
    def folder(self) -> Path:
        return self.base.folder

    @property
    def base_version(self) -> str:
        return self.base.version

    @property
    def num_blocks(self) -> int:
        return self.runner.num_blocks


class GrammarFactory:
    """A compiler made when the first constrained request comes, as reading a large tokenizer takes a second."""

    def __init__(self, folder: Path, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._arguments = (folder, vocab_size, eos_ids)
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()  # several threads compile

    def __call__(self, grammar: Grammar) -> GrammarState:
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(*self._arguments)
        return self._compiler.state(grammar)


def open_model(config: EngineConfig) -> OpenedModel:
    """Find the model that the configuration names, and read its description."""
    device = choose_device(config.device)
    folder = fetch(config.model)
    spec = read_spec(folder)
    checkpoint = Checkpoint(folder, device if device.type == "cuda" else None)
    members = config.tensor_parallel_size
    if members > 1:
        check_divides(spec, quant_of(checkpoint), members)
        _check_group(config, device)
    version = ThreadPoolExecutor(1, "hash-weights").submit(base_version, checkpoint)
    base = ServedBase(folder, version)
    kv = kv_format(config.cache.kv_cache_dtype)
    return OpenedModel(folder, checkpoint, spec, device, compute_dtype(config.dtype, spec, device), base, kv, members)


def _check_group(config: EngineConfig, device: torch.device) -> None:
    """Refuse a tensor-parallel group where there is none."""
    if device.type == "cuda":
        raise ConfigError(
            f"--tensor-parallel-size {config.tensor_parallel_size}: models are divided among processes on CPUs only so "
            "far; use --device cpu, or a replica on each GPU (inlaid cluster)"
        )
    reason = shared_group.why_not()
    if reason is not None:
        raise ConfigError(f"--tensor-parallel-size {config.tensor_parallel_size}: {reason}; serve with 1")


def adapter_reader(config: AdapterConfig, opened: OpenedModel) -> Callable[[str], Adapter]:
    """Return a function that reads an adapter for this model; several threads may call it."""

    ungated = ungated_reader(config, opened)

    def read(path: str) -> Adapter:
        adapter = ungated(path)
        if config.require_eval:
            check(config.require_eval, opened.base.version, adapter.identity, config.max_drop, opened.kv.name)
        return adapter

    return read


def ungated_reader(config: AdapterConfig, opened: OpenedModel) -> Callable[[str], Adapter]:
    """Return a function that reads an adapter for this model and does not ask the accuracy gate."""
    on_gpu = opened.device.type == "cuda"

    def read(path: str) -> Adapter:
        base = BaseLinears(opened.base.folder, scales_outputs=not on_gpu)  # the one that is served now
        adapter = read_adapter(path, opened.spec, opened.dtype, config.max_lora_rank, pin=on_gpu, base=base)
        return adapter if opened.members == 1 else divide(adapter, opened.spec, opened.members)

    return read


def load_model(
    config: EngineConfig,
    progress: bool = True,
    opened: OpenedModel | None = None,
    settle: Callable[[], object] = lambda: None,
    image: WeightImage | None = None,
    start_member: StartMember = MemberProcess,
) -> LoadedModel:
    """Load weights, from an image if one is given, and make KV pages, room for adapters and the runner. `settle`
    returns when no other thread uses the device any more, which capturing graphs does not allow. The other members of
    a tensor-parallel group are started by `start_member`."""
    opened = opened or open_model(config)
    if opened.members == 1:
        return _load(config, opened, progress, settle, image, None)
    at_folder = replace(config, model=str(opened.folder.resolve()), device=opened.device.type)
    lead = Lead(at_folder, choose_max_len(config.max_model_len, opened.spec), start_member)
    try:
        return _load(config, opened, progress, settle, None, lead)
    except BaseException:
        lead.close()
        raise


def _load(
    config: EngineConfig,
    opened: OpenedModel,
    progress: bool,
    settle: Callable[[], object],
    image: WeightImage | None,
    lead: Lead | None,
) -> LoadedModel:
    """Load a model, or the lead's shard of it."""
    device, dtype = opened.device, opened.dtype
    spec = opened.spec if lead is None else Shard(0, lead.count).spec(opened.spec)
    max_model_len = choose_max_len(config.max_model_len, spec)
    read = ungated_reader(config.adapters, opened)
    adapters = make_store(config.adapters, spec, device, dtype, config.cache.unified_memory, read, lead)
    kernels = choose_kernels(config, device, adapters.pages, spec)
    split = StepSplit(kernels) if device.type == "cpu" else None
    kernels = kernels if split is None else split.kernels
    arriving = make_arriving(config, spec, adapters, device)
    group = None if lead is None else lead.group
    model = load(image or opened.checkpoint, opened.spec, kernels, device, dtype, max_model_len, progress, group)
    if lead is not None:
        lead.wait_until_loaded()
    if device.type == "cuda":
        from inlaid.runner.cuda_runner import CudaRunner

        runner: ModelRunner | CudaRunner = CudaRunner(
            model, config, device, dtype, max_model_len, adapters, progress, arriving, settle
        )
    else:
        layout = KVLayout.of(spec, config.cache, dtype)
        num_blocks = count_blocks(config, layout, device, max_model_len)
        unified = None
        if config.cache.unified_memory:
            unified = unify(layout, config.cache, num_blocks, max_model_len, adapters, device)
        runner = ModelRunner(
            model, num_blocks, config.cache.block_size, device, dtype, adapters, config.seed, unified, arriving, split,
            layout.format, lead,
        )  # fmt: skip
        if lead is not None:
            lead.make_cache(num_blocks, 0 if unified is None else adapters.pages.pool.numel())
    return LoadedModel(
        runner=runner,
        spec=opened.spec,
        base=opened.base,
        dtype=dtype,
        max_model_len=max_model_len,
        adapters=adapters,
        grammars=GrammarFactory(opened.folder, spec.vocab_size, spec.eos_token_ids),
        lead=lead,
    )


def make_store(
    config: AdapterConfig,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    unified: bool = False,
    read: Callable[[str], Adapter] | None = None,
    mirror: Mirror | None = None,
) -> AdapterStore:
    """Make room for adapters (with unified memory, the least that they have) and the way in which they come there."""
    mode, link = config.adapter_mode, config.adapter_link_gbps
    if problem := why_not(mode):
        raise ConfigError(problem)
    if device.type == "cuda" and link:
        raise ConfigError("adapter_link_gbps stands in for a bus on machines without a GPU; leave it 0 on cuda")
    if min(link, config.max_cpu_adapter_gib, config.adapter_memory_gib) < 0 or config.adapter_timeout <= 0:
        raise ConfigError("adapter_link_gbps and sizes in GiB cannot be negative, and adapter_timeout must be above 0")
    return AdapterStore(
        spec,
        config.max_loras,
        pool_elements(config, spec, dtype, unified),
        device,
        dtype,
        config.max_cpu_loras,
        mode=mode,
        loader=Loader(link) if device.type != "cuda" and (link or mode == PIPELINED) else None,
        host_budget=int(config.max_cpu_adapter_gib * 2**30),
        read=read or partial(read_adapter, spec=spec, dtype=dtype, max_rank=config.max_lora_rank),
        max_seconds=config.adapter_timeout,
        shared=unified,
        mirror=mirror,
    )


def pool_elements(config: AdapterConfig, spec: ModelSpec, dtype: torch.dtype, unified: bool) -> int:
    """Return the elements of the pool of adapters, with unified memory those that adapters always have."""
    elements = int(config.adapter_memory_gib * 2**30) // dtype.itemsize
    return elements or default_pool_elements(spec, max(1, config.max_loras // 4) if unified else config.max_loras)


def make_arriving(config: EngineConfig, spec: ModelSpec, store: AdapterStore, device: torch.device) -> Arriving | None:
    """Make what the forward asks where steps start before their adapters are whole."""
    if config.adapters.adapter_mode != PIPELINED:
        return None
    return Arriving(store, spec.num_layers, copy_seconds(device) if device.type == "cuda" else None)


def choose_device(name: str) -> torch.device:
    """Return the device that a setting names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU here; use device auto or cpu")
    return torch.device(name)


def choose_kernels(config: EngineConfig, device: torch.device, pages: AdapterPages, spec: ModelSpec) -> Kernels:
    """Return the kernels that the configuration names; on a CPU there is one choice."""
    if device.type == "cuda":
        from inlaid.runner.cuda_kernels import cuda_kernels

        return cuda_kernels(config, pages, spec)
    if config.attention_backend not in ("auto", "reference"):
        name = config.attention_backend
        raise ConfigError(f"attention backend {name!r} is not available on {device.type}; use auto or reference")
    if config.linear_backend not in ("auto", "reference", "packed"):
        name = config.linear_backend
        raise ConfigError(f"linear backend {name!r} is not available on {device.type}; use auto, packed or reference")
    if config.decode_kernel == "one":
        raise ConfigError("decode kernel 'one' needs an NVIDIA GPU; use auto or layers")
    if compute_dtype(config.dtype, spec, device) != torch.float32:
        if config.linear_backend == "packed":
            raise ConfigError("linear backend 'packed' computes in float32; use --dtype float32, or another backend")
    elif config.linear_backend != "reference":
        try:
            make = packed_kernels if spec.quantized or config.linear_backend == "packed" else native_kernels
            return make(pages)
        except BuildError as error:
            if config.linear_backend == "packed":
                raise ConfigError(f"linear backend 'packed': {error}") from None
            more = "weights are dequantized, which takes eight times the memory, and " if spec.quantized else ""
            log.warning("%ssteps are slower: %s", more, error)
    return cpu_kernels(pages)


def choose_max_len(asked: int, spec: ModelSpec) -> int:
    """Return the most tokens of prompt plus output."""
    if asked > spec.max_len:
        raise ConfigError(f"max_model_len {asked} is above the {spec.max_len} positions that the model was made for")
    return asked or spec.max_len
