"""One try at one point: start the server, wait until it is ready, send the workload, end everything.

Used by `perf.runner`. Whatever happens, all processes started are gone when `run_attempt` returns.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec

from perf.instance import Instance
from perf.process import Supervised, child_environment, free_port, wait_ready
from perf.random_adapters import folder_for, make_adapters
from perf.template import ADAPTER_ROOT


def run_attempt(instance: Instance, workload: Path, directory: Path, lock: int) -> str:
    """Run a point; return why it failed, or nothing. `lock` stays held while a process of it lives."""
    _make_adapters(instance)
    port = instance.port or free_port()
    env = child_environment(instance.environment)
    _record_environment(instance, directory)
    processes: list[Supervised] = []
    try:
        server = Supervised(instance.server_argv(port), directory, "server", env, [lock])
        processes.append(server)
        problem = wait_ready(server, instance.ready_url(port), instance.ready_timeout_s)
        if problem:
            return problem
        summary = directory / "summary.json"
        command = instance.client_argv(port, workload, summary)
        if instance.server.kind == "inlaid":
            command += ["--server-log", str(server.error_log)]
        client = Supervised(command, directory, "client", env, [lock])
        processes.append(client)
        problem = _watch(server, client, instance.point_timeout_s)
    finally:
        for process in reversed(processes):
            process.stop()
    return problem or verdict(summary, instance.max_failed_share)


def verdict(summary: Path, max_failed_share: float) -> str:
    """Judge a summary, after a run and on resume; return why it does not count, or nothing."""
    if not summary.is_file():
        return "the client wrote no summary"
    figures: dict[str, Any] = msgspec.json.decode(summary.read_bytes())
    if figures["interrupted"]:
        return "the client was interrupted"
    total = figures["completed"] + figures["failed"]
    failed = figures["failed"] - figures["statuses"].get("refused", 0)
    if failed / total > max_failed_share:
        return f"{failed} of {total} requests failed: {figures['statuses']}"
    return ""


def _make_adapters(instance: Instance) -> None:
    spec, base = instance.random_adapters, instance.server.model
    if spec is not None:
        make_adapters(Path(base), spec, folder_for(base, spec, ADAPTER_ROOT))


def _record_environment(instance: Instance, directory: Path) -> None:
    """Record the variables that the config set, and the values of the surrounding shell that it replaced."""
    replaced = {k: os.environ[k] for k, v in instance.environment.items() if os.environ.get(k, v) != v}
    record = msgspec.json.encode({"set": instance.environment, "replaced": replaced})
    (directory / "environment.json").write_bytes(msgspec.json.format(record, indent=2) + b"\n")


def _watch(server: Supervised, client: Supervised, timeout_s: float) -> str:
    """Wait for the client to end; a server that ends before it, or too long a run, is a failure."""
    end = time.monotonic() + timeout_s
    while (code := client.wait(0.1)) is None:
        server_code = server.ended()
        if server_code is not None:
            return f"the server exited with {server_code} during the run: {server.last_words()}"
        if time.monotonic() > end:
            return f"the run took more than {timeout_s:g} s"
    return "" if code == 0 else f"the client exited with {code}: {client.last_words()}"
