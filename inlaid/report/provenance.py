"""Provenance of a result: the fields at the head of every file of results, so that a figure can be made again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from inlaid import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("inlaid", "eval/*.py", "perf/*.py")  # a change of these files marks the commit with a plus sign


def provenance(seed: int | None = None, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return commit (with + when sources were changed), versions, processor and command, and what was asked for.

    `packages` names installed distributions whose versions belong to the result.
    """
    return {
        "version": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "processor": processor(),
        "command": command(),
        **({} if seed is None else {"seed": seed}),
        **({"packages": {name: package_version(name) for name in packages}} if packages else {}),
    }


def commit() -> str:
    """Return the short commit, with + when sources were changed; empty outside a clone.

    INLAID_COMMIT in the environment names it where the sources were copied without their repository.
    """
    if given := os.environ.get("INLAID_COMMIT"):
        return given
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", *SOURCES) else "")


def git(*arguments: str, strip: bool = True) -> str:
    """Return the output of a git command about this repository; empty where it fails or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    said = done.stdout.decode(errors="replace")
    return said.strip() if strip else said


def processor() -> str:
    """Return the processor's name and number of threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor()


def gpu() -> str | None:
    """Return name, driver and clock of the first visible GPU as the driver tells them; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        done = subprocess.run([*query, *(["-i", visible] if visible else [])], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def command() -> str:
    """Return the command line of this process, as it can be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return " ".join(["python -m", module, *sys.argv[1:]])


def package_version(name: str) -> str | None:
    """Return an installed distribution's version, or None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def now() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
