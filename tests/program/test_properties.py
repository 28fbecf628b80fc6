"""Random programs: whatever runs beside what, and whichever short-cuts are taken, the tokens are those of one call
after another. FakeRunner's answers are a function of the tokens before them, and it checks every KV that is read.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from inlaid.program import Condition, Failure, Options, Program
from inlaid.program.local import LocalPlan
from tests.engine.fake_runner import generate
from tests.examples import examples
from tests.program.fake_host import FakeHost

ADAPTERS = (None, "a", "b", "c")
WORDS = ("the cat sat on the mat and ", "a dog", "", "one two three four five six seven eight ")


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, list[dict[str, Any]]]:
    """Draw a program, with calls that fail (their prompts outgrow the context) among its calls."""
    program = Program()
    program.input("text")
    program.input("items")
    texts = ["text"]
    calls: list[tuple[str, str | None]] = []
    for number in range(draw(st.integers(1, 9))):
        name = f"n{number}"
        kind = draw(st.sampled_from(("call", "call", "call", "continue", "map", "branch", "join")))
        source = draw(st.sampled_from(texts))
        sampling: dict[str, Any] = {"max_tokens": draw(st.integers(1, 12)), "ignore_eos": draw(st.booleans())}
        sampling["temperature"] = draw(st.sampled_from((0, 1)))
        adapter = draw(st.sampled_from(ADAPTERS))
        prompt = draw(st.sampled_from(WORDS)) + f"{{{source}}}" * draw(st.sampled_from((1, 1, 1, 9)))
        if kind == "continue" and calls:
            before, adapter = draw(st.sampled_from(calls))
            program.generate(name, prompt, adapter, continues=before, **sampling)
            calls.append((name, adapter))
        elif kind == "map":
            with program.map(f"m{number}", "items", f"i{number}") as each:
                each.generate(f"c{number}", prompt + f"{{i{number}}}", adapter, **sampling)
            program.join(name, f"m{number}", " ")
        elif kind == "branch":
            other = draw(st.sampled_from(texts))
            test: Any = draw(st.sampled_from(("contains", "failed")))
            condition = Condition(value=source, test=test, against="a" if test == "contains" else None)
            program.branch(name, condition, source, other)
        else:
            program.generate(name, prompt + "x", adapter, **sampling)
            calls.append((name, adapter))
        texts.append(name)
    outputs = draw(st.lists(st.sampled_from(texts[1:]), min_size=1, max_size=4, unique=True))
    program.outputs = outputs
    word = st.sampled_from(("cat", "dog", "a much longer word than the others"))
    inputs = st.fixed_dictionaries({"text": word, "items": st.lists(word, max_size=3)})
    return program, draw(st.lists(inputs, min_size=1, max_size=3))


def run(program: Program, inputs: list[dict[str, Any]], options: Options, host: FakeHost) -> list[dict[str, Any]]:
    plan = program.compile(host, options)
    found = plan.execute_many(inputs, seed=5, progress=False)
    for results in found:
        for call in results.calls:
            if call.equals is None and call.answer.finish_reason is not None and call.params.greedy:
                stop = frozenset() if call.params.ignore_eos else frozenset({7})
                most = min(call.params.max_tokens, host.encoder.max_model_len - len(call.prompt))
                assert call.answer.tokens == generate(call.prompt, call.adapter, most, stop)
    host.check_idle()
    return [{name: plain(value) for name, value in each.values_by_name.items()} for each in found]


def plain(value: Any) -> Any:
    """Return a value with failures as their reason; of equal calls only one may be named."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return ("failed", value.message) if isinstance(value, Failure) else value


OPTIONS = st.builds(
    Options,
    fuse_decode=st.booleans(),
    merge_equal=st.booleans(),
    drop_dead=st.booleans(),
    keep_kv=st.booleans(),
    share_prefixes=st.booleans(),
    max_in_flight=st.sampled_from((0, 0, 1, 2)),
)
ONE_BY_ONE = Options(
    fuse_decode=False, merge_equal=False, drop_dead=False, keep_kv=False, share_prefixes=False, max_in_flight=1
)


@examples(40)
@given(programs(), OPTIONS, st.booleans(), st.sampled_from((400, 40)), st.sampled_from((100, 2)))
def test_fused_equals_unfused_equals_one_after_another(
    drawn: tuple[Program, list[dict[str, Any]]], options: Options, overlap: bool, blocks: int, slots: int
) -> None:
    """Forty blocks mean preemption; two slots let adapters take turns on the device."""
    program, inputs = drawn
    host = FakeHost(num_blocks=blocks, max_model_len=120, slots=slots, overlap=overlap, max_num_seqs=8)
    plainly = run(program, inputs, ONE_BY_ONE, FakeHost(max_model_len=120))
    assert run(program, inputs, options, host) == plainly
    assert run(program, inputs, Options(), host) == plainly


@settings(max_examples=15, deadline=None)
@given(programs(), programs(), st.integers(0, 30))
def test_cancelling_one_program_leaves_another_as_it_was(
    drawn: tuple[Program, list[dict[str, Any]]], other: tuple[Program, list[dict[str, Any]]], turns: int
) -> None:
    host = FakeHost(num_blocks=60, max_model_len=120, max_num_seqs=8)
    program, inputs = drawn
    alone = run(program, inputs, Options(), FakeHost(max_model_len=120))
    cancelled = other[0].compile(host)
    reading = cancelled.stream(other[1][0])
    plan: LocalPlan = program.compile(host)
    for _, _ in zip(range(turns), reading):
        pass
    reading.close()  # type: ignore[attr-defined]
    found = plan.execute_many(inputs, seed=5, progress=False)
    assert [{name: plain(value) for name, value in each.values_by_name.items()} for each in found] == alone
    host.check_idle()
