"""EngineClient over a real process with a fake model: outputs, aborts, refusals, deaths and restarts."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from inlaid.config import EngineConfig, SchedulerConfig
from inlaid.engine.refusal import Refused
from inlaid.engine.request import FinishReason, Grammar, NewRequest, SamplingParams
from inlaid.server.errors import translate
from inlaid.worker.client import EngineClient
from inlaid.worker.errors import EngineDead, EngineError, RequestTimeout
from inlaid.worker.link import Link
from tests.engine.fake_runner import generate
from tests.worker.fake_engine import BROKEN, DEADLY, ENVIRONMENT, FACTORY, FAILING, FAULTY, FAULTY_WINDOW

LONG = SamplingParams(max_tokens=800, ignore_eos=True, temperature=0.0)


@asynccontextmanager
async def running(adapters: dict[str, str] | None = None, **options: Any) -> AsyncIterator[EngineClient]:
    config = options.pop("config", EngineConfig(model="fake"))
    engine = EngineClient(config, adapters, factory=FACTORY, environment=ENVIRONMENT, **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def tokens(engine: EngineClient, request: NewRequest, timeout: float = 0.0) -> list[int]:
    made: list[int] = []
    async with aclosing(engine.generate(request, timeout)) as outputs:
        async for output in outputs:
            made += output.tokens
    return made


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again; the test's own timeout ends what never comes true."""
    while not await condition():
        await asyncio.sleep(0.01)


def test_many_requests_at_once_each_get_their_own_tokens() -> None:
    async def main() -> None:
        async with running() as engine:
            prompts = [[n, n + 1, n + 2] for n in range(20)]
            params = SamplingParams(max_tokens=12, temperature=0.0)
            made = await asyncio.gather(
                *(tokens(engine, NewRequest(id=str(n), prompt=p, params=params)) for n, p in enumerate(prompts))
            )
            assert made == [generate(prompt, None, 12) for prompt in prompts]
            assert engine.num_requests == 0

    asyncio.run(main())


def test_a_request_that_is_left_frees_its_blocks() -> None:
    async def main() -> None:
        async with running() as engine:
            outputs = engine.generate(NewRequest(id="a", prompt=[1] * 100, params=LONG))
            await anext(outputs)
            assert (await engine.call("stats"))["kv_blocks_used"] > 0
            await outputs.aclose()

            async def free() -> bool:
                return bool((await engine.call("stats"))["kv_blocks_used"] == 0)

            await until(free)

    asyncio.run(main())


def test_concurrent_lists_of_the_adapters_share_a_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running({f"a{n}": str(tmp_path) for n in range(100)}) as engine:
            asked = []
            ask = Link.ask

            async def counted(link: Link, number: int, method: str, arguments: dict[str, Any]) -> Any:
                asked.append(method)
                return await ask(link, number, method, arguments)

            monkeypatch.setattr(Link, "ask", counted)
            first = asyncio.create_task(engine.list_adapters())
            await asyncio.sleep(0)
            lists = await asyncio.gather(*(engine.list_adapters() for _ in range(50)))
            assert [len(found) for found in (await first, *lists)] == [100] * 51
            assert asked == ["adapters"] * 2  # the 50 came while the first was asked
            left = asyncio.create_task(engine.list_adapters())
            await asyncio.sleep(0)
            waiting = asyncio.create_task(engine.list_adapters())
            await asyncio.sleep(0)
            left.cancel()
            await engine.load_adapter("new", str(tmp_path))
            assert "new" in {info.name for info in await engine.list_adapters()}
            assert len(await waiting) >= 100

    asyncio.run(main())


def test_a_stopped_request_ends_as_a_whole_answer() -> None:
    async def main() -> None:
        async with running() as engine:
            outputs = engine.generate(NewRequest(id="a", prompt=[1], params=LONG))
            await anext(outputs)
            engine.stop("a", 1)
            rest = [output async for output in outputs]
            assert rest[-1].finish_reason is FinishReason.STOP
            assert sum(len(output.tokens) for output in rest) < 800

    asyncio.run(main())


def test_cancelling_a_reader_aborts_its_request() -> None:
    async def main() -> None:
        async with running() as engine:
            reader = asyncio.create_task(tokens(engine, NewRequest(id="a", prompt=[1], params=LONG)))

            async def started() -> bool:
                return bool((await engine.call("stats"))["running"] == 1)

            await until(started)
            reader.cancel()

            async def ended() -> bool:
                return bool((await engine.call("stats"))["running"] == 0)

            await until(ended)

    asyncio.run(main())


