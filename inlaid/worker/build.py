"""`build_engine`: an engine that can be stepped, with the adapters it serves, made from a configuration. The engine
process, LLM and the benchmarks call it; it imports torch only when it is called.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from inlaid.config import EngineConfig
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.request import Grammar
from inlaid.worker.adapters import Adapters, LoraAdapters, Readers
from inlaid.worker.checks import check_settings
from inlaid.worker.messages import ModelInfo

if TYPE_CHECKING:
    from inlaid.kernels.timed import StepSplit
    from inlaid.worker.bases import Bases
    from inlaid.worker.lead import Lead
    from inlaid.worker.loading import LoadedModel

log = logging.getLogger("inlaid.engine")

_CPU_STEP_MS = 50
_AHEAD = 16  # adapters read and not yet taken at start-up, where host memory does not hold them all


@dataclass
class Loaded:
    """An engine that can be stepped, what it serves, and its adapters."""

    engine: Engine
    model: ModelInfo
    adapters: Adapters
    left_out: dict[str, str] = field(default_factory=dict)
    compile_grammar: Callable[[Grammar], object] | None = (
        None  # and keep it for Engine.add; may take seconds, on a thread
    )
    bases: Bases | None = None  # how another base comes; None: it cannot
    split: StepSplit | None = None  # of the time of steps; None: it is not measured
    floor: Callable[[], dict[str, float]] = dict  # of a step's time
    prepare_image: Callable[[str], Callable[[], int]] | None = (
        None  # see worker/images.py; None: it has no whole weights
    )
    lead: Lead | None = None  # of a tensor-parallel group


def build_engine(config: EngineConfig, adapters: Mapping[str, str], *, strict: bool = True, image: str = "") -> Loaded:
    """Load the model and the adapters named, from a weight image if there is one. With strict, an adapter that cannot
    be served raises; otherwise it is left out and named."""
    began = time.monotonic()
    check_settings(config, adapters.values() if strict else ())
    from inlaid.runner.floor import floor
    from inlaid.worker.bases import Bases
    from inlaid.worker.images import open_image, prepare_image, reader_from
    from inlaid.worker.loading import adapter_reader, load_model, open_model, ungated_reader

    _leave_a_core_to_http(config.tensor_parallel_size)
    imported = time.monotonic()
    opened = open_model(config)
    read = adapter_reader(config.adapters, opened)
    mapped = open_image(config, opened, image) if opened.members == 1 else None
    ahead = _AHEAD if config.adapters.max_cpu_adapter_gib else None
    with Readers(adapters, reader_from(mapped, read), ahead) as readers:
        model = load_model(config, opened=opened, settle=readers.wait, image=mapped)
        made = time.monotonic()
        engine = make_engine(
            _with_step_time(config, model),
            model.runner,
            time.monotonic,
            num_blocks=model.num_blocks,
            max_model_len=model.max_model_len,
            adapters=model.adapters,
            eos_ids=model.spec.eos_token_ids,
            base_version=model.base_version,
            make_grammar=model.grammars,
            pool=model.runner.pool,
        )
        directory = LoraAdapters(config, model, read, ungated_reader(config.adapters, opened))
        alone = model.lead is None
        loaded = Loaded(
            engine,
            _describe(config, model),
            directory,
            compile_grammar=model.grammars,
            bases=Bases(config, model, engine, directory) if alone else None,
            split=getattr(model.runner, "split", None),
            floor=partial(floor, model.runner.model, model.runner.device),
            prepare_image=partial(prepare_image, config, model) if alone else None,
            lead=model.lead,
        )
        try:
            install(loaded, readers, strict)
        except BaseException:
            if model.lead is not None:
                model.lead.close()
            raise
    spent = process_age() - (time.monotonic() - began), imported - began, made - imported, time.monotonic() - made
    log.info("start-up: process %.1f s, imports %.1f s, model %.1f s, adapters %.1f s", *spent)
    return loaded


def _with_step_time(config: EngineConfig, model: LoadedModel) -> EngineConfig:
    """Bound the time of steps on a CPU, where a step of as many tokens as allowed takes seconds."""
    if config.scheduler.max_step_ms or model.runner.device.type != "cpu":
        return config
    return replace(config, scheduler=replace(config.scheduler, max_step_ms=_CPU_STEP_MS))


def install(loaded: Loaded, readers: Readers, strict: bool) -> None:
    """Install adapters one by one, with a progress bar when it takes long. With strict, the first that cannot be served
    raises; otherwise it is left out and named."""
    from inlaid.progress import Bar

    for name, done in Bar(readers, "loading adapters", total=readers.count, delay=1, leave=False):
        try:
            adapter, seconds = done.result()
            loaded.adapters.install(name, adapter, False, seconds)
        except (ValueError, OSError) as error:
            if strict:
                raise
            loaded.left_out[name] = str(error)


def _describe(config: EngineConfig, model: LoadedModel) -> ModelInfo:
    from inlaid.model.kv import KVLayout

    layout = KVLayout.of(model.runner.model.spec, config.cache, model.dtype)
    return ModelInfo(
        folder=str(model.folder),
        vocab_size=model.spec.vocab_size,
        max_model_len=model.max_model_len,
        num_blocks=model.num_blocks,
        block_size=config.cache.block_size,
        max_loras=config.adapters.max_loras,
        base_version=model.base_version,
        device=str(model.runner.device),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_cache_dtype=layout.format.name,
        kv_token_bytes=layout.token_bytes * config.tensor_parallel_size,
        eos_ids=tuple(model.spec.eos_token_ids),
    )


def process_age() -> float:
    """Return the seconds since this process began; where nothing tells when that was, its CPU seconds."""
    if not Path("/proc/self/stat").exists():
        return time.process_time()
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _leave_a_core_to_http(members: int) -> None:
    """Let torch use all cores but one, or this member's share of them. Threads of a matmul wait for each other in busy
    loops: with one for every core, the server beside this process makes each step many times slower. OMP_NUM_THREADS
    overrides this."""
    import torch

    from inlaid.worker.lead import threads_for

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_for(members))
