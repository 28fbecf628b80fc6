"""Programs on a fake model: values, failures in their place, what fusion saves, and what ends with whom."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from inlaid.program import Condition, Failure, Limits, Program
from inlaid.program.execute import CallFailed
from inlaid.program.refused import ProgramError
from tests.engine.fake_runner import generate
from tests.program.fake_host import FakeHost, FakeTokenizer

ENCODE, DECODE = FakeTokenizer().encode, FakeTokenizer().decode


def answer(prompt: str, adapter: str | None, count: int) -> str:
    """Return the text that the engine must give."""
    made = generate(ENCODE(prompt), adapter, count)
    return DECODE(made[:-1] if made[-1] == 7 else made)


def chain() -> Program:
    program = Program()
    program.input("text")
    program.generate("draft", "say {text}", "a", temperature=0, max_tokens=9)
    program.generate("verdict", "judge {draft} of {text}", "b", temperature=0, max_tokens=5)
    return program


def test_results_are_those_of_the_same_calls_by_hand() -> None:
    host = FakeHost()
    plan = chain().compile(host)
    found = plan.execute({"text": "hello"})
    draft = answer("say hello", "a", 9)
    assert dict(found) == {"verdict": answer(f"judge {draft} of hello", "b", 5)}
    assert [(call.where, call.adapter) for call in found.calls] == [("draft", "a"), ("verdict", "b")]
    host.check_idle()


def test_maps_branches_joins_functions_and_the_best() -> None:
    host = FakeHost()
    program = Program(["joined", "taken", "best", "upper", "number"])
    program.input("words")
    program.input("mood")
    with program.map("said", "words", "word") as each:
        each.generate("one", "say {word}", "a", temperature=0, max_tokens=4)
    program.join("joined", "said", " + ")
    program.split("parts", "joined", "+")
    program.generate("calm", "calm", None, temperature=0, max_tokens=3)
    program.generate("wild", "wild", None, temperature=0, max_tokens=3)
    program.branch("taken", Condition(value="mood.kind", test="equals", against="calm"), "calm", "wild")
    with program.map("marks", 3, "n") as each:
        each.text("mark", "mark {n}")
    program.best("best", "words", "marks")
    program.function("upper", lambda parts: [part.upper() for part in parts], "parts")
    program.text("number", "{{{mood.level}}}")
    found = program.compile(host).execute({"words": ["x", "yy", "zzz"], "mood": {"kind": "calm", "level": 3}})
    said = [answer(f"say {word}", "a", 4) for word in ("x", "yy", "zzz")]
    assert found["joined"] == " + ".join(said)
    assert found["taken"] == answer("calm", None, 3)
    assert found["best"] == "zzz"
    assert found["upper"] == [part.strip().upper() for part in " + ".join(said).split("+") if part.strip()]
    assert found["number"] == "{3}"
    assert not any(call.where == "wild" for call in found.calls), "the side that is not taken is not computed"
    host.check_idle()


def test_a_failure_stands_in_its_place_and_the_rest_goes_on() -> None:
    host = FakeHost(max_model_len=60)
    program = Program(["good", "list", "after", "mended"])
    program.input("words")
    program.generate("good", "fine", "a", temperature=0, max_tokens=4)
    with program.map("list", "words", "word") as each:
        each.generate("one", "{word}", "b", temperature=0, max_tokens=4)
    program.join("after", "list")
    program.branch("mended", Condition(value="list", test="failed"), "good", "after")
    found = program.compile(host).execute({"words": ["short", "x" * 70, "y"]})
    assert found["good"] == answer("fine", "a", 4)
    assert found["mended"] == found["good"]
    first, failed, last = found["list"]
    assert (first, last) == (answer("short", "b", 4), answer("y", "b", 4))
    assert isinstance(failed, Failure)
    assert failed.where == "list[1].one"
    with pytest.raises(CallFailed, match=r"list\[1\].one: "):
        found["after"]
    host.check_idle()


def test_a_function_that_raises_fails_what_needs_it_only() -> None:
    program = Program()
    program.function("broken", lambda: 1 / 0)
    program.text("next", "{broken}")
    program.text("other", "fine")
    found = program.compile(FakeHost()).execute({})
    assert found["other"] == "fine"
    assert "ZeroDivisionError" in found.failures["next"].message


def test_an_adapter_that_leaves_between_compiling_and_running_fails_its_calls() -> None:
    host = FakeHost()
    plan = chain().compile(host)
    host.directory.names = ("a",)
    found = plan.execute({"text": "x"})
    assert found.failures["verdict"].where == "verdict"
    host.check_idle()


def calls_of(found: Any) -> int:
    return sum(call.equals is None for call in found.calls)


def test_equal_calls_are_made_once_and_only_determined_ones() -> None:
    host = FakeHost()
    program = Program(["x", "y", "loose", "other"])
    program.input("a")
    program.input("b")
    program.generate("x", "say {a}", "a", temperature=0)
    program.generate("y", "say {b}", "a", temperature=0)
    program.generate("loose", "say {a}", "a")
    program.generate("other", "say {a}", "b", temperature=0)
    merged = program.compile(host).execute({"a": "same", "b": "same"}, seed=1)
    apart = program.compile(host, merge_equal=False).execute({"a": "same", "b": "same"}, seed=1)
    assert (calls_of(merged), calls_of(apart)) == (3, 4)
    assert dict(merged) == dict(apart)


def prefilled(host: FakeHost) -> int:
    """Count the prompt tokens that were computed, not found."""
    return int(host.engine.stats()["prompt_tokens"] - host.engine.stats()["cached_tokens"])


@pytest.mark.parametrize("share", [True, False])
def test_a_prefix_that_appears_at_run_time_is_computed_once_for_each_adapter(share: bool) -> None:
    host = FakeHost()
    program = Program()
    program.input("text")
    program.generate("long", "write {text}", None, temperature=0, max_tokens=60, ignore_eos=True)
    for number in range(6):
        program.generate(f"use{number}", f"{{long}} now {number}", "ab"[number % 2], temperature=0, max_tokens=2)
    found = program.compile(host, share_prefixes=share, max_in_flight=0).execute({"text": "it"})
    long = len(ENCODE("write it")) + 6 * len(ENCODE(answer("write it", None, 60) + " now 1"))
    saved = 4 * (60 // 4 * 4)  # two adapters compute it, four calls find it
    assert len(found) == 6
    assert prefilled(host) <= long - saved if share else prefilled(host) >= long - 8
    host.check_idle()


@pytest.mark.parametrize("keep", [True, False])
def test_a_continuation_keeps_its_kv(keep: bool) -> None:
    host = FakeHost()
    program = Program(["second", "third"])
    program.generate("first", "begin the story of a cat", "a", temperature=0, max_tokens=30)
    program.generate("second", " go on", "a", continues="first", temperature=0, max_tokens=30)
    program.generate("third", " and on", "a", continues="second", temperature=0, max_tokens=6)
    found = program.compile(host, keep_kv=keep).execute({})
    first, second, third = found.calls
    end = [7]
    tokens = [token for token in first.answer.tokens if [token] != end]
    assert second.prompt == first.prompt + tokens + ENCODE(" go on")
    assert third.answer.tokens == generate(third.prompt, "a", 6)
    assert (second.answer.num_cached > 0, third.answer.num_cached > 0) == (keep, keep)


def test_a_continued_chat_goes_through_the_template() -> None:
    program = Program()
    program.input("text")
    program.chat("first", "tell {text}", "a", temperature=0, max_tokens=8)
    program.chat("second", [{"role": "user", "content": "more"}], "a", continues="first", temperature=0, max_tokens=8)
    first, second = program.compile(FakeHost()).execute({"text": "me"}).calls
    tokens = first.answer.tokens[:-1] if first.answer.tokens[-1] == 7 else first.answer.tokens
    assert first.prompt == ENCODE("<u>tell me!<a>")
    assert second.prompt == first.prompt + tokens + ENCODE("!<u>more!<a>")
    assert [message["role"] for message in second.messages] == ["user", "assistant", "user"]


def test_one_adapter_at_a_time_without_fused_decoding() -> None:
    host = FakeHost()
    program = Program()
    for number in range(6):
        program.generate(f"n{number}", f"say {number}", "abc"[number % 3], temperature=0, max_tokens=5)
    program.compile(host, fuse_decode=False).execute({})
    adapters = [{work.request.adapter for work in batch.works} for batch in host.runner.batches]
    assert all(len(each) == 1 for each in adapters)
    host.runner.batches.clear()
    program.compile(host).execute({})
    assert any(len({work.request.adapter for work in batch.works}) == 3 for batch in host.runner.batches)


def test_limits_fail_what_is_beyond_them() -> None:
    host = FakeHost()
    program = Program()
    for number in range(4):
        program.generate(f"n{number}", f"say {number}", None, temperature=0, max_tokens=5, ignore_eos=True)
    plan = program.compile(host)
    assert len(plan.execute({}, Limits(max_calls=3)).failures) == 1
    assert len(plan.execute({}, Limits(max_tokens=23)).failures) == 2, "each takes 5 + 5"
    assert "more than the 3 calls" in next(iter(plan.execute({}, Limits(max_calls=3)).failures.values())).message
    many = Program(["all"])
    with many.map("all", 50) as each:
        each.text("t", "x" * 100)
    assert "values" in many.compile(host).execute({}, Limits(max_values=40)).failures["all"].message
    grown = Program()
    grown.text("t0", "x" * 1000)
    for number in range(60):
        grown.text(f"t{number + 1}", f"{{t{number}}}{{t{number}}}")
    assert "characters" in grown.compile(host).execute({}, Limits(max_chars=10_000)).failures["t60"].message
    host.check_idle()


def test_time_that_is_over_fails_the_rest_and_leaves_nothing() -> None:
    host = FakeHost()
    release = threading.Event()
    program = Program(["quick", "late"])
    program.text("quick", "done")
    program.function("wait", release.wait)
    program.generate("late", "{wait}", None)
    found = program.compile(host).execute({}, Limits(seconds=0.01))
    release.set()
    assert found["quick"] == "done"
    assert "are over" in found.failures["late"].message
    host.check_idle()


def test_streams_name_results_as_they_come_and_end_with_their_reader() -> None:
    host = FakeHost()
    program = Program(["all", "one"])
    program.input("words")
    with program.map("all", "words") as each:
        each.generate("said", "say {item}", "a", temperature=0, max_tokens=6)
    program.generate("one", "one", "b", temperature=0, max_tokens=6)
    plan = program.compile(host)
    texts: dict[Any, str] = {}
    values: dict[Any, Any] = {}
    for event in plan.stream({"words": ["x", "y"]}):
        key = (event.name, event.path)
        if event.complete:
            values[key] = event.value
        else:
            assert key not in values
            texts[key] = texts.get(key, "") + (event.text or "")
    assert values["one", ()] == texts["one", ()] == answer("one", "b", 6)
    assert values["all", ()] == [texts["all", (0,)], texts["all", (1,)]] == [values["all", (0,)], values["all", (1,)]]
    events = plan.stream({"words": ["x", "y"]})
    next(events)
    events.close()  # type: ignore[attr-defined]
    host.check_idle()


def test_executions_on_one_event_loop_share_the_engine() -> None:
    host = FakeHost()
    plan = chain().compile(host)

    async def both() -> list[Any]:
        return await asyncio.gather(*(plan.execute_async({"text": word}) for word in ("one", "two")))

    found = asyncio.run(both())
    assert [dict(each) for each in found] == [dict(plan.execute({"text": word})) for word in ("one", "two")]

    async def streamed() -> list[Any]:
        return [event.value async for event in plan.stream_async({"text": "one"}) if event.complete]

    assert asyncio.run(streamed()) == [found[0]["verdict"]]
    host.check_idle()


def test_a_small_queue_holds_calls_back_without_failing_them() -> None:
    host = FakeHost(max_num_seqs=2, max_num_waiting=2)
    program = Program()
    program.input("words")
    with program.map("all", "words") as each:
        each.generate("said", "say {item}", "a", temperature=0, max_tokens=4)
    words = [str(number) for number in range(20)]
    assert program.compile(host).execute({"words": words})["all"] == [answer(f"say {w}", "a", 4) for w in words]
    host.check_idle()


def test_inputs_are_checked_by_name() -> None:
    with pytest.raises(ProgramError, match="missing: text; unknown: txt"):
        chain().compile(FakeHost()).execute({"txt": "x"})