def test_refusals_say_why_and_when() -> None:
    async def main() -> None:
        limits = SchedulerConfig(max_num_seqs=1, max_num_waiting=1)
        async with running(config=EngineConfig(model="fake", scheduler=limits)) as engine:
            with pytest.raises(Refused, match="prompt has 901 tokens") as refused:
                await tokens(engine, NewRequest(id="long", prompt=[1] * 901))
            assert refused.value.retry_after is None
            with pytest.raises(Refused, match="'none such' is unknown") as gone:
                await tokens(engine, NewRequest(id="gone", prompt=[1], adapter="none such"))
            known = translate(gone.value)
            assert known is not None
            assert (known.status, known.body.error.code) == (404, "model_not_found")
            readers = [
                asyncio.create_task(tokens(engine, NewRequest(id=str(n), prompt=[n], params=LONG, tenant="t")))
                for n in range(5)
            ]
            done, _ = await asyncio.wait(readers, return_when=asyncio.FIRST_EXCEPTION)
            later = [error.retry_after for reader in done if isinstance(error := reader.exception(), Refused)]
            assert later
            assert all(seconds is not None and seconds > 0 for seconds in later)
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    asyncio.run(main())


def test_a_defect_in_one_request_leaves_the_others() -> None:
    async def main() -> None:
        async with running() as engine:
            with pytest.raises(EngineError, match="a defect"):
                await tokens(engine, NewRequest(id="bad", prompt=FAULTY))
            with pytest.raises(ValueError, match="unknown call"):
                await engine.call("_engine")
            with pytest.raises(EngineError, match="TypeError"):
                await engine.call("stats", surprise=1)
            assert await tokens(engine, NewRequest(id="good", prompt=[5])) == generate([5], None, 16)

    asyncio.run(main())


def test_a_refusal_with_half_a_character_is_a_refusal(tmp_path: Path) -> None:
    """Written in a folder's file, it once ended the process that reported it."""
    (tmp_path / "refusal.json").write_text(json.dumps("layers_pattern \ud800 is unknown"))

    async def main() -> None:
        async with running() as engine:
            with pytest.raises(Refused, match=r"layers_pattern \\ud800 is unknown"):
                await engine.load_adapter("a", str(tmp_path))
            with pytest.raises(Refused, match="cannot be sent"):
                await engine.call("set_scheduler", changes={"weights": {"t": 10**30}})
            assert engine.num_restarts == 0
            assert await tokens(engine, NewRequest(id="good", prompt=[5])) == generate([5], None, 16)

    asyncio.run(main())


def test_an_answer_that_cannot_be_sent_fails_its_call_alone() -> None:
    async def main() -> None:
        async with running() as engine:
            with pytest.raises(EngineError, match="cannot be sent"):
                await engine.call("fairness", window=FAULTY_WINDOW)
            assert await tokens(engine, NewRequest(id="good", prompt=[5])) == generate([5], None, 16)

    asyncio.run(main())


def test_a_request_that_takes_too_long_is_ended() -> None:
    async def main() -> None:
        async with running() as engine:
            with pytest.raises(RequestTimeout, match=r"0\.001 s"):
                await tokens(engine, NewRequest(id="a", prompt=[1], params=LONG), timeout=0.001)

    asyncio.run(main())


def test_death_fails_what_is_in_flight_and_the_process_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with running({"kept": str(tmp_path)}) as engine:
            (tmp_path / "second").mkdir()
            await engine.load_adapter("loaded", str(tmp_path / "second"))
            first = engine.process_id
            waiting = [
                asyncio.create_task(tokens(engine, NewRequest(id=str(n), prompt=[n], params=LONG))) for n in range(3)
            ]
            await asyncio.sleep(0)
            with pytest.raises(EngineDead, match="status 7"):
                await tokens(engine, NewRequest(id="deadly", prompt=DEADLY))
            failures = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(failure, EngineDead) for failure in failures)

            async def back() -> bool:
                return engine.ready

            await until(back)
            assert engine.process_id != first
            assert engine.num_restarts == 1
            assert sorted(engine.adapters) == ["kept", "loaded"]
            answer = await tokens(engine, NewRequest(id="again", prompt=[5], adapter="loaded"))
            assert answer == generate([5], "loaded", 16)

    asyncio.run(main())


def test_requests_that_fail_alone_are_no_failing_engine() -> None:
    async def main() -> None:
        async with running() as engine:
            first = engine.process_id
            for number in range(20):
                with pytest.raises(EngineError, match="IndexError: a fault"):
                    await tokens(engine, NewRequest(id=f"failing-{number}", prompt=FAILING))
            assert engine.process_id == first
            assert await tokens(engine, NewRequest(id="fine", prompt=[5])) == generate([5], None, 16)
            for number in range(8):
                with pytest.raises(EngineError, match="IndexError: a fault"):
                    await tokens(engine, NewRequest(id=f"broken-{number}", prompt=BROKEN))

            async def back() -> bool:
                return engine.num_restarts == 1 and engine.ready

            await until(back)
            assert await tokens(engine, NewRequest(id="again", prompt=[5])) == generate([5], None, 16)

    asyncio.run(main())


