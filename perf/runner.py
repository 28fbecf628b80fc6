"""`python -m perf.runner`: run grids of experiments from templates, and resume one that was stopped.

Exit codes: 0 all points passed, 1 some failed, 2 nothing could be started (one clear line says why),
130 interrupted (go on with --checkpoint).
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import msgspec

from inlaid.flags import Parser
from inlaid.progress import Bar
from perf.archive import Archive, create_archive, git_revision
from perf.attempt import run_attempt, verdict
from perf.instance import Instance
from perf.known_flags import why_no_client, why_not
from perf.launch import how_to_get, why_absent
from perf.process import ROOT, child_environment, port_is_free
from perf.random_adapters import bytes_to_make, folder_for
from perf.sections import Global
from perf.template import ADAPTER_ROOT, TemplateError, instantiate, template_settings

COLOURS = MappingProxyType({"passed": "32", "failed": "31", "skipped": "34", "running": "33"})
COLUMNS = (
    "completed", "failed", "duration", "request_throughput", "output_throughput", "request_goodput",
    "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_itl_ms", "p99_itl_ms", "mean_e2el_ms",
)  # fmt: skip


class Runner:
    """Owner of the loop over an archive's points and of its messages."""

    def __init__(self, archive: Archive, retries: int, colour: bool) -> None:
        self.archive, self.retries, self.colour = archive, retries, colour
        self.failed: dict[str, str] = {}

    def run(self) -> int:
        self._adopt_finished()
        done = self.archive.passed()
        bar = Bar(total=len(self.archive.points), initial=len(done), unit="point")
        try:
            for point in self.archive.points:
                if point in done:
                    self._say("skipped", point, "has passed before")
                    continue
                self._run_point(point)
                bar.update()
        finally:
            bar.close()
        write_results(self.archive)
        write_report(self.archive)
        print(f"{len(self.archive.passed())} passed, {len(self.failed)} failed: {self.archive.home}")
        return 1 if self.failed else 0

    def _adopt_finished(self) -> None:
        """Count a point whose result was whole when the runner was killed as passed; it is not run again."""
        for event in self.archive.unfinished():
            directory = self.archive.attempt_directory(event.point, event.attempt)
            limit = self.archive.instance(event.point).max_failed_share
            if verdict(directory / "summary.json", limit) == "":
                self.archive.append("passed", point=event.point, attempt=event.attempt, reason="found finished")
            else:
                self.archive.append("interrupted", point=event.point, attempt=event.attempt)

    def _run_point(self, point: str) -> None:
        for attempt in range(self.retries + 1):
            reason = self._try(point)
            if not reason:
                return
            self._say("failed", point, reason + (" (will be tried again)" if attempt < self.retries else ""))
        self.failed[point] = reason

    def _try(self, point: str) -> str:
        """Make one attempt, recorded before and after; return why it failed, or nothing."""
        number, directory = self.archive.new_attempt(point)
        self.archive.append("started", point=point, attempt=number)
        self._say("running", point, f"attempt {number}")
        start = time.monotonic()
        instance = self.archive.instance(point)
        workload = self.archive.directory(point) / "workload.json"
        try:
            reason = run_attempt(instance, workload, directory, self.archive.lock)
        except KeyboardInterrupt:
            self.archive.append("interrupted", point=point, attempt=number)
            raise
        except (OSError, ValueError) as error:  # a disk that is full, an adapter that cannot be made
            reason = f"{type(error).__name__}: {error}"
        seconds = round(time.monotonic() - start, 3)
        outcome: Any = "failed" if reason else "passed"
        self.archive.append(outcome, point=point, attempt=number, seconds=seconds, reason=reason)
        if not reason:
            self._say("passed", point, f"{seconds:.1f} s")
        return reason

    def _say(self, status: str, point: str, text: str) -> None:
        shown = f"\033[{COLOURS[status]}m{status}\033[0m" if self.colour else status
        Bar.write(f"{shown:8} {point}: {text}")


