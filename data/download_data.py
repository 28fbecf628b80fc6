"""Fetch the real tasks' data sets into data/cache: `python -m data.download_data gsm8k medmcqa`, or all of them.

The tasks are those of `eval/tasks/` that name a data set of the Hugging Face hub. Every row becomes a line {"id",
"prompt", "completion", "task"} by the task's own templates, so that adapters are trained on what evaluating asks. A
finished file is kept, so a broken run resumes at the file that it broke in.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

from data.fetching import DownloadError, fetch_each
from eval import hub, task
from eval.task import Task, TaskError
from inlaid.flags import Parser
from inlaid.progress import Bar

CACHE = Path(__file__).parent / "cache"


def real_tasks() -> dict[str, Task]:
    """Return the tasks that name a data set of the hub with a split for training."""
    loaded = [task.load(name) for name in task.names()]
    return {one.name: one for one in loaded if one.data.hub and one.data.train}


def download(chosen: Task, output: Path, limit: int) -> list[Path]:
    """Write train.jsonl and eval.jsonl of one task; a file appears under its name only when it is whole."""
    written = []
    for name, split in (("train", chosen.data.train), ("eval", chosen.data.split)):
        path = output / chosen.name / f"{name}.jsonl"
        if not path.exists():
            assert split is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write(path, chosen, split, limit)
            except (hub.HubError, TaskError) as error:
                raise DownloadError(_why(error, chosen)) from error
        written.append(path)
    return written


def _write(path: Path, chosen: Task, split: str, limit: int) -> None:
    part = path.with_suffix(".part")
    assert chosen.data.hub is not None
    rows = hub.rows(chosen.data.hub, chosen.data.config, split, chosen.data.revision, limit)
    with part.open("w", encoding="utf-8") as lines:
        for index, row in enumerate(Bar(rows, desc=f"{chosen.name}/{path.stem}", unit="row", leave=False)):
            line = {
                "id": f"{chosen.name}/{path.stem}/{index}",
                "prompt": task.render(chosen.prompt.text, row, chosen),
                "completion": task.render(chosen.prompt.target, row, chosen),
                "task": chosen.name,
            }
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    part.replace(path)


def _why(error: ValueError, chosen: Task) -> str:
    if not isinstance(error, hub.HubUnreachable):
        return str(error)
    return (
        f"could not fetch {chosen.data.hub}: {type(error.__cause__).__name__}; check that this machine reaches "
        f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}, and set HF_TOKEN if the data set asks for "
        "one, then run the same command again: it resumes."
    )


def main(argv: list[str] | None = None) -> int:
    """Fetch the named tasks, or all, and return the exit status."""
    known = real_tasks()
    parser = Parser(prog="python -m data.download_data", description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"all (the default), or some of: {', '.join(known)}")
    parser.add_argument("--output", type=Path, default=CACHE, help="folder to write (default: data/cache)")
    parser.add_argument("--limit", type=int, default=5000, help="rows a file at most (default: 5000)")
    arguments = parser.parse_args(argv)
    names = list(known) if arguments.tasks in ([], ["all"]) else arguments.tasks
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown task {unknown[0]}; choose from {', '.join(known)}")
    jobs = [(name, partial(download, known[name], arguments.output, arguments.limit)) for name in names]
    return fetch_each("download_data", jobs)


if __name__ == "__main__":
    sys.exit(main())
