# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
"""Time the kernels of a step beside their floors: linears, attention, adapters and the small operations. A stage of
bench.py; the shapes are those of Llama-2-7B and Llama-3-8B."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from inlaid.checkpoint import QuantSpec
from inlaid.kernels import attention_triton, command, fused_triton, lora_triton
from inlaid.kernels.auto import backends
from inlaid.kernels.backend import AdapterPages, LayerCache, Site
from inlaid.kernels.humming import HummingLinear
from inlaid.kernels.measure import CACHE, Ceiling, time_calls, time_linear
from inlaid.kv_format import AUTO, FP8, INT8, KVFormat
from perf.gpu import Keep

DEVICE = torch.device("cuda")
HEADS = ((32, 32), (32, 8))  # query and key/value heads
CONTEXTS = ((1, 320), (1, 2048), (16, 320), (64, 320), (64, 1024), (256, 320))  # (sequences, tokens of each)
ADAPTERS = (  # (rows, adapters, rank)
    (1, 1, 16), (16, 16, 16), (64, 1, 16), (64, 32, 16), (64, 64, 16), (256, 32, 16), (256, 128, 16), (64, 32, 64),
)  # fmt: skip
READ = (2048, 64)  # elements of a block, and blocks of a program
ONE_TILES = ((64, 4, 1), (32, 4, 3), (16, 2, 3), (32, 4, 4), (64, 4, 2), (64, 4, 3))
GROUP_TILES = ((64, 4, 3), (64, 4, 5), (32, 4, 3), (32, 4, 5), (64, 2, 3))
CODED_CONTEXTS = ((64, 320), (256, 320), (64, 2048))
CODED_TILES = (  # with as many key/value heads as query heads, and with fewer
    ((64, 4, 3), (64, 8, 3), (32, 4, 4), (64, 4, 2), (32, 2, 3)),
    ((128, 4, 3), (128, 8, 3), (64, 4, 4), (64, 4, 2), (32, 4, 4)),
)
SHRINKS = (
    (4, 128, 2, 4),
    (4, 256, 4, 2),
    (4, 256, 2, 4),
    (8, 128, 2, 4),
    (16, 256, 4, 2),
)  # parts, block, warps, stages
EXPANDS = ((4, 256, 4), (4, 512, 4), (4, 512, 8), (4, 1024, 8), (8, 512, 8), (8, 1024, 8))  # parts, block, warps


def ceiling() -> Ceiling:
    """Return what this device can do at most; an H200's where it was not measured."""
    found = Ceiling.of(torch.cuda.get_device_name())
    return found or Ceiling(4.3e12, 790e12)


def linears(shapes: tuple[str, ...] = command.SHAPES, rows: tuple[int, ...] = command.ROWS) -> list[dict[str, Any]]:
    """Time every linear backend, shape by shape."""
    spec = QuantSpec(4, 128, True, False)
    pairs = [(int(k), int(n)) for k, n in (shape.split("x") for shape in shapes)]
    table = command.measure(backends(deterministic=False), pairs, list(rows), spec, DEVICE)
    return [vars(row) for row in table]


@triton.jit
def _read_kernel(x, out, count, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    """Read x [count] and do next to nothing: out[program] = the sum of BLOCK * TURNS elements."""
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK * TURNS
    for turn in tl.range(0, TURNS, num_stages=3):
        at = first + turn * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0))


