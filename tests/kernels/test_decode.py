"""The persistent decode kernel: its layout and refusals here, its values against the specification on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from inlaid.checkpoint import QuantizedLinear, dequantize, from_codes
from inlaid.kernels import library
from inlaid.kernels.backend import MODULES, AdapterPages, LayerCache, Site
from inlaid.kernels.context import ALL_ADAPTERS, NO_ADAPTERS, OnDevice, StepContext
from inlaid.kernels.decode import DecodeKernel, DecodeShape, Surroundings, pack_units, unit_rows

CPU = torch.device("cpu")


def random_linear(inputs: int, outputs: int, symmetric: bool, seed: int, device: torch.device = CPU) -> QuantizedLinear:
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 16, (inputs, outputs), generator=generator, device=device)
    zeros = torch.full((inputs // 128, outputs), 8, device=device)
    if not symmetric:
        zeros = torch.randint(0, 16, zeros.shape, generator=generator, device=device)
    scales = (torch.rand(zeros.shape, generator=generator, device=device) + 0.5) * inputs**-0.5 / 4.6
    g_idx = torch.arange(inputs, device=device, dtype=torch.int32) // 128
    return from_codes(codes, zeros, scales.half(), g_idx, 128, 4)


def weight_of(units: torch.Tensor, interleaved: bool, zeros: bool) -> torch.Tensor:
    """Return the weight [K, N] that units hold, word by word as the kernel reads them."""
    count, groups, _ = units.shape
    weight_NK = torch.zeros(count * 16, groups * 128)
    halves = units[:, :, 256:].contiguous().view(torch.float16).float()
    for unit in range(count):
        for group in range(groups):
            for tile in range(8):
                for lane in range(32):
                    word = int(units[unit, group, (tile // 4 * 32 + lane) * 4 + tile % 4]) & 0xFFFFFFFF
                    for nibble in range(8):
                        a, b, c = nibble % 2, nibble // 2 % 2, nibble // 4
                        row, k = lane // 4 + 8 * a, 32 * (lane % 4) + 4 * tile + 2 * b + c
                        pair = 2 * (lane // 4) + a
                        zero = halves[unit, group, 16 + pair] if zeros else 0.0
                        value = (((word >> (4 * nibble)) & 15) - 8 + zero) * halves[unit, group, pair]
                        weight_NK[unit * 16 + row, group * 128 + k] = value
    found = torch.empty_like(weight_NK)
    found[unit_rows(count * 16, interleaved)] = weight_NK
    return found.t()


@pytest.mark.parametrize(("interleaved", "symmetric"), [(False, True), (True, False)])
def test_units_hold_the_weight(interleaved: bool, symmetric: bool) -> None:
    linear = random_linear(256, 32, symmetric, seed=1)
    units = pack_units(linear, interleaved, not symmetric, CPU)
    assert torch.equal(weight_of(units, interleaved, not symmetric), dequantize(linear))


def small_pages(dtype: torch.dtype = torch.float16) -> AdapterPages:
    return AdapterPages(torch.zeros(1, dtype=dtype), torch.zeros(1, 7, 3), torch.zeros(1, 7), [0])


def one_layer(**changes: int) -> DecodeShape:
    return replace(DecodeShape(4096, 11008, 32, 32, 1, 16, 132, 16), **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": 2048}, "hidden sizes from 2112 to 4096"),
        ({"hidden": 5120}, "hidden sizes from 2112 to 4096"),
        ({"heads": 40}, "up to 32 heads"),
        ({"heads": 24, "kv_heads": 8}, "1, 2, 4 or 8 to a key head, not 24 to 8"),
        ({"mlp": 11000}, "MLPs of up to 16384 in 256s"),
        ({"max_rank": 512}, "ranks up to 256, not 512"),
        ({"multiprocessors": 114}, "114 multiprocessors are fewer"),
    ],
)
def test_shapes_are_refused_with_a_reason(changes: dict[str, int], reason: str) -> None:
    assert reason in str(one_layer(**changes).why_not(128))


def test_served_shapes_are_not_refused() -> None:
    assert one_layer().why_not(128) is None
    assert one_layer(mlp=14336, kv_heads=8, max_rank=256).why_not(128) is None
    assert "heads of 128, not of 64" in str(one_layer().why_not(64))


def test_weights_that_it_does_not_read_are_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reason stays, and nothing is kept."""
    monkeypatch.setattr(library, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(DecodeKernel, "_build", lambda self: None)
    good, site = random_linear(256, 32, True, seed=0), Site(3, (32,))
    coarse = from_codes(torch.zeros(256, 32).int(), torch.ones(1, 32).int(), torch.ones(1, 32).half(),
                        torch.zeros(256).int(), -1, 4)  # fmt: skip
    for weights, bias, reason in (
        ([good, good], False, "fused only"), ([coarse], False, "groups of 128"), ([good], True, "adds no bias"),
        ([random_linear(256, 32, False, seed=0)], False, "some are not"),
    ):  # fmt: skip
        kernel = DecodeKernel(one_layer(), 128, small_pages())
        kernel.keep(site, [good], False)
        assert kernel.num_bytes == 2 * 2 * 264 * 4
        kernel.keep(site, weights, bias)
        kernel.keep(site, [good], False)
        assert reason in str(kernel.refusal)
        assert reason in str(kernel.finish())
        assert kernel.num_bytes == 0


def test_what_the_machine_or_the_model_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "nvcc", lambda: None)
    assert "nvcc, which builds it, was not found" in str(DecodeKernel(one_layer(), 128, small_pages()).refusal)
    monkeypatch.setattr(library, "nvcc", lambda: "nvcc")
    assert "float16, not torch.bfloat16" in str(DecodeKernel(one_layer(), 128, small_pages(torch.bfloat16)).refusal)
    assert "not all of the model's linears" in str(DecodeKernel(one_layer(), 128, small_pages()).finish())


