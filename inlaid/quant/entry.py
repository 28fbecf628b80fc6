"""The way from the command line to `inlaid quantize` and `inlaid task`. It is passed before torch is loaded, as how the
threads of a matrix product wait for one another must be set before that.

By default they wait in busy loops. On a machine where others work too, a thread that has lost its core keeps all others
spinning, and a job takes 6 to 25 times as long as with one thread. Here they sleep while they wait, and there is one
for each core but one, as in the engine. OMP_WAIT_POLICY and OMP_NUM_THREADS, where they are set, are obeyed.
"""

from __future__ import annotations

import argparse
import importlib
import os
from typing import Any


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `inlaid quantize`."""
    _command().add_quantize_arguments(parser)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs of `inlaid task`."""
    _command().add_task_arguments(parser)


def run_quantize(args: argparse.Namespace) -> int:
    """Run `inlaid quantize`; returns the exit status."""
    return int(_command().run_quantize(args))


def run_task(args: argparse.Namespace) -> int:
    """Run `inlaid task`; returns the exit status."""
    return int(_command().run_task(args))


def _command() -> Any:
    """Load the commands, and torch with them, with threads that leave room for others."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = importlib.import_module("inlaid.quant.command")
    if "OMP_NUM_THREADS" not in os.environ:
        importlib.import_module("torch").set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    return command
