"""Tasks: what to ask, how, and how to judge it, each in one declarative file under `tasks/`: the one list of tasks,
which `data/download.sh` reads too. A user adds a task by adding a file; `run` reads them by name or by path.

    family = "maths"                       # tasks of one family share an axis in figures
    licence = "MIT"                        # of the data
    [data]
    file = "data/maths/eval.jsonl"         # one example a line, paths from the repository's root; or
    hub = "openai/gsm8k"                   # a data set of the Hugging Face hub (config, split, train, revision)
    [prompt]
    text = "{{ question }}"                # Jinja over the example's fields
    target = " {{ answer }}"               # the reference answer
    chat = true                            # put the text through the model's chat template
    choices = ["A", "B"]                   # only for choice_accuracy: the answers to compare by likelihood
    [decoding]
    max_tokens = 96
    stop = ["\\n\\n"]
    [metric]
    primary = "final_number"               # decides drops and the gate
    also = ["bleu"]                        # reported beside it
    [code]                                 # only for pass_at_1
    cases = "{{ cases | tojson }}"         # [input, output] pairs for an expression over x; or
    tests = "{{ test }}"                   # assertions over the names that `program` defines
    program = "{{ prompt }}{{ answer_text }}"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import msgspec

from eval import hub

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "tasks"
DRAWN = ROOT / "data/cache/real"  # what `data.real_tasks` draws from its seed


class TaskError(ValueError):
    """A task's file or data cannot be used; the message says which and what would fix it."""


class Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    file: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "test"
    train: str | None = None  # the split that `data/download.sh` fetches for training
    revision: str | None = None

    def __post_init__(self) -> None:
        if (self.file is None) == (self.hub is None):
            raise ValueError("give either `file` or `hub`")


class Prompt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    text: str
    target: str
    chat: bool = True
    choices: tuple[str, ...] = ()


class Decoding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_tokens: int
    stop: tuple[str, ...] = ()


class MetricNames(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    primary: str
    also: tuple[str, ...] = ()


class Code(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cases: str | None = None
    tests: str | None = None
    program: str = "{{ answer_text }}"

    def __post_init__(self) -> None:
        if (self.cases is None) == (self.tests is None):
            raise ValueError("give either `cases` or `tests`")


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str = ""  # the file's name
    family: str
    description: str = ""
    licence: str
    adapter: str | None = None  # folder of the adapter that answers it, from the repository's root
    base: str = "demo"  # the base that the adapter is for: demo or smollm2
    calibration: str | None = None  # file that quantizing reads for this task
    expected: float | None = None  # the primary score that the adapter is known to reach in full precision
    data: Data
    prompt: Prompt
    decoding: Decoding
    metric: MetricNames
    code: Code | None = None

    def __post_init__(self) -> None:
        names = (self.metric.primary, *self.metric.also)
        if ("choice_accuracy" in names) != bool(self.prompt.choices):
            raise ValueError("`choices` and the metric choice_accuracy go together")
        if ("pass_at_1" in names) != (self.code is not None):
            raise ValueError("a [code] table and the metric pass_at_1 go together")


@dataclass(frozen=True)
class Example:
    """One question, rendered; `fields` is what the data held."""

    id: str
    text: str
    target: str
    choices: tuple[str, ...]
    fields: Mapping[str, Any]


def names() -> list[str]:
    """Return the names of the tasks that come with the repository."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Task:
    """Read a task by its name, or by the path of its file."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        task = msgspec.toml.decode(path.read_bytes(), type=Task)
    except FileNotFoundError as error:
        raise TaskError(f"there is no task {name!r}; known: {', '.join(names())}; or give a .toml file") from error
    except ImportError as error:  # Python 3.10 has no TOML reader of its own
        raise TaskError(f"{path} cannot be read: pip install tomli") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise TaskError(f"{path}: {error}") from error
    return msgspec.structs.replace(task, name=path.stem)


def examples(task: Task, limit: int | None = None) -> list[Example]:
    """Return the first `limit` examples, rendered."""
    rows = _rows(task, limit)
    if not rows:
        raise TaskError(f"task {task.name} has no examples")
    return [_example(task, index, row) for index, row in enumerate(rows)]


def fingerprint(task: Task, asked: Sequence[Example]) -> str:
    """Hash everything of a task that an answer or its score depends on."""
    definition = msgspec.json.encode(task)
    content = json.dumps([[e.text, e.target, e.choices, dict(e.fields)] for e in asked], sort_keys=True, default=str)
    return hashlib.sha256(definition + content.encode()).hexdigest()


def render(template: str, fields: Mapping[str, Any], task: Task) -> str:
    """Render a Jinja template over an example's fields; a field that the data lacks is an error."""
    try:
        return _JINJA.from_string(template).render(fields)
    except jinja2.TemplateError as error:
        known = ", ".join(sorted(fields))
        raise TaskError(f"task {task.name}: template {template!r}: {error}; the data has: {known}") from error


_JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


def _rows(task: Task, limit: int | None) -> list[dict[str, Any]]:
    data = task.data
    if data.hub is not None:
        try:
            return hub.rows(data.hub, data.config, data.split, data.revision, limit)
        except hub.HubUnreachable as error:
            what = f"data set {data.hub} ({data.config}, {data.split}) cannot be loaded"
            raise TaskError(f"task {task.name}: {what}: {error}") from error
        except hub.HubError as error:
            raise TaskError(f"task {task.name}: {error}") from error
    assert data.file is not None
    path = ROOT / data.file
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[:limit] if line.strip()]
    except FileNotFoundError as error:
        drawn = path.is_relative_to(DRAWN)
        hint = f"; draw it: python -m data.real_tasks --out {DRAWN.relative_to(ROOT)}" if drawn else ""
        raise TaskError(f"task {task.name}: {path} does not exist{hint}") from error
    except ValueError as error:
        raise TaskError(f"task {task.name}: {path} is not JSON lines: {error}") from error


def _example(task: Task, index: int, row: dict[str, Any]) -> Example:
    if not isinstance(row, dict):
        raise TaskError(f"task {task.name}: example {index} is not a JSON object")
    choices = tuple(render(choice, row, task) for choice in task.prompt.choices)
    target = render(task.prompt.target, row, task)
    if choices and target not in choices:
        raise TaskError(f"task {task.name}: example {index}: target {target!r} is none of the choices {choices}")
    text = render(task.prompt.text, row, task)
    return Example(str(row.get("id", index)), text, target, choices, row)
