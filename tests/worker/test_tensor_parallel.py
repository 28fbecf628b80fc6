"""An engine process whose model is divided: a member that dies restarts it, and none outlives it."""

from __future__ import annotations

import asyncio
import signal
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from inlaid.config import AdapterConfig, CacheConfig, ConfigError, EngineConfig
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.llm import LLM
from inlaid.server.online import with_changing_base
from inlaid.worker.checks import check_settings
from inlaid.worker.client import EngineClient

DEMO = Path(__file__).parents[2] / "models" / "demo"
ADAPTERS = {name: str(DEMO / "adapters" / name) for name in ("to_velar", "maths")}
SMALL = {"max_model_len": 128, "cache": CacheConfig(num_blocks=40), "adapters": AdapterConfig(max_loras=4)}
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def members(engine: psutil.Process) -> list[psutil.Process]:
    return [each for each in engine.children() if "inlaid.worker.member" in each.cmdline()]


async def tokens(engine: EngineClient, adapter: str | None) -> list[int]:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    made: list[int] = []
    async with aclosing(
        engine.generate(NewRequest(id="r", prompt=[5, 6, 7, 8], params=params, adapter=adapter))
    ) as outputs:
        async for output in outputs:
            made += output.tokens
    return made


def test_a_member_that_dies_restarts_the_engine_and_none_outlives_it() -> None:
    async def main() -> list[list[int]]:
        config = EngineConfig(model=str(DEMO / "base"), device="cpu", tensor_parallel_size=2, **SMALL)  # type: ignore[arg-type]
        engine = EngineClient(config, ADAPTERS, environment=ENVIRONMENT)
        await engine.start()
        try:
            found = [await tokens(engine, name) for name in (None, *ADAPTERS)]
            stats = await engine.call("stats")
            assert {key for key in stats if key.startswith("member_wait")} == {
                "member_wait_seconds_0", "member_wait_seconds_1"
            }  # fmt: skip
            (member,) = members(psutil.Process(engine.process_id))
            member.kill()  # while nothing is computed
            while not (engine.num_restarts == 1 and engine.ready):
                await asyncio.sleep(0.02)
            assert [await tokens(engine, name) for name in (None, *ADAPTERS)] == found
            process = psutil.Process(engine.process_id)
            (member,) = members(process)
            member.send_signal(signal.SIGSTOP)
            process.kill()  # no chance to tell the member that hangs
            gone, alive = await asyncio.to_thread(psutil.wait_procs, [member, process], 20)
            assert not alive
            assert len(gone) == 2
        finally:
            await engine.close()
        return found

    found = asyncio.run(main())
    llm = LLM("", ADAPTERS, config=EngineConfig(model=str(DEMO / "base"), device="cpu", **SMALL))  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    answers = llm.generate([[5, 6, 7, 8]] * 3, params, [None, *ADAPTERS], progress=False)
    assert [answer.tokens for answer in answers] == found


def test_what_a_divided_model_does_not_do_is_refused() -> None:
    divided = EngineConfig(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="--decode-kernel one computes a whole model on one GPU"):
        check_settings(EngineConfig(tensor_parallel_size=2, decode_kernel="one"))
    with pytest.raises(ConfigError, match="--online-tasks replaces the base of one process"):
        with_changing_base(divided)
    with pytest.raises(ConfigError, match="--tensor-parallel-size 0: give 1 or more"):
        check_settings(EngineConfig(tensor_parallel_size=0))
