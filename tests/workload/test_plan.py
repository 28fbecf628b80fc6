"""Workloads: streams merge in time, classes and tenants are assigned, the same seed gives the same plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from inlaid.workload.arrivals import Arrivals
from inlaid.workload.lengths import Lengths
from inlaid.workload.plan import plan, rescale_rate
from inlaid.workload.popularity import AdapterChoice
from inlaid.workload.prompts import PromptMaker
from inlaid.workload.spec import Objective, Stream, Workload
from inlaid.workload.suites import load_workload
from inlaid.workload.traces import Trace

MAKER = PromptMaker("words", None, seed=0)
ADAPTERS = ["a", "b", "c"]


def two_clients(**changes: object) -> Workload:
    """VTC's overload suite in small: two clients, one with twice the rate of the other."""
    streams = [
        Stream(Arrivals("fixed", rate=rate), AdapterChoice("identical", indices=[i]), duration_s=20)
        for i, rate in enumerate([1.0, 2.0])
    ]
    return Workload(streams, **changes)  # type: ignore[arg-type]


def test_streams_are_merged_in_time_order() -> None:
    planned = plan(two_clients(), ADAPTERS, MAKER)
    assert [request.index for request in planned] == list(range(60))
    assert [r.at for r in planned] == sorted(r.at for r in planned)
    assert Counter(r.tenant for r in planned) == {"a": 20, "b": 40}


def test_the_plan_follows_from_the_seed() -> None:
    assert plan(two_clients(seed=4), ADAPTERS, MAKER) == plan(two_clients(seed=4), ADAPTERS, MAKER)
    assert plan(two_clients(seed=4), ADAPTERS, MAKER) != plan(two_clients(seed=5), ADAPTERS, MAKER)


def test_classes_by_adapter_and_by_share() -> None:
    classes = {"fast": Objective(ttft_ms=10, adapters=["a"]), "slow": Objective(e2el_ms=900, share=0.5)}
    planned = plan(two_clients(classes=classes), ADAPTERS, MAKER)
    assert {r.service_class for r in planned if r.adapter == "a"} == {"fast"}
    others = Counter(r.service_class for r in planned if r.adapter == "b")
    assert set(others) == {"slow", "default"}
    assert 8 < others["slow"] < 32


def test_a_start_shifts_a_stream() -> None:
    stream = Stream(Arrivals("fixed", rate=1), AdapterChoice("none"), start_s=300, duration_s=10)
    assert all(300 <= r.at < 310 for r in plan(Workload([stream]), [], MAKER))


def trace_file(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"p{i}", "completion": "x y", "adapter": f"t{i % 2}", "output_length": 3 + i} for i in range(4)]
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return str(path)


def test_prompts_of_a_file_are_used_once_before_any_twice(tmp_path: Path) -> None:
    trace_lengths = Lengths("trace")
    stream = Stream(
        Arrivals("burst"), AdapterChoice("trace"), trace_lengths, trace_lengths,
        num_requests=8, trace=Trace(trace_file(tmp_path)),
    )  # fmt: skip
    planned = plan(Workload([stream]), ADAPTERS, MAKER)
    assert Counter(str(r.prompt) for r in planned) == {f"p{i}": 2 for i in range(4)}
    assert all(r.output_len == 3 + int(str(r.prompt)[1]) for r in planned)
    assert {r.adapter for r in planned} == {"a", "b"}


def test_synthetic_input_ignores_the_prompts_of_the_file(tmp_path: Path) -> None:
    stream = Stream(
        Arrivals("burst"), AdapterChoice("none"), Lengths(value=5), Lengths("trace"),
        num_requests=2, trace=Trace(trace_file(tmp_path)),
    )  # fmt: skip
    assert all(len(str(r.prompt).split()) == 5 for r in plan(Workload([stream]), [], MAKER))


def test_rescaling_keeps_the_shares() -> None:
    planned = plan(rescale_rate(two_clients(), 6.0), ADAPTERS, MAKER)
    assert Counter(r.tenant for r in planned) == {"a": 40, "b": 80}


def test_rescaling_a_trace_changes_its_clock(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"timestamp": {i * 500}, "input_length": 4, "output_length": 2}}\n' for i in range(11)))
    spec = Stream(Arrivals("trace"), AdapterChoice("none"), Lengths("trace"), Lengths("trace"), trace=Trace(str(path)))
    planned = plan(rescale_rate(Workload([spec]), 20.0), [], MAKER)
    assert planned[-1].at == pytest.approx(0.5)


def test_toml_file_and_a_typo_in_it(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text("[[streams]]\nduration_s = 2\narrival = { process = 'fixed', rate = 3 }\n")
    assert len(plan(load_workload(str(path)), ADAPTERS, MAKER)) == 6
    path.write_text("[[streams]]\nduration_s = 2\narrival = { proces = 'fixed' }\n")
    with pytest.raises(ValueError, match=r"unknown field `proces` - at `\$\.streams\[0\]\.arrival`"):
        load_workload(str(path))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Workload([]), "at least one stream"),
        (lambda: Stream(Arrivals("trace")), "no trace"),
        (lambda: Stream(num_requests=0), "num_requests"),
        (lambda: Workload([Stream()], classes={"x": Objective(share=0.7), "y": Objective(share=0.7)}), "shares"),
        (lambda: Workload([Stream()], weights={"x": 0}), "weights"),
        (lambda: Objective(ttft_ms=-1), "above 0 ms"),
        (lambda: plan(Workload([Stream(duration_s=1e-9)]), ADAPTERS, MAKER), "no requests"),
    ],
)
def test_impossible_workloads_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
