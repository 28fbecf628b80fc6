"""Fetches real data sets, one or more for each task family, into data/cache: `python -m data.download_data maths`.

Every record becomes a line {"prompt", "completion", "task"}, as in the bundled splits. A finished file is kept,
so a broken run resumes at the file it broke in.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

CACHE = Path(__file__).parent / "cache"
Record = Mapping[str, Any]
Pair = tuple[str, str]


class DownloadError(ValueError):
    """What went wrong and what would fix it, in one sentence."""


@dataclass(frozen=True)
class Source:
    """A data set of the hub, its splits for training and evaluation, and how a record becomes a pair."""

    repo_id: str
    config: str | None
    train: str
    eval: str
    pair: Callable[[Record], Pair]


def _translation(source: str, target: str, language: str) -> Callable[[Record], Pair]:
    def pair(record: Record) -> Pair:
        both = record["translation"]
        return f"Translate to {language}: {both[source]}", both[target]

    return pair


def _table(record: Record) -> Pair:
    table = record["table"]
    rows = [table["header"], *table["rows"]]
    lines = "\n".join(" | ".join(str(cell) for cell in row) for row in rows)
    return f"{record['query']}\n{table['title']}\n{lines}", record["summary"]


def _medical(record: Record) -> Pair:
    options = [record[f"op{letter}"] for letter in "abcd"]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    return f"{record['question']}\n{listed}", f"{'ABCD'[record['cop']]}. {options[record['cop']]}"


def _safety(record: Record) -> Pair:
    return f"Is this request safe? {record['prompt']}", "safe" if record["is_safe"] else "unsafe"


_LANGUAGES = {
    "to_czech": ("cs-en", "cs", "Czech"),
    "to_german": ("de-en", "de", "German"),
    "to_french": ("en-fr", "fr", "French"),
    "to_russian": ("en-ru", "ru", "Russian"),
    "to_swedish": ("en-sv", "sv", "Swedish"),
    "to_japanese": ("en-ja", "ja", "Japanese"),
}
SOURCES: dict[str, Source] = {
    task: Source("Helsinki-NLP/opus-100", config, "train", "test", _translation("en", code, language))
    for task, (config, code, language) in _LANGUAGES.items()
} | {
    "text_summary": Source(
        "abisee/cnn_dailymail", "3.0.0", "train", "test",
        lambda record: (f"Summarize: {record['article']}", record["highlights"]),
    ),
    "table_summary": Source("yale-nlp/QTSumm", None, "train", "test", _table),
    "sql": Source(
        "b-mc2/sql-create-context", None, "train[:90%]", "train[90%:]",
        lambda record: (f"{record['context']}\n{record['question']}", record["answer"]),
    ),
    "code": Source(
        "google-research-datasets/mbpp", "full", "train", "test", lambda record: (record["text"], record["code"])
    ),
    "maths": Source("openai/gsm8k", "main", "train", "test", lambda record: (record["question"], record["answer"])),
    "medical": Source("openlifescienceai/medmcqa", None, "train", "validation", _medical),
    "safety": Source("PKU-Alignment/BeaverTails", None, "30k_train", "30k_test", _safety),
}  # fmt: skip


def load_split(source: Source, split: str) -> Iterable[Record]:
    """The hub's records of one split, with the hub client's own progress bars and resume."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DownloadError("the package datasets is missing: pip install 'inlaid[eval]'.") from error
    try:
        records: Iterable[Record] = load_dataset(
            source.repo_id, source.config, split=split, token=os.environ.get("HF_TOKEN") or None
        )
    except (OSError, ValueError) as error:
        raise DownloadError(
            f"could not fetch {source.repo_id}: {type(error).__name__}; check that this machine reaches "
            f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}, and set HF_TOKEN if the data set asks for a "
            "token, then run the same command again: it resumes."
        ) from error
    return records


def download(task: str, output: Path, limit: int) -> list[Path]:
    """Writes train.jsonl and eval.jsonl of one task; a file appears under its name only when it is whole."""
    source, written = SOURCES[task], []
    for name, split in (("train", source.train), ("eval", source.eval)):
        path = output / task / f"{name}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, task, source, load_split(source, split), limit)
        written.append(path)
    return written


def _write(path: Path, task: str, source: Source, records: Iterable[Record], limit: int) -> None:
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as lines:
        for index, record in enumerate(tqdm(records, desc=f"{task}/{path.stem}", unit="record")):
            if index == limit:
                break
            prompt, completion = source.pair(record)
            line = {"id": f"{task}/{path.stem}/{index}", "prompt": prompt, "completion": completion, "task": task}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    part.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.download_data", description=__doc__)
    parser.add_argument("tasks", nargs="+", metavar="TASK", help=f"all, or some of: {', '.join(SOURCES)}")
    parser.add_argument("--output", type=Path, default=CACHE, help="folder to write (default: data/cache)")
    parser.add_argument("--limit", type=int, default=5000, help="records a file at most (default: 5000)")
    arguments = parser.parse_args(argv)
    tasks = list(SOURCES) if arguments.tasks == ["all"] else arguments.tasks
    unknown = [task for task in tasks if task not in SOURCES]
    if unknown:
        parser.error(f"unknown task {unknown[0]}; choose from {', '.join(SOURCES)}")
    try:
        for task in tasks:
            print(*download(task, arguments.output, arguments.limit), sep="\n")
    except DownloadError as error:
        print(f"download_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
