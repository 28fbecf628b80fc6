"""One command for everything that is measured on a GPU: `python -m perf.gpu.bench --out FOLDER --call a --archive`.

Stages run one after another, each in a process of its own with a limit on its time, and each writes FOLDER/NAME.json
with what it found and where (commit, device, driver, versions, command), first as far as it has come and then whole;
what it says goes to NAME.log. A stage that fails or runs out of time is reported and the rest goes on. `--stages` picks
some; each `--lane` is a list of its own, and lists run side by side, each on a GPU, a share of the cores and a scratch
folder of its own, caches of compiled kernels included. `--call rows` (a, b, c) are the lanes of ten minutes. With
`--archive` FOLDER has one file, results.tar.gz, with what there is so far.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inlaid.report.provenance import gpu, now, provenance
from perf.gpu import ROOT
from perf.gpu.serving import caches

LIMITS = {  # seconds
    "tests": 110, "sweep": 100, "sweep-wide": 190, "sweep-parts": 210, "beside-7b": 240, "beside-8b": 200,
    "variants-7b": 130, "variants-8b": 130,
    "serve-7b": 200, "serve-8b": 170, "serve-7b-arrival": 150, "serve-8b-arrival": 120,
    "serve-7b-unified": 150, "serve-cliff-8b": 280, "serve-cliff-8b-largest": 280,
    "determinism-7b": 170, "startwarm-7b": 60, "ranks-7b": 160,
    "exllama-7b": 120, "exllama-demo": 90, "soak": 110,
    "demo": 90, "gates": 240, "micro": 300, "offline-7b": 150, "offline-8b": 130,
    "micro-decode_attention-pending": 90, "micro-ordered": 120,
    "starts-7b": 300, "starts-tiny": 100, "micro-decode_attention": 150,
    "sched": 240, "quant": 480,
    "adapters-load": 60, "adapters-modes": 230, "adapters-modes-cached": 120,
    "adapters-cliff-mixed": 120, "adapters-cliff-slots": 130, "adapters-cliff-resident": 100, "adapters-crossover": 150,
    "serve-tiny": 100, "serve-tiny-arrival": 100, "serve-cliff-tiny": 100, "ranks-tiny": 100, "variants-tiny": 100,
    "determinism-tiny": 60, "startwarm-tiny": 60,
}  # fmt: skip
CALLS = {  # the lanes of ten minutes
    "rows": (("serve-7b", "serve-8b", "startwarm-7b", "determinism-7b", "soak", "ranks-7b"),),
    "a": (
        ("serve-7b", "serve-8b", "serve-cliff-8b-largest", "ranks-7b", "startwarm-7b"),
        ("quant", "sweep"),
    ),
    "b": (
        ("sched", "exllama-7b", "starts-7b", "determinism-7b"),
        ("soak", "exllama-demo", "demo", "adapters-modes", "adapters-crossover", "gates"),
    ),
    "c": (
        ("serve-7b-arrival", "serve-8b-arrival", "variants-7b", "variants-8b"),
        ("adapters-load", "adapters-modes-cached", "adapters-cliff-slots", "adapters-cliff-resident"),
    ),
}
LOOK = 5.0  # seconds between the archive and what there is


def origin() -> dict[str, Any]:
    """Return where and with what a figure was made."""
    return {
        **provenance(packages=("torch", "triton")),
        "gpu": gpu() or "none",
        "command": "python -m perf.gpu.bench --out DIR --stages",
        "time": now(),
    }


def run_stage(name: str, out: Path, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The stage's own result, in this process; `keep` writes what there is so far."""
    from perf.gpu import (
        adapters,
        beside,
        demo,
        gates,
        micro,
        offline,
        quant_speed,
        sched,
        serving,
        soak,
        starts,
    )

    kind, _, rest = name.partition("-")
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": kernel_tests,
        "sweep": lambda: swept(rest, keep),
        "gates": lambda: gates.run(keep),
        "micro": lambda: micro.run(keep, tuple(rest.split("-")) if rest else tuple(micro.PARTS)),
        "demo": demo.run,
        "beside": lambda: beside.run(rest, keep),
        "soak": soak.run,
        "sched": lambda: sched.run(out, keep=keep),
        "quant": lambda: quant_speed.measure(quant_speed.options().parse_args([]), keep),
        "adapters": lambda: adapters.run(name, keep),
        "offline": lambda: offline.run(rest, keep),
        "determinism": lambda: offline.determinism(rest, keep),
        "variants": lambda: offline.variants(rest, keep),
        "serve": lambda: served(rest, keep),
        "ranks": lambda: serving.ranks(rest, keep),
        "starts": lambda: starts.run(rest, keep),
        "startwarm": lambda: serving.start_warm(rest, keep),
        "exllama": lambda: demo.run("exllama") if rest == "demo" else serving.on_backend(rest, "exllama", keep),
    }
    return stages[kind]()