# On a GPU.

LAYERS, BLOCK, PAGES = 3, 16, 512  # PAGES: blocks of a row
SHAPES = {
    "7b": DecodeShape(4096, 11008, 32, 32, LAYERS, 128, 132, 16),
    "8b": DecodeShape(4096, 14336, 32, 8, LAYERS, 64, 132, 16),
}
RANKS = {0: {}, 1: dict.fromkeys(range(4), 16), 2: {0: 8, 1: 64, 2: 40, 3: 8, 4: 64, 5: 1, 6: 33}, 3: {1: 4, 6: 64}}


@dataclass
class Model:
    """A random model of few layers, its adapters and its KV cache."""

    shape: DecodeShape
    linears: list[list[QuantizedLinear]]
    around: Surroundings
    cache: list[LayerCache]
    pages: AdapterPages
    newest: torch.Tensor
    tables: torch.Tensor

    @property
    def kv_width(self) -> int:
        return self.shape.kv_heads * 128


def widths(shape: DecodeShape) -> list[tuple[int, tuple[int, ...]]]:
    """Return inputs and the outputs of each sibling, linear by linear."""
    kv, d, f = shape.kv_heads * 128, shape.hidden, shape.mlp
    return [(d, (shape.heads * 128, kv, kv)), (shape.heads * 128, (d,)), (d, (f, f)), (f, (d,))]


def random_pages(shape: DecodeShape, device: torch.device) -> AdapterPages:
    table = torch.zeros(len(RANKS), shape.layers * 7, 3, dtype=torch.int64)
    scale = torch.zeros(len(RANKS), shape.layers * 7)
    sizes = [(inputs, width) for inputs, siblings in widths(shape) for width in siblings]
    pieces, at = [torch.zeros(64, device=device)], 64
    for slot, ranks in RANKS.items():
        for site in range(shape.layers * 7):
            rank = ranks.get(site % 7, 0)
            if rank:
                inputs, outputs = sizes[site % 7]
                a, b = -(-rank * inputs // 64) * 64, -(-rank * outputs // 64) * 64
                table[slot, site] = torch.tensor([at, at + a, rank])
                scale[slot, site] = 2.0 / rank
                pieces += [torch.randn(a, device=device) * inputs**-0.5, torch.randn(b, device=device)]
                at += a + b
    return AdapterPages(torch.cat(pieces).half(), table.to(device), scale.to(device), [0] * len(RANKS))


def random_model(shape: DecodeShape, symmetric: bool, device: torch.device) -> Model:
    torch.manual_seed(0)
    linears = [
        [random_linear(inputs, sum(siblings), symmetric, 4 * layer + j, device) for j, (inputs, siblings) in
         enumerate(widths(shape))] for layer in range(shape.layers)
    ]  # fmt: skip
    frequencies = 10000.0 ** -(torch.arange(0, 128, 2) / 128)
    angles = torch.outer(torch.arange(float(PAGES * BLOCK)), frequencies).repeat(1, 2).to(device)

    def gain() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(shape.hidden, device=device)).half()

    around = Surroundings(
        torch.randn(100, shape.hidden, device=device).half(), [(gain(), gain()) for _ in linears], 1e-5,
        angles.cos().half(), angles.sin().half(),
    )  # fmt: skip
    cache_shape = 5 * PAGES + 1, BLOCK, shape.kv_heads, 128
    cache = [LayerCache(*(torch.randn(cache_shape, device=device).half() for _ in range(2))) for _ in linears]
    tables = torch.randperm(5 * PAGES, device=device).view(5, PAGES).int() + 1
    return Model(
        shape, linears, around, cache, random_pages(shape, device), torch.arange(50, 56, device=device).int(), tables
    )


