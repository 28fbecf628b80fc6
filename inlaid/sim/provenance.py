"""Where a figure comes from: written into every file of results, so that a number can be made again."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from inlaid import __version__

ROOT = Path(__file__).resolve().parents[2]


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Commit (with + when files were changed), versions, processor and command."""
    return {
        "version": __version__,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "inlaid") else ""),
        "python": platform.python_version(),
        "processor": _processor(),
        "command": " ".join(["python -m", *_module_and_arguments()]),
        **({} if seed is None else {"seed": seed}),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""  # not a clone
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor()


def _module_and_arguments() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name, *sys.argv[1:]]
