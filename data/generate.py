"""Write the committed splits of the twelve tasks, `tasks.json` and `hashes.json`: `python -m data.generate`.

The files follow from the seed alone; `--check` compares instead of writing and exits 1 on any difference.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data.tasks import SPLITS, TASKS, DemoTask
from inlaid.flags import Parser
from inlaid.progress import Bar

FOLDER = Path(__file__).parent
SEED = "0"
SIZES = MappingProxyType({"train": 256, "calibration": 128, "eval": 256})


def split_text(task: DemoTask, split: str) -> str:
    """Return the jsonl text of one split: one example a line, each with its id."""
    drawn = itertools.islice(task.examples(split, SEED), SIZES[split])
    lines = ({"id": f"{task.name}/{split}/{index}", **example} for index, example in enumerate(drawn))
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def task_facts(task: DemoTask) -> dict[str, Any]:
    return {
        "family": task.family,
        "metric": task.metric,
        "max_tokens": task.max_tokens,
        "description": task.description,
        "adapter": f"models/demo/adapters/{task.name}",
        "splits": {split: f"data/{task.name}/{split}.jsonl" for split in SPLITS},
    }


def all_files(names: Iterable[str] = TASKS) -> dict[str, str]:
    """Path under data/ -> text, for every generated file of these tasks, and the list of all."""
    files = {
        f"{task.name}/{split}.jsonl": split_text(task, split)
        for task in Bar([TASKS[name] for name in names], desc="drawing examples", unit="task")
        for split in SPLITS
    }
    files["tasks.json"] = json.dumps({name: task_facts(task) for name, task in TASKS.items()}, indent=2) + "\n"
    return files


def hashes(files: dict[str, str]) -> dict[str, str]:
    return {path: hashlib.sha256(text.encode()).hexdigest() for path, text in sorted(files.items())}


def load(task_name: str, split: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Return the committed examples of one split."""
    with (folder / task_name / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(folder: Path) -> None:
    files = all_files()
    files["hashes.json"] = json.dumps(hashes(files), indent=2) + "\n"
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def differences(folder: Path, files: dict[str, str]) -> list[str]:
    """Paths whose committed bytes, or whose recorded hash, differ from the generated `files`."""
    fresh = hashes(files)
    recorded = json.loads((folder / "hashes.json").read_text(encoding="utf-8"))
    stored = {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in fresh}
    return [path for path in fresh if not fresh[path] == recorded.get(path) == stored[path]]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m data.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files lie (default: data/)")
    arguments = parser.parse_args(argv)
    if not arguments.check:
        write(arguments.folder)
        return 0
    changed = differences(arguments.folder, all_files())
    for path in changed:
        print(f"{path} differs from what its generator gives; run `python -m data.generate`", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
