"""Provenance of an evaluation: the machine, and hashes of the code, bases, adapters and tokenizers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import inlaid
from inlaid.checkpoint import Checkpoint
from inlaid.model.weights import base_version
from inlaid.report.provenance import gpu, now, provenance

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "sacrebleu", "rouge-score", "nltk", "numpy")


def base_identity(folder: Path) -> str:
    """Return the base's version, as the server knows it."""
    return base_version(Checkpoint(folder))


def tokenizer_identity(folder: Path) -> str:
    """Return the hash of the files that turn text to tokens and decide where answers end."""
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    )
    return _digest(folder / name for name in names)


def code_identity(*parts: str) -> str:
    """Return the hash of the source of parts of the package: a result computed by other code is another result."""
    package = Path(inlaid.__file__).parent
    files: list[Path] = []
    for part in parts:
        path = package / part
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return _digest(files)[:16]


def report_head(seconds: float) -> dict[str, Any]:
    """Return the provenance at the head of a report."""
    return {
        **provenance(packages=PACKAGES),
        "finished": now(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(os.times()[:4]), 1),  # of this process and its workers
        "threads": torch.get_num_threads(),
        "gpu": gpu(),
    }


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.exists():
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
