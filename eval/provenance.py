"""What a result was made with: commit, versions, machine, and hashes of the code, bases, adapters and tokenizers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import inlaid
from eval.task import ROOT
from inlaid.checkpoint import Checkpoint
from inlaid.model.weights import base_version

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "sacrebleu", "rouge-score", "nltk", "numpy")


def base_identity(folder: Path) -> str:
    """The base's version, as the server knows it."""
    return base_version(Checkpoint(folder))


def adapter_identity(folder: Path) -> str:
    """The adapter's content hash, as `inlaid.adapters.peft` computes it; also for an adapter that it would refuse."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    return hashlib.sha256(hashlib.sha256(config.read_bytes()).digest() + weights.read_bytes()).hexdigest()


def tokenizer_identity(folder: Path) -> str:
    """What turns text to tokens and decides where answers end."""
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    )
    return _digest(folder / name for name in names)


def code_identity(*parts: str) -> str:
    """The source of parts of the package: a result computed by other code is another result."""
    package = Path(inlaid.__file__).parent
    files: list[Path] = []
    for part in parts:
        path = package / part
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return _digest(files)[:16]


def provenance(seconds: float) -> dict[str, Any]:
    """What stands at the head of a report."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "inlaid", "eval")),
        "command": " ".join(["python -m eval.run", *sys.argv[1:]]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(os.times()[:4]), 1),  # of this process and its workers
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "inlaid": inlaid.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.exists():
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """None outside a clone."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
