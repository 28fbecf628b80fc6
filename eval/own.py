"""Tasks of one's own from a bare file: `--task NAME=FILE.jsonl:METRIC`, without a task file.

Lines are read as the quantizer reads calibration data (`inlaid.quant.examples`), each with one prompt and its answer.
The metric is one of `eval.metrics`, or a Python function MODULE.NAME of the answer's text and of {"prompt", "answer"},
which returns a number from 0 to 1 (or a truth value).
"""

from __future__ import annotations

from pathlib import Path

from eval import metrics
from eval.task import Data, Decoding, Example, MetricNames, Prompt, Task, TaskError
from inlaid.quant import examples
from inlaid.quant.examples import CalibrationError

MAX_TOKENS = 256
SHORT_NAMES = (("exact", "exact_match"),)


def load(text: str, limit: int | None) -> tuple[Task, list[Example]]:
    """Read NAME=FILE:METRIC into a task and its first `limit` examples."""
    name, equals, rest = text.partition("=")
    file, colon, metric = rest.rpartition(":")
    if not (name and equals and file and colon and metric):
        raise TaskError(
            f"--task {text}: write NAME=FILE.jsonl:METRIC; metrics: {', '.join(metrics.METRICS)}, or a function"
        )
    metric = dict(SHORT_NAMES).get(metric, metric)
    if metric in ("choice_accuracy", "pass_at_1"):
        raise TaskError(f"--task {text}: {metric} needs a task file, see eval/task.py")
    metrics.find(metric)
    task = Task(
        name=name,
        family=name,
        licence="not stated",
        data=Data(file=str(Path(file).resolve())),
        prompt=Prompt(text="{{ prompt }}", target="{{ answer }}"),
        decoding=Decoding(max_tokens=MAX_TOKENS),
        metric=MetricNames(primary=metric),
    )
    return task, _examples(Path(file), limit)


def _examples(file: Path, limit: int | None) -> list[Example]:
    try:
        read = examples.read_examples(file)
    except CalibrationError as error:
        raise TaskError(f"--task: {error}") from error
    found = []
    for number, one in enumerate(read[:limit], 1):
        if not one.answer or len(one.turns) != 1:
            raise TaskError(f"--task: {one.where} needs an answer to compare with, and a single prompt before it")
        found.append(Example(str(number), one.prompt, one.answer, (), {"prompt": one.prompt, "answer": one.answer}))
    return found