def swept(rest: str, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Near the package's choices; of all forms ("wide"); of all forms before norms ("parts")."""
    from perf.gpu import humming_sweep

    if rest == "parts":
        return humming_sweep.run_parts(keep)
    return humming_sweep.run(keep, *((170.0, (64, 256)) if rest == "wide" else ()))


def served(rest: str, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """SHAPE, SHAPE-HOW (with a flag), cliff-SHAPE or cliff-SHAPE-largest."""
    from perf.gpu import offline, serving

    shape, _, how = rest.removeprefix("cliff-").partition("-")
    rows, ranks = offline.ROWS[shape], offline.RANKS[shape]
    if rest.startswith("cliff-"):
        return serving.cliff(shape, ranks, keep, largest=how == "largest")
    return serving.otherwise(how, shape, rows, ranks, keep) if how else serving.run(shape, rows, ranks, keep)


def kernel_tests() -> dict[str, Any]:
    """The kernels' unit tests, on this GPU instead of in the interpreter."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "8",
        "-p",
        "no:cacheprovider",
        "tests/kernels",
        "tests/runner/test_cuda_runner.py",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    tail = result.stdout.strip().splitlines()[-60:]
    return {"failed": result.returncode != 0, "tail": tail}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--call", choices=list(CALLS), help="the lanes of a ten-minute call")
    parser.add_argument("--lane", action="append", default=[], type=stages_of, metavar="STAGE,STAGE,…")
    parser.add_argument("--stages", nargs="+", default=[], choices=list(LIMITS))
    parser.add_argument("--seconds", type=float, default=1e9, help="for all of it; what no longer fits is cut short")
    parser.add_argument("--archive", action="store_true", help="all results in one file of that folder")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.in_process:
        (stage,) = args.stages
        return in_process(stage, args.out)
    lanes = [Lane(stages, number) for number, stages in enumerate([*CALLS.get(args.call, ()), *args.lane])]
    if args.stages:
        lanes.append(Lane(args.stages))
    out = Path(tempfile.mkdtemp(prefix="inlaid-results-")) if args.archive else args.out
    lines = run_lanes(lanes, out, time.monotonic() + args.seconds, args.out if args.archive else None)
    print("\n".join(["", *lines]))
    return int(any("failed" in line for line in lines))


def stages_of(text: str) -> tuple[str, ...]:
    """Of an option's value."""
    stages = tuple(text.split(","))
    if unknown := [stage for stage in stages if stage not in LIMITS]:
        raise argparse.ArgumentTypeError(f"no such stage: {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    return stages


def in_process(stage: str, out: Path) -> int:
    """The stage itself."""
    file = out / f"{stage}.json"
    about = origin() | {"stage": stage}
    about["command"] += f" {stage}"
    result: dict[str, Any] = {}

    def keep(part: dict[str, Any]) -> None:
        nonlocal result
        result = part
        write(file, about | {"cut_short": True, "result": part})

    try:
        result = run_stage(stage, out, keep)
    except Exception as error:  # noqa: BLE001 - with what it had found
        traceback.print_exc()
        result = {**result, "error": f"{type(error).__name__}: {error}"}
    write(file, about | {"result": result})
    return int(bool(result.get("error") or result.get("failed")))


class Lane(threading.Thread):
    """Stages one after another; numbered, on the GPU of that number and in a folder of its own."""

    def __init__(self, stages: Sequence[str], number: int | None = None) -> None:
        super().__init__(daemon=True)
        self.stages, self.number = stages, number
        self.lines: list[str] = []
        self.environment: dict[str, str] = {}
        if number is not None:
            root = ROOT / f"lane-{number}"
            self.environment = {"CUDA_VISIBLE_DEVICES": str(number), "INLAID_BENCH_ROOT": str(root)} | caches(root)

    def on(self, out: Path, end: float, cores: set[int]) -> None:
        """Start."""
        self._out, self._end, self._cores = out, end, cores
        self.start()

    def run(self) -> None:
        os.sched_setaffinity(0, self._cores)  # of this thread, and of the processes that it starts
        for stage in self.stages:
            self.lines.append(one_stage(stage, self._out, self._end, self.environment))


def run_lanes(lanes: Sequence[Lane], out: Path, end: float, archived: Path | None) -> list[str]:
    """Side by side; a line for each stage. Meanwhile the archive, where one is wanted, follows what there is."""
    cores = sorted(os.sched_getaffinity(0))
    for place, lane in enumerate(lanes):
        share = cores[len(cores) * place // len(lanes) : len(cores) * (place + 1) // len(lanes)]
        lane.on(out, end, set(share or cores))
    for lane in lanes:
        running = True
        while running:
            lane.join(LOOK)
            running = lane.is_alive()
            if archived is not None:
                archive(out, archived / "results.tar.gz")
    return [line for lane in lanes for line in lane.lines]


def write(file: Path, found: dict[str, Any]) -> None:
    """In place of what was there, whole."""
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.replace(file)


def archive(folder: Path, target: Path) -> None:
    """All results of a folder, in place of the archive that was there."""
    scratch = target.with_suffix(".part")
    with tarfile.open(scratch, "w:gz") as whole:
        for file in sorted(file for kind in ("json", "jsonl", "log") for file in folder.glob(f"*.{kind}")):
            content = file.read_bytes()
            member = tarfile.TarInfo(file.name)
            member.size = len(content)
            whole.addfile(member, io.BytesIO(content))
    scratch.replace(target)


def one_stage(stage: str, out: Path, end: float, environment: Mapping[str, str] = MappingProxyType({})) -> str:
    """Run it in a process of its own, which takes what it started along when its time is over; a line about it."""
    limit = min(LIMITS[stage], end - time.monotonic())
    if limit < 5:
        print(line := f"{stage}: failed: no time was left", flush=True)
        return line
    command = [sys.executable, "-m", "perf.gpu.bench", "--out", str(out), "--stages", stage, "--in-process"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    begin = time.monotonic()
    with (out / f"{stage}.log").open("wb") as log:
        process = subprocess.Popen(
            command, start_new_session=True, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        code = process.wait(limit)
        ending = "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ending = f"failed: ran past {limit:.0f} s"
    file = out / f"{stage}.json"
    try:
        said = headline(json.loads(file.read_text())["result"]) if file.exists() else ""
    except Exception as error:  # noqa: BLE001 - the file has it all; the stages after this one go on
        said = f"no line about it ({type(error).__name__}: {error})"
    line = f"{stage}: {ending} after {time.monotonic() - begin:.0f} s" + (f": {said}" if said else "")
    print(line, flush=True)
    return line


def about_row(row: dict[str, Any]) -> str:
    """Of a server's row: speed, and the mean time to the first token. Of others: what they say, shortened."""
    if "ms_per_token" not in row:
        said = [value for value in row.values() if not isinstance(value, dict)]
        return " ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in said)[:160]
    name = f"{row.get('names', '')}{row['adapters']}@{row['concurrency']}"
    if row["concurrency"] == 1:
        return f"{name} {row['ms_per_token']:.2f} ms"
    return f"{name} {row['output_tokens_per_second']:.0f} tok/s, first {row['ttft_ms']:.0f} ms"


def headline(result: dict[str, Any]) -> str:
    """What matters most of a stage's result."""
    parts = [f"ready in {result['ready_s']:.1f} s"] if "ready_s" in result else []
    if "parts" in result:
        seconds = ", ".join(f"{part} {spent:.1f}" for part, spent in result["parts"].items())
        parts.append(f"{result['seconds']:.1f} s ({seconds})")
    parts += [about_row(row) for row in result.get("rows", ())]
    for start in result.get("starts", ()):
        parts.append(f"{start['caches']} {start.get('ready_s', float('nan')):.1f} s")
    for step in result.get("steps", ()):
        timed = [choice for choice in step["choices"] if "us" in choice]
        if timed:
            best = min(timed, key=lambda choice: choice["us"])
            about = f"{step['adapters']}@{step['rows']} {timed[0]['us']:.0f} us"
            parts.append(f"{about}, {best['variant']} {best['us']:.0f} ({timed[0]['same_bits']} equal)")
    for name, found in result.items():
        if isinstance(found, dict) and "all_equal" in found:
            parts.append(f"{name}: {found['all_equal']} of {found['repetitions']} equal")
    for name in ("mixed_over_uniform", "share", "error", "failed", "different_alone", "left_over"):
        if result.get(name) not in (None, False, [], {}):
            parts.append(f"{name} {str(result[name])[:200]}")
    for entry in result.get("entries", ()):
        parts.append(f"{entry['inputs']}x{entry['outputs']}@{entry['rows']} {entry['own_us']}->{entry['best_us']}")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