def write_results(archive: Archive) -> None:
    """Write a line per point that passed, its labels and main figures, as CSV and as JSON."""
    rows: list[dict[str, Any]] = []
    for point, attempt in archive.passed().items():
        summary = json.loads((archive.attempt_directory(point, attempt) / "summary.json").read_text())
        extra = {
            "slo_attainment": summary["slo"] and summary["slo"]["attainment"],
            "jct_mean_s": summary["jct"].get("mean_s"),
            "jain_service": summary["fairness"]["jain_service"],
            "lateness_p99_ms": summary["lateness_ms"]["p99"],
        }
        figures = {column: summary.get(column) for column in COLUMNS}
        rows.append({"point": point, **archive.instance(point).labels, **figures, **extra})
    rows.sort(key=lambda row: archive.points.index(row["point"]))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (archive.home / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    (archive.home / "results.json").write_text(json.dumps(rows, indent=1) + "\n")


def write_report(archive: Archive) -> None:
    """Make the report in a process of its own: a plot that fails is reported and costs no result."""
    passed = archive.passed()
    summaries = [archive.attempt_directory(p, passed[p]) / "summary.json" for p in archive.points if p in passed]
    if not summaries:
        return
    command = [sys.executable, "-m", "perf.report", *map(str, summaries), "--out", str(archive.home / "report.html")]
    done = subprocess.run(command, env=child_environment({}), capture_output=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        print(f"perf.runner: no report was made ({reason[0]}); results.csv is complete", file=sys.stderr)


def check_startable(instances: list[Instance]) -> None:
    """Check what only this machine can tell, before anything starts; raise TemplateError with one line."""
    refused = {key: reason for instance in instances for key, reason in instance.refused.items()}
    if refused:
        named = "; ".join(f"{key} ({reason})" for key, reason in refused.items())
        raise TemplateError(f"keys that cannot be honoured: {named}. Remove them, or name them in global.without")
    for instance in instances:
        absent = why_absent(instance.server.kind)
        if absent:
            raise TemplateError(f"{instance.point}: {absent}")
        problem = not_startable(instance)
        if problem:
            raise TemplateError(f"{instance.point}: {problem}")
    problem = no_room(instances)
    if problem:
        raise TemplateError(problem)
    for port in sorted({instance.port for instance in instances} - {0}):
        if not port_is_free(port):
            raise TemplateError(f"port {port} is in use: stop what listens there, or set router.port (0: any free one)")


def not_startable(instance: Instance) -> str:
    """Say why server or generator would give up at once, or nothing."""
    return instance.missing or why_not(instance.server) or why_no_client(instance) or missing_paths(instance)


def missing_paths(instance: Instance) -> str:
    """Say which model, tokenizer or adapter is not at its path, or nothing; a hub id is left alone."""
    model = instance.server.model
    if model.startswith(("/", ".", "models/")) and not Path(model).is_dir():
        return f"model {model} does not exist: {how_to_get(model)}"
    config = Path(model) / "config.json"
    if instance.num_hidden_layers is not None and config.is_file():
        layers = json.loads(config.read_text()).get("num_hidden_layers")
        if layers != instance.num_hidden_layers:
            return f"{config} has {layers} layers, the template says {instance.num_hidden_layers}: another model?"
    tokenizer = instance.client.get("tokenizer")
    if tokenizer and not Path(tokenizer).exists():
        return f"tokenizer {tokenizer} does not exist"
    if instance.random_adapters is None:
        for name, path in instance.server.adapters:
            if not Path(path).is_dir():
                return f"adapter {name}: {path} does not exist"
    return ""


def no_room(instances: list[Instance]) -> str:
    """Say that the random adapters still to be made do not fit on the disk (a thousand may be 100 GB), or nothing."""
    wanted: dict[Path, int] = {}
    for instance in instances:
        if instance.random_adapters is not None:
            folder = folder_for(instance.server.model, instance.random_adapters, ADAPTER_ROOT)
            need = bytes_to_make(Path(instance.server.model), instance.random_adapters, folder)
            wanted[folder] = max(need, wanted.get(folder, 0))
    need, free = sum(wanted.values()), shutil.disk_usage(ROOT).free
    if need <= free:
        return ""
    return f"random adapters need {need / 1e9:.1f} GB in {ADAPTER_ROOT}, and {free / 1e9:.1f} GB are free"


def build_parser() -> Parser:
    parser = Parser(prog="perf.runner", description="Run grids of experiments from templates.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--templates", nargs="+", type=Path, metavar="T.toml")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="an archive: run what has not passed yet")
    parser.add_argument("--force", action="store_true", help="with --checkpoint: run everything again")
    parser.add_argument("--dry-run", action="store_true", help="write everything, start nothing")
    parser.add_argument("--first", type=int, metavar="N", help="with --templates: only the first N points of each")
    parser.add_argument("--color", action="store_true", help="coloured output")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.force and not arguments.checkpoint:
        parser.error("--force needs --checkpoint DIR: without an archive there is nothing to run again")
    if arguments.first is not None and (arguments.first < 1 or arguments.checkpoint):
        parser.error("--first takes a number of 1 or more, and --templates: it says how many points to run of each")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.templates:
            return start(arguments)
        return resume(arguments)
    except KeyboardInterrupt:
        print("perf.runner: interrupted; go on with --checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, msgspec.DecodeError) as error:
        print(f"perf.runner: {error}", file=sys.stderr)
        return 2


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def start(arguments: argparse.Namespace) -> int:
    """Check everything, write the archive, run it."""
    instances: list[Instance] = []
    for template in arguments.templates:
        instances += instantiate(template, dry=arguments.dry_run)[: arguments.first]
    names = [instance.point for instance in instances]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise TemplateError(f"two templates both have the point {twice}: run them apart, or rename a dataset")
    settings = template_settings(arguments.templates[0])
    if not arguments.dry_run:
        check_startable(instances)
    name = settings.name or arguments.templates[0].stem
    archive = create_archive(Path(settings.log_home), name, arguments.templates, instances)
    print(f"{len(instances)} points in {archive.home}", flush=True)
    if arguments.dry_run:
        _say_dry(instances)
        return 0
    return _run(archive, settings, arguments.color)


def _say_dry(instances: list[Instance]) -> None:
    """Print what a real run would refuse or miss."""
    for instance in instances:
        print(instance.point)
    refused = {key: reason for instance in instances for key, reason in instance.refused.items()}
    for key, reason in refused.items():
        print(f"refused: {key}: {reason}")
    for problem in dict.fromkeys(filter(None, map(not_startable, instances))):
        print(f"not startable here: {problem}")


def resume(arguments: argparse.Namespace) -> int:
    archive = Archive(arguments.checkpoint)
    with archive.held():
        if arguments.force and not arguments.dry_run:
            archive.append("forced")
        left = [archive.instance(point) for point in archive.points if point not in archive.passed()]
        if arguments.dry_run:
            _say_dry(left)
            return 0
        if left:
            check_startable(left)
        archive.append("resumed", revision=git_revision())
        template = sorted((archive.home / "templates").iterdir())[0]
        return Runner(archive, template_settings(template).retries, arguments.color).run()


def _run(archive: Archive, settings: Global, colour: bool) -> int:
    with archive.held():
        return Runner(archive, settings.retries, colour).run()


if __name__ == "__main__":
    sys.exit(main())