def decode_attention() -> list[dict[str, Any]]:
    """Time decode attention over tile shapes and numbers of splits.

    Beside the best stand the default's time and that of a kernel which only reads as many bytes."""
    found = []
    for (heads, kv), (batch, context) in itertools.product(HEADS, CONTEXTS):
        moved = 2 * batch * context * kv * 128 * 2
        copies = max(1, int(CACHE // moved)) if moved < CACHE else 1
        blocks = batch * -(-context // 16) + 1
        caches = [torch.randn(2, blocks, 16, kv, 128, device=DEVICE).half() for _ in range(copies)]
        order = (torch.randperm(blocks - 1, device=DEVICE) + 1).int()
        tables = order.view(batch, -1).contiguous()
        lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        q = torch.randn(batch, heads, 128, device=DEVICE).half()
        out = torch.empty_like(q)
        default = attention_triton.num_splits(batch, kv)
        times = {}
        tiles = ONE_TILES if heads == kv else GROUP_TILES
        for splits, tile in itertools.product(sorted({max(1, default // 2), default, min(16, default * 2)}), tiles):
            scratch = attention_triton.decode_scratch(batch, heads, 128, splits, DEVICE)

            decode = partial(
                attention_triton.decode, tables_SB=tables, lengths_S=lengths, out_SHC=out, scratch=scratch,
                splits=splits, tile=tile,
            )  # fmt: skip
            calls = [partial(decode, q, c[0], c[1]) for c in caches]
            times[f"splits {splits} tile {tile}"] = time_calls(calls, 5)
        best = min(times, key=lambda name: times[name])
        flat, sums = [c.view(-1) for c in caches], torch.empty(1 << 16, device=DEVICE)
        launch = _read_kernel[(triton.cdiv(flat[0].numel(), READ[0] * READ[1]),)]
        reads = [partial(launch, x, sums, x.numel(), BLOCK=READ[0], TURNS=READ[1], num_warps=4) for x in flat]
        shipped = attention_triton.TILES[heads != kv, False]
        default_name = f"splits {default} tile {shipped}"
        found.append(
            {
                "heads": f"{heads}/{kv}", "batch": batch, "context": context, "best": best, "us": times[best],
                "default_us": times[default_name], "reading_us": time_calls(reads, 9),
                "floor": ceiling().microseconds(moved), "all": times,
            }
        )  # fmt: skip
    return found


def kv_codes() -> list[dict[str, Any]]:
    """Time decode attention over keys and values of 16 and of 8 bits, the latter over tile shapes, beside their floors.

    Beside them stands the write after the rotation of as many tokens as there are sequences."""
    found = []
    for (heads, kv), (batch, context) in itertools.product(HEADS, CODED_CONTEXTS):
        blocks = batch * -(-context // 16) + 1
        tables = (torch.randperm(blocks - 1, device=DEVICE) + 1).int().view(batch, -1).contiguous()
        lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        q = torch.randn(batch, heads, 128, device=DEVICE).half()
        qkv = torch.randn(batch, (heads + 2 * kv) * 128, device=DEVICE).half()
        angles, at = torch.randn(4096, 128, device=DEVICE).half(), torch.arange(batch, device=DEVICE).int()
        splits = attention_triton.num_splits(batch, kv)
        scratch = attention_triton.decode_scratch(batch, heads, 128, splits, DEVICE)
        for form in (AUTO, INT8, FP8):
            moved = batch * context * kv * form.head_bytes(128, 2)
            caches = [random_cache(form, blocks, kv) for _ in range(max(2, int(CACHE // moved) + 1))]
            decode = partial(
                attention_triton.decode, tables_SB=tables, lengths_S=lengths, out_SHC=torch.empty_like(q),
                scratch=scratch, splits=splits,
            )  # fmt: skip
            rope = partial(fused_triton.rope_store, qkv, at, at, angles, angles, num_heads=heads)
            times = {
                str(tile): time_calls([partial(decode, q, *c[:2], tile=tile, scales=c.scales) for c in caches], 5)
                for tile in ((None, *CODED_TILES[heads != kv]) if form.is_coded else (None,))
            }
            writes = [partial(rope, k_cache=c.keys, v_cache=c.values, scales=c.scales) for c in caches]
            found.append(
                {
                    "heads": f"{heads}/{kv}", "batch": batch, "context": context, "form": form.name,
                    "us": times["None"], "floor": ceiling().microseconds(moved),
                    "best": min(times, key=times.__getitem__), "rope_store_us": time_calls(writes, 5), "all": times,
                }
            )  # fmt: skip
            del caches
    return found


def random_cache(form: KVFormat, blocks: int, kv_heads: int) -> LayerCache:
    """Return random keys and values of a layer."""
    if not form.is_coded:
        keys, values = (torch.randn(blocks, 16, kv_heads, 128, device=DEVICE).half() for _ in "kv")
        return LayerCache(keys, values)
    dtype = torch.int8 if form == INT8 else torch.float8_e4m3fn
    least, shape = -127 if form == INT8 else 0, (blocks, 16, kv_heads, 128)  # of e4m3, bits below 127 are numbers
    keys, values = (torch.randint(least, 127, shape, dtype=torch.int8, device=DEVICE) for _ in "kv")
    scales = torch.rand(blocks, kv_heads, 16, 2, device=DEVICE).mul_(0.01).half()
    return LayerCache(keys.view(dtype), values.view(dtype), scales)


def prefill_attention() -> list[dict[str, Any]]:
    """Time attention of whole prompts over tile shapes."""
    found = []
    for heads, kv, prompts, length in ((32, 32, 8, 256), (32, 32, 1, 2048), (32, 8, 8, 256), (32, 8, 1, 2048)):
        blocks = prompts * (length // 16)
        caches = torch.randn(2, blocks + 1, 16, kv, 128, device=DEVICE).half()
        tables = (torch.randperm(blocks, device=DEVICE) + 1).int().view(prompts, -1).contiguous()
        lengths = torch.full((prompts,), length, dtype=torch.int32, device=DEVICE)
        starts = (torch.arange(prompts + 1, device=DEVICE) * length).int()
        q = torch.randn(prompts * length, heads, 128, device=DEVICE).half()
        out = torch.empty_like(q)
        times = {}
        for block_m, warps, stages in ((64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2), (128, 8, 3)):
            tiles = torch.tensor(attention_triton.query_tiles((length,) * prompts, 0, block_m), dtype=torch.int32)
            tiles = tiles.T.contiguous().to(DEVICE)

            call = partial(
                attention_triton.prefill, q, caches[0], caches[1], tables, lengths, starts, tiles, out,
                block_m=block_m, warps=warps, stages=stages,
            )  # fmt: skip
            times[f"block {block_m} warps {warps} stages {stages}"] = time_calls([call] * 4, 5)
        best = min(times, key=lambda name: times[name])
        operations = 2.0 * 2 * prompts * heads * 128 * length * length / 2
        found.append(
            {
                "heads": f"{heads}/{kv}", "prompts": prompts, "length": length, "best": best, "us": times[best],
                "default_us": times["block 64 warps 4 stages 3"], "floor": ceiling().microseconds(0, operations),
                "all": times,
            }
        )  # fmt: skip
    return found


def adapter_pages(num_adapters: int, rank: int, layers: int, widths: tuple[int, ...], inputs: int) -> AdapterPages:
    """Return random adapters, each with siblings at the sites layer * 7 of `layers` layers."""
    sizes = [rank * inputs + width * rank for width in widths]
    pool = torch.randn(num_adapters * layers * sum(sizes), device=DEVICE).mul_(0.02).half()
    table = torch.zeros(num_adapters + 1, layers * 7, 3, dtype=torch.int64)
    at = 0
    for slot in range(1, num_adapters + 1):
        for layer in range(layers):
            for g, size in enumerate(sizes):
                table[slot, layer * 7 + g] = torch.tensor([at, at + rank * inputs, rank])
                at += size
    scale = torch.full(table.shape[:2], 2.0)
    return AdapterPages(pool, table.to(DEVICE), scale.to(DEVICE), [1] * (num_adapters + 1))


def adapters() -> list[dict[str, Any]]:
    """Time shrink and expand apart, over tunings, for qkv and o of a 7B layer."""
    found = []
    for rows, count, rank in ADAPTERS:
        for inputs, widths in ((4096, (4096, 4096, 4096)), (4096, (4096,))):
            moved = 2 * count * rank * (inputs * len(widths) + sum(widths))
            layers = max(2, min(32, int(CACHE // moved) + 1))
            pages = adapter_pages(count, rank, layers, widths, inputs)
            slots = (np.arange(rows) % count + 1).astype(np.int32)
            capacity = lora_triton.max_segments(rows, max(32, count), 16)
            plan = lora_triton.plan_rows(np.sort(slots), capacity, 16, DEVICE)
            x = torch.randn(rows, inputs, device=DEVICE).half()
            y = torch.zeros(rows, sum(widths), device=DEVICE).half()
            record: dict[str, Any] = {
                "rows": rows, "adapters": count, "rank": rank, "widths": widths,
                "floor": ceiling().microseconds(moved),
            }  # fmt: skip
            record |= _tune(x, y, pages, plan, widths, layers)
            found.append(record)
    return found


def _tune(
    x: torch.Tensor,
    y: torch.Tensor,
    pages: AdapterPages,
    plan: lora_triton.Segments,
    widths: tuple[int, ...],
    layers: int,
) -> dict[str, Any]:
    """Return the best tunings of shrink and expand, and the times of all."""
    shrinks, expands = {}, {}
    sites = [Site(layer * 7, widths) for layer in range(layers)]
    for parts, block_k, warps, stages in SHRINKS:
        tuning = lora_triton.Tuning(parts, block_k, 128, shrink_warps=warps, shrink_stages=stages)
        sums = lora_triton.scratch(x.shape[0], 64, parts, DEVICE)
        calls = [partial(lora_triton.shrink, x, pages, plan, sums, site, tuning) for site in sites]
        shrinks[f"parts {parts} block_k {block_k} warps {warps} stages {stages}"] = time_calls(calls, 5)
    for parts, block_n, warps in EXPANDS:
        tuning = lora_triton.Tuning(parts, 256, block_n, expand_warps=warps)
        sums = torch.zeros_like(lora_triton.scratch(x.shape[0], 64, parts, DEVICE))
        calls = [partial(lora_triton.expand_add, sums, pages, plan, y, site, tuning) for site in sites]
        expands[f"parts {parts} block_n {block_n} warps {warps}"] = time_calls(calls, 5)
    best_shrink, best_expand = min(shrinks, key=lambda n: shrinks[n]), min(expands, key=lambda n: expands[n])
    return {
        "shrink": best_shrink, "shrink_us": shrinks[best_shrink], "expand": best_expand,
        "expand_us": expands[best_expand], "shrinks": shrinks, "expands": expands,
    }  # fmt: skip


def pending() -> list[dict[str, Any]]:
    """Time an expansion and the kernel that reads it, apart and as one kernel, over tiles of that kernel."""
    found = []
    for rows, count, rank in ((1, 1, 16), (16, 16, 16), (64, 32, 16), (64, 32, 64), (128, 32, 16), (256, 32, 16)):
        for inputs, widths in ((4096, (4096, 4096, 4096)), (4096, (4096,)), (4096, (11008, 11008))):
            moved = 2 * count * rank * sum(widths)
            layers = max(2, min(16, int(CACHE // moved) + 1))
            pages = adapter_pages(count, rank, layers, widths, inputs)
            slots = np.sort((np.arange(rows) % count + 1).astype(np.int32))
            plan = lora_triton.plan_rows(slots, lora_triton.max_segments(rows, max(32, count), 16), 16, DEVICE)
            tuning = lora_triton.tuning_for(rows, 16, rank)
            sums = torch.randn_like(lora_triton.scratch(rows, 64, tuning.parts, DEVICE))
            on_device = torch.from_numpy(slots).to(DEVICE)
            sites = [Site(layer * 7, widths) for layer in range(layers)]
            left = [lora_triton.Pending(sums, pages, on_device, site, tuning) for site in sites]
            y = torch.randn(rows, sum(widths), device=DEVICE).half()
            follow, cuts = follower(y, len(widths))
            apart = [call for site in sites for call in (
                partial(lora_triton.expand_add, sums, pages, plan, y, site, tuning), partial(follow))]  # fmt: skip
            record: dict[str, Any] = {
                "rows": rows, "adapters": count, "rank": rank, "widths": widths,
                "floor": ceiling().microseconds(moved), "apart_us": 2 * time_calls(apart, 5),
                "together_us": time_calls([partial(follow, pending=one) for one in left], 5),
            }  # fmt: skip
            for cut in cuts:
                record[str(cut)] = time_calls([partial(follow, pending=one, **cut) for one in left], 5)
            found.append(record)
    return found


def follower(y: torch.Tensor, siblings: int) -> tuple[Callable[..., None], list[dict[str, int]]]:
    """Return the kernel that reads a linear with `siblings` siblings, and tiles to try."""
    rows, width = y.shape
    if siblings == 3:
        cache = torch.zeros(2, rows // 16 + 2, 16, 32, 128, device=DEVICE).half()
        table, positions = torch.randn(4096, 128, device=DEVICE).half(), torch.arange(rows, device=DEVICE).int()
        rope = partial(fused_triton.rope_store, y, positions, positions, table, table, cache[0], cache[1], 32)
        return rope, [{"heads": heads, "warps": warps} for heads, warps in ((8, 8), (4, 2), (2, 2), (2, 4))]
    if siblings == 2:
        activation = partial(fused_triton.silu_mul, y, torch.empty(rows, width // 2, device=DEVICE).half())
        return activation, [{"block": block, "warps": warps} for block, warps in ((256, 4), (512, 8), (1024, 8))]
    weight, residual = torch.ones(width, device=DEVICE).half(), torch.randn(rows, width, device=DEVICE).half()
    norm = partial(fused_triton.norm, y, weight, 1e-5, torch.empty_like(y), residual)
    return norm, [{"warps": 8}, {"warps": 32}]


def small_operations() -> list[dict[str, Any]]:
    """Time the norm, the rotation and the activation."""
    found = []
    for rows in (1, 64, 256, 2048):
        x, residual = (torch.randn(rows, 4096, device=DEVICE).half() for _ in range(2))
        weight, out = torch.ones(4096, device=DEVICE).half(), torch.empty(rows, 4096, device=DEVICE).half()
        qkv = torch.randn(rows, 12288, device=DEVICE).half()
        cache = torch.zeros(2, rows // 16 + 2, 16, 32, 128, device=DEVICE).half()
        table = torch.randn(4096, 128, device=DEVICE).half()
        positions = torch.arange(rows, device=DEVICE).int()
        wide, narrow = torch.randn(rows, 22016, device=DEVICE).half(), torch.empty(rows, 11008, device=DEVICE).half()
        operations = {
            "add_norm": partial(fused_triton.norm, x, weight, 1e-5, out, residual),
            "rope_store": partial(
                fused_triton.rope_store, qkv, positions, positions, table, table, cache[0], cache[1], 32
            ),
            "silu_mul": partial(fused_triton.silu_mul, wide, narrow),
        }
        times = {name: time_calls([call] * 20) for name, call in operations.items()}
        found.append({"rows": rows} | times)
    return found


def ordered() -> list[dict[str, Any]]:
    """Time the humming backend with sums by arrival and in a fixed order."""
    spec, rows, found = QuantSpec(4, 128, True, False), (1, 16, 32, 64, 128, 256, 2048), []
    for inputs, outputs in ((int(k), int(n)) for k, n in (shape.split("x") for shape in command.SHAPES)):
        for in_order in (False, True):
            times = time_linear(HummingLinear(in_order), inputs, outputs, spec, rows, DEVICE)
            found.append({"inputs": inputs, "outputs": outputs, "ordered": in_order, "us": times})
    return found


PARTS: Mapping[str, Callable[[], list[dict[str, Any]]]] = MappingProxyType({
    "decode_attention": decode_attention, "kv_codes": kv_codes, "pending": pending, "ordered": ordered,
    "prefill_attention": prefill_attention, "adapters": adapters, "small_operations": small_operations,
    "linears": linears,
})  # fmt: skip


def run(keep: Keep, names: tuple[str, ...] = tuple(PARTS)) -> dict[str, Any]:
    """Run each part by itself; an exception is the result of its part."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = PARTS[name]()
        except Exception as error:  # noqa: BLE001 - the other parts' figures are still wanted
            found[name] = f"{type(error).__name__}: {error}"
        keep(found)
        print(name, "done", flush=True)
        torch.cuda.empty_cache()
    return found
