"""Tables over seeds: what they say follows from the records."""

from __future__ import annotations

from typing import Any

from eval import seeds

OURS = "mlgptq-minimax-loss"


def records(seed: int, worst: dict[str, float]) -> list[dict[str, Any]]:
    """Two tasks at three bits: a variant loses nothing on the first and so much on the second; nats are a tenth."""
    found = []
    for variant, lost in {"fp16": 0.0, **worst}.items():
        for task, drop in (("a", 0.0), ("b", lost)):
            found.append(
                {"variant": variant, "bits": 16 if variant == "fp16" else 3, "seed": seed, "task": task,
                 "adapter": task, "score": 100.0 - drop, "drop": drop, "nats_gained": drop / 10,
                 "also": {"bleu": drop}, "faults": []}
            )  # fmt: skip
    return found


def rows(text: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[column.strip() for column in line] for line in lines[2:]]


def test_the_worst_task_is_weighed_over_seeds() -> None:
    found = [
        *records(0, {"gptq-mixed": 30.0, OURS: 10.0, "mlgptq-mean": 4.0, "per-task": 2.0}),
        *records(1, {"gptq-mixed": 20.0, OURS: 18.0, "mlgptq-mean": 26.0, "per-task": 4.0}),
    ]
    points, nats = rows(seeds.worst_task(found))
    assert points == ["3", "points", "minimax-loss 14.00 (10.00..18.00)", "14.00 (10.00..18.00)",
                      "25.00 (20.00..30.00)", "3.00 (2.00..4.00)", "yes", "50%"]  # fmt: skip
    assert nats[-2:] == ["yes", "50%"]
    (late,) = (r for r in found if (r["variant"], r["seed"], r["task"]) == (OURS, 1, "b"))
    late |= {"drop": 21.0, "nats_gained": 2.1}
    points, _ = rows(seeds.worst_task(found))
    assert points[2].startswith("mean 15.00")
    assert points[-2] == "no"


def test_what_is_not_whole_is_left_out() -> None:
    whole = records(0, {"rtn": 40.0, "awq": 0.0, "per-task": 1.0})[:-1]
    assert seeds.worst_task(whole) == ""
    assert rows(seeds.average_and_worst(whole)) == [
        ["rtn", "20.00", "40.00", "b", "2.000", "4.000", "b"],
        ["awq", "0.00", "0.00", "none", "0.000", "0.000", "none"],
    ]


def test_merged_records_hold_means() -> None:
    found = [*records(0, {"rtn": 10.0}), *records(1, {"rtn": 30.0})[2:]]
    merged = {(r["variant"], r["task"]): r for r in seeds.merged(found)}
    assert len(merged) == 4
    assert (merged["rtn", "b"]["drop"], merged["rtn", "b"]["also"]["bleu"]) == (20.0, 20.0)
    assert merged["fp16", "a"]["score"] == 100.0
    assert seeds.seeds_of(found) == [0, 1]