def make_step(
    model: Model, positions: Sequence[int], slots: Sequence[int], leaders: Sequence[int] | None = None
) -> StepContext:
    """Return a step of decodes; with `leaders`, each row's first row of its sequence, one of decodes with guesses."""
    from inlaid.kernels.lora_triton import Segments

    device, rows = model.tables.device, len(positions)

    def integers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    table_rows = [row % 4 + 1 for row in (range(rows) if leaders is None else leaders)]
    kv_slots = [
        int(model.tables[t, p // BLOCK]) * BLOCK + p % BLOCK for t, p in zip(table_rows, positions, strict=True)
    ]
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    return StepContext(
        integers(*range(7, 7 + rows)), integers(*positions), integers(*kv_slots), model.tables,
        integers(*(p + 1 for p in positions)), integers(*range(rows)), BLOCK, rows if leaders is None else 0,
        0 if leaders is None else len(set(leaders)), ALL_ADAPTERS if any(slots) else NO_ADAPTERS,
        few_queries=0 if leaders is None else 4,
        on_device=OnDevice(integers(*((-1, 3) * 2)[:rows]), model.newest, integers(*table_rows), empty,
                           empty.view(2, 0), integers(*slots), Segments(empty, empty, 0, 16), integers(*table_rows),
                           integers(*(range(rows) if leaders is None else leaders))),
    )  # fmt: skip


def lora(model: Model, x_TK: torch.Tensor, layer: int, j: int, slots: Sequence[int]) -> torch.Tensor:
    pages, first = model.pages, (0, 3, 4, 6)[j]
    inputs, siblings = widths(model.shape)[j]
    rows = []
    for x_K, slot in zip(x_TK, slots, strict=True):
        parts = []
        for m, width in enumerate(siblings):
            a, b, rank = pages.table[slot, layer * 7 + first + m].tolist()
            a_RK = pages.pool[a : a + rank * inputs].view(rank, inputs).double()
            b_NR = pages.pool[b : b + rank * width].view(width, rank).double()
            parts.append(pages.scale[slot, layer * 7 + first + m].double() * (b_NR @ (a_RK @ x_K)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def expected(model: Model, step: StepContext, slots: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the last sum in double precision, and the keys that each layer stores."""
    around, here, rows = model.around, step.on_device, step.num_tokens
    assert here is not None
    tokens = torch.where(here.sources_T >= 0, here.newest_R[here.sources_T.clamp(min=0).long()], step.ids_T)
    x_TD, keys = around.embedding_VD[tokens.long()].double(), []
    positions = step.positions_T.long()
    cos, sin = (table[positions].double()[:, None] for table in (around.cos, around.sin))

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + around.eps).sqrt() * gain.double()

    def linear(x: torch.Tensor, layer: int, j: int) -> torch.Tensor:
        return x @ dequantize(model.linears[layer][j]).double() + lora(model, x, layer, j, slots)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., 64:], x[..., :64]), -1) * sin

    for layer in range(model.shape.layers):
        heads = linear(norm(x_TD, around.gains[layer][0]), layer, 0).view(rows, -1, 128)
        q, k, v = heads.split((model.shape.heads, model.shape.kv_heads, model.shape.kv_heads), 1)
        q, k = turned(q), turned(k)
        keys.append(k)
        mixed = []
        for row in range(rows):
            assert here.token_rows_T is not None
            assert here.leaders_T is not None
            blocks, first = step.block_tables[int(here.token_rows_T[row])].long(), int(here.leaders_T[row])
            heads_of = (-1, model.shape.kv_heads, 128)
            past = [cache[blocks].view(heads_of)[: positions[first]] for cache in model.cache[layer][:2]]
            ks, vs = (torch.cat((old.double(), new[first : row + 1])) for old, new in zip(past, (k, v), strict=True))
            ks, vs = (each.repeat_interleave(model.shape.heads // model.shape.kv_heads, 1) for each in (ks, vs))
            weights = (torch.einsum("hc,lhc->hl", q[row], ks) / 128**0.5).softmax(-1)
            mixed.append(torch.einsum("hl,lhc->hc", weights, vs).flatten())
        x_TD = x_TD + linear(torch.stack(mixed), layer, 1)
        gate, up = linear(norm(x_TD, around.gains[layer][1]), layer, 2).chunk(2, -1)
        x_TD = x_TD + linear(torch.nn.functional.silu(gate) * up, layer, 3)
    return x_TD, keys


def kernel_of(model: Model) -> DecodeKernel:
    kernel = DecodeKernel(model.shape, 128, model.pages)
    for layer, linears in enumerate(model.linears):
        for j, linear in enumerate(linears):
            kernel.keep(Site(layer * len(MODULES) + (0, 3, 4, 6)[j], widths(model.shape)[j][1]), [linear], bias=False)
    assert kernel.finish() is None, kernel.refusal
    kernel.bind(model.around, model.cache)
    return kernel


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(library.nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize(("name", "symmetric"), [("7b", True), ("8b", True), ("8b", False)])
def test_a_step_is_the_specification(name: str, symmetric: bool) -> None:
    """Rows 1, 2 and 4; contexts of 1 to 8,192 tokens; adapters none, one, and different in each row; guesses, which
    follow a token of their sequence."""
    device = torch.device("cuda")
    model = random_model(SHAPES[name], symmetric, device)
    kernel = kernel_of(model)
    worst: dict[str, float] = {}
    for positions, slots, leaders in (
        ((300,), (0,), None), ((0,), (0,), None), ((300,), (1,), None), ((933,), (2,), None),
        ((64, 299), (0, 0), None), ((5, 700), (2, 1), None), ((300, 0, 17, 900), (0, 0, 0, 0), None),
        ((300, 1, 64, 900), (2, 0, 3, 1), None), ((300, 1, 64, 900), (2, 2, 2, 2), None), ((8191,), (0,), None),
        ((2048, 4100), (1, 2), None), ((8000, 0, 2047, 5000), (1, 2, 0, 3), None),
        ((63, 64), (0, 0), (0, 0)), ((4000, 4001), (2, 2), (0, 0)), ((0, 1, 2, 3), (1, 1, 1, 1), (0, 0, 0, 0)),
        ((300, 301, 302, 303), (2, 2, 2, 2), (0, 0, 0, 0)), ((46, 47, 900, 901), (1, 1, 3, 3), (0, 0, 2, 2)),
        ((77, 78, 79, 0), (2, 2, 2, 0), (0, 0, 0, 3)), ((5, 640, 641, 642), (0, 3, 3, 3), (0, 1, 1, 1)),
    ):  # fmt: skip
        step = make_step(model, positions, slots, leaders)
        want, keys = expected(model, step, slots)
        runs = []
        for _ in range(100 if positions == (300, 1, 64, 900) else 3):
            product, residual = (torch.full_like(want, float("nan"), dtype=torch.float16) for _ in range(2))
            kernel.run(step, product, residual)
            torch.cuda.synchronize()
            runs.append((product, residual))
        found = runs[0][0].double() + runs[0][1].double()
        error = float((found - want).norm() / want.norm())
        worst[f"{positions} {slots} {leaders}"] = error
        for layer, key in enumerate(keys):
            stored = model.cache[layer][0].view(-1, model.shape.kv_heads, 128)[step.kv_slots_T.long()].double()
            worst[f"{positions} {slots} {leaders} keys {layer}"] = float((stored - key).norm() / key.norm())
        same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
        worst[f"{positions} {slots} {leaders} bits"] = 0.0 if same else 1.0
        for case, error in list(worst.items())[-2 - len(keys) :]:
            print(name, case, f"{error:.2e}")
    assert all(error < (1e-2 if "keys" in case else 4e-3) for case, error in worst.items()), worst
