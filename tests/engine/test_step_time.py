"""Steps that make tokens of answers take no longer than the configuration says, whatever prompts come beside them."""

from __future__ import annotations

from typing import Any

import pytest

from inlaid.engine.request import Batch
from tests.engine.bench import Bench

_SECONDS_PER_TOKEN = 0.001
LONG = [5] * 300


def slow_bench(overlap: bool, **config: Any) -> Bench:
    """Make a bench whose device computes a thousand tokens a second."""
    bench = Bench(300, max_model_len=1000, overlap=overlap, max_num_batched_tokens=256, **config)
    submit = bench.runner.submit

    def take_time(batch: Batch) -> Any:
        bench.time += batch.num_tokens * _SECONDS_PER_TOKEN - 1.0  # the bench's clock has counted a second for the step
        return submit(batch)

    bench.runner.submit = take_time  # type: ignore[method-assign]
    return bench


def sizes_beside_a_stream(bench: Bench) -> list[int]:
    """Return the tokens of the steps between the first and the last token of an answer, while long prompts come."""
    bench.add("stream", [8, 9], max_tokens=40, ignore_eos=True)
    while not bench.tokens["stream"]:
        bench.step()
    before = len(bench.runner.batches)
    for number in range(2):
        bench.add(f"long{number}", [*LONG, number], max_tokens=2, prompt_logprobs=number or None)
    while "stream" not in bench.ends:
        bench.step()
    sizes = [batch.num_tokens for batch in bench.runner.batches[before:]]
    bench.run().check_all()
    return sizes


@pytest.mark.parametrize("overlap", [False, True])
def test_long_prompts_keep_no_stream_waiting_for_longer_than_the_bound(overlap: bool) -> None:
    sizes = sizes_beside_a_stream(slow_bench(overlap, max_step_ms=80))
    assert max(sizes) <= 129  # until a step has been timed
    assert sorted(sizes)[-4] <= 80  # with overlap two more steps are made by then
    assert sum(sizes) > len(LONG)  # a prompt has been computed beside the stream


def test_steps_without_a_bound_are_as_large_as_they_may_be() -> None:
    assert max(sizes_beside_a_stream(slow_bench(overlap=False))) == 256


def test_prompts_alone_are_computed_in_full_steps() -> None:
    bench = slow_bench(overlap=False, max_step_ms=80)
    bench.add("long", LONG, max_tokens=2)
    bench.run().check_all()
    assert bench.runner.batches[0].num_tokens == 256


def test_prompts_that_may_not_be_split_wait_for_no_step_that_holds_them() -> None:
    bench = slow_bench(overlap=False, max_step_ms=1, enable_chunked_prefill=False)
    bench.add("stream", [8, 9], max_tokens=30, ignore_eos=True)
    bench.step()
    bench.add("long", LONG[:200], max_tokens=2)
    bench.step()
    assert bench.runner.batches[-1].num_tokens > 200


def test_a_device_slower_than_the_bound_still_computes_prompts() -> None:
    sizes = sizes_beside_a_stream(slow_bench(overlap=False, max_step_ms=1))
    assert sorted(sizes)[-2] <= 16 + 3
    assert sum(sizes) > 200
