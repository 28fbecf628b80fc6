"""Run programs that a model wrote, each in a walled process of its own (`sandbox_child` says how), and judge them.

The expected values never enter the process: a program cannot read what it should answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Limits:
    """Limits of one program. The wall clock only has to be longer than the CPU limit on a busy machine."""

    cpu_seconds: int = 2
    wall_seconds: float = 20.0
    memory_bytes: int = 256 * 2**20


class ProgramFailed(Exception):
    """The program was refused, failed, or broke a limit; the message says which."""


def evaluate(source: str, inputs: list[Any], limits: Limits = Limits()) -> list[Any]:
    """Return the values of the expression `source`, with each input bound to the name x."""
    value = _run({"kind": "expression", "source": source, "inputs": inputs}, limits)
    if not isinstance(value, list):
        raise ProgramFailed("the sandbox replied with something else than a list")
    return value


def run_tests(source: str, tests: str, limits: Limits = Limits()) -> None:
    """Run a program and then tests over the names it defined; a failed assertion is a failure."""
    _run({"kind": "program", "source": source, "tests": tests}, limits)


def same(value: object, expected: object) -> bool:
    """Tell whether two values are equal and of one type throughout: 1 is not True, 2.0 is not 2."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(same(a, b) for a, b in zip(value, expected))
    return type(value) is type(expected) and value == expected


def _run(task: dict[str, Any], limits: Limits) -> Any:
    task = {**task, "memory_bytes": limits.memory_bytes, "cpu_seconds": limits.cpu_seconds}
    with tempfile.TemporaryDirectory(prefix="inlaid-sandbox-") as empty:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-W", "ignore", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={},
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(json.dumps(task).encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired as error:
            raise ProgramFailed(f"ran longer than {limits.wall_seconds:g} s") from error
        finally:
            _end(child)
    return _value(child.returncode, output)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the program's session."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def _value(returncode: int, output: bytes) -> Any:
    if returncode == 99:
        raise ProgramFailed("tried to leave the sandbox")
    if returncode == -signal.SIGXCPU or returncode == -signal.SIGKILL:
        raise ProgramFailed("used up its CPU time")
    try:
        reply = json.loads(output)
    except ValueError as error:
        raise ProgramFailed(f"ended without a result (exit code {returncode})") from error
    if "failure" in reply:
        raise ProgramFailed(reply["failure"])
    return reply["value"]
