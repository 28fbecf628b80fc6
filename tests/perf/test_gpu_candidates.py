"""The kernels that a sweep tries."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from inlaid.kernels.humming_schedule import Problem, schedule
from perf.gpu.candidates import near

SHAPES = ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096), (14336, 4096), (1024, 512), (1088, 512))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([(0, 1), (8, 16), (16, 24), (48, 64), (96, 128), (192, 256), (256, 512)]),
    st.booleans(),
)
def test_candidates_have_fewer_slices_or_more_tiles(shape: tuple[int, int], rows: tuple[int, int], tall: bool) -> None:
    height = min(rows[1], 176) if rows[1] > 32 else -(-rows[1] // 8) * 8
    base: dict[str, Any] = {"num_stages": 4, "num_ctas_per_sm": 2, "use_stream_k": True}
    if rows[1] <= 32:
        base |= {"mma_type": "mma", "block_shape": (height, 128, 128), "warp_shape": (height, 64, 32)}
    else:
        width = 256 if tall else 128
        base |= {"mma_type": "wgmma", "use_tma": True, "use_warp_spec": True}
        base |= {"block_shape": (height, width, 64), "warp_shape": (height, 32, 64)}
    problem = Problem(*shape, 128, *rows, 132)
    first, *others = near(base, problem)
    assert first == base
    assert all(one not in others[:index] for index, one in enumerate(others))
    most = schedule(base, problem, problem.row_tiles(base)).slices
    for config in others:
        smaller = config["block_shape"] != base["block_shape"]
        made = schedule(config, problem, problem.row_tiles(config))
        assert smaller or made.slices <= most or config["num_ctas_per_sm"] == 1
        assert 1 <= made.blocks <= problem.sms * config["num_ctas_per_sm"]