def test_a_machine_without_descriptors_is_no_engine_that_fails_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        given_up: list[str] = []
        async with running(give_up=given_up.append) as engine:
            num_refused, opened, pause = 0, Link.open, asyncio.sleep

            async def without_descriptors(link: Link, *arguments: Any) -> asyncio.StreamReader:
                nonlocal num_refused
                num_refused += 1
                if num_refused <= 8:
                    raise OSError(errno.EMFILE, "Too many open files")
                return await opened(link, *arguments)

            monkeypatch.setattr(Link, "open", without_descriptors)
            monkeypatch.setattr(asyncio, "sleep", lambda seconds: pause(min(seconds, 0.01)))
            assert engine.process_id is not None
            os.kill(engine.process_id, signal.SIGKILL)

            async def back() -> bool:
                return num_refused == 9 and engine.ready

            await until(back)
            assert not given_up
            assert await tokens(engine, NewRequest(id="a", prompt=[5])) == generate([5], None, 16)

    asyncio.run(main())


def test_an_adapter_that_is_gone_at_the_restart_is_left_out(tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "gone"
        folder.mkdir()
        async with running({"gone": str(folder)}) as engine:
            folder.rmdir()
            assert engine.process_id is not None
            os.kill(engine.process_id, signal.SIGKILL)

            async def back() -> bool:
                return engine.num_restarts == 1 and engine.ready

            await until(back)
            assert engine.adapters == {}

    asyncio.run(main())


def test_changed_settings_and_counted_requests_outlive_the_process() -> None:
    async def main() -> None:
        async with running() as engine:
            one = SamplingParams(max_tokens=1)
            changes = {"weights": {"a": 2.0}, "limits": {"a": {"requests_per_minute": 2}}}
            await engine.set_scheduler({"policy": "vtc"})
            _, changed = await engine.set_scheduler(changes)
            assert changed.keys() == {"policy", "options", "weights", "limits"}
            for number in range(2):
                await tokens(engine, NewRequest(id=str(number), prompt=[1], params=one, tenant="a"))
                assert engine.process_id is not None
                os.kill(engine.process_id, signal.SIGKILL)

                async def back(lives: int = number + 1) -> bool:
                    return engine.num_restarts == lives and engine.ready

                await until(back)
            described = await engine.call("scheduler")
            assert {name: described[name] for name in changed} == changed
            assert (described["policy"], described["weights"]) == ("vtc", {"a": 2.0})
            with pytest.raises(Refused, match="2 requests per 60 s"):
                await tokens(engine, NewRequest(id="late", prompt=[1], params=one, tenant="a"))

    asyncio.run(main())


def test_a_process_that_no_longer_answers_is_replaced() -> None:
    async def main() -> None:
        async with running(timeout=0.5) as engine:
            first = engine.process_id
            assert first is not None
            os.kill(first, signal.SIGSTOP)
            with pytest.raises(EngineDead, match=r"has not answered for 0\.5 s"):
                await tokens(engine, NewRequest(id="a", prompt=[1], params=LONG))

            async def back() -> bool:
                return engine.ready

            await until(back)
            assert engine.process_id != first

    asyncio.run(main())


def test_with_exit_a_death_is_reported_and_final() -> None:
    async def main() -> None:
        reasons: list[str] = []
        async with running(on_death="exit", give_up=reasons.append) as engine:
            assert engine.process_id is not None
            os.kill(engine.process_id, signal.SIGKILL)

            async def told() -> bool:
                return bool(reasons)

            await until(told)
            assert "-9" in reasons[0]
            with pytest.raises(EngineDead, match="-9"):
                await tokens(engine, NewRequest(id="a", prompt=[1]))

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_is_named() -> None:
    async def main() -> None:
        engine = EngineClient(EngineConfig(model="broken"), factory=FACTORY, environment=ENVIRONMENT)
        with pytest.raises(EngineDead, match="the model is broken; mend it"):
            await engine.start()
        await engine.close()

    asyncio.run(main())


def test_a_grammar_that_takes_long_to_compile_holds_nobody_up(tmp_path: Path) -> None:
    gate = tmp_path / "compiled"

    def constrained(name: str, **grammar: Any) -> NewRequest:
        return NewRequest(id=name, prompt=[5], params=SamplingParams(grammar=Grammar(**grammar)))

    async def main() -> None:
        async with running() as engine:
            slow = asyncio.create_task(tokens(engine, constrained("slow", regex=str(gate))))
            left = asyncio.create_task(tokens(engine, constrained("left", regex=str(gate))))
            assert await tokens(engine, NewRequest(id="free", prompt=[5])) == generate([5], None, 16)
            assert not slow.done()
            left.cancel()
            gate.touch()
            assert await slow == generate([5], None, 16)
            with pytest.raises(Refused, match="not valid"):
                await tokens(engine, constrained("bad", json_object=True))
            assert (await engine.call("stats"))["prompt_tokens"] == 2  # the one that was left was never added

    asyncio.run(main())
