"""One command for everything that is measured on a GPU: `python -m perf.gpu.bench --out FOLDER --call house --archive`.

Each stage runs in a process of its own with a limit on its time and writes FOLDER/NAME.json: what it found and where
(commit, device, driver, versions, command), first as far as it has come and then whole; its output goes to NAME.log.
A stage that fails or runs out of time is reported and the rest goes on. `--stages` picks some; `--lane` is a list of
its own, and lists run side by side (lanes.py). `--call` names lanes that take ten minutes. With `--archive` FOLDER has
one file, results.tar.gz, with what there is so far.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.report.provenance import gpu, now, provenance
from perf.gpu import Keep, expected
from perf.gpu.lanes import Lane, run_lanes, write_archive

LIMITS: Mapping[str, float] = MappingProxyType({  # seconds of each stage
    "tests": 110, "sweep": 100, "sweep-wide": 190, "sweep-parts": 210, "variants-7b": 130, "variants-8b": 130,
    "serve-7b": 200, "serve-8b": 170, "serve-7b-arrival": 150, "serve-8b-arrival": 120,
    "serve-7b-kv8": 200, "serve-7b-kvint8": 200, "serve-8b-kv8": 120, "serve-tiny-kv8": 100, "micro-kv_codes": 120,
    "serve-7b-unified": 150, "serve-7b-one": 150, "serve-8b-one": 120,
    "latency-7b": 150, "latency-8b": 120, "tests-decode": 90, "tests-drafts": 90,
    "serve-oversubscribed-8b": 280, "serve-oversubscribed-8b-largest": 280,
    "determinism-7b": 170, "startwarm-7b": 60, "ranks-7b": 160, "ranks-7b-mixed": 130,
    "exllama-7b": 170, "exllama-demo": 90, "soak": 110,
    "demo": 90, "checks": 400, "checks-short": 110, "micro": 300, "offline-7b": 150, "offline-8b": 130,
    "micro-decode_attention-pending": 90, "micro-ordered": 120,
    "starts-7b": 300, "starts-tiny": 100, "micro-decode_attention": 150,
    "sched": 240, "quant": 480, "online-7b": 590, "online-8b": 590, "online-tiny": 200,
    "adapters-load": 60, "adapters-toppings": 120, "adapters-modes": 230, "adapters-modes-cached": 120,
    "adapters-oversubscribed-mixed": 120, "adapters-oversubscribed-slots": 130, "adapters-all-resident": 100,
    "adapters-crossover": 150, "serve-tiny": 100, "serve-tiny-arrival": 100, "serve-oversubscribed-tiny": 100,
    "ranks-tiny": 100, "variants-tiny": 100, "determinism-tiny": 60, "startwarm-tiny": 60,
    "headline-7b-13b": 290, "headline-7b": 200, "headline-13b": 200, "headline-tiny": 100,
    "cluster-8b": 420, "cluster-tiny": 200,
    "programs-7b": 300, "programs-8b": 300, "programs-tiny": 100, "speculation-7b": 240, "speculation-7b-layers": 160,
    "speculation-tiny": 100,
})  # fmt: skip
CALLS: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType({  # lanes, one for each GPU; "+" joins stages
    "house": (  # two GPUs: what is compared with expected.py's figures
        ("serve-7b", "serve-8b", "demo", "determinism-7b+checks-short"),
        ("exllama-7b", "ranks-7b-mixed", "serve-oversubscribed-8b-largest", "tests"),
    ),
    "latency": (("tests-decode", "latency-7b", "latency-8b", "serve-7b-one", "serve-8b-one"),),
    "rows": (("serve-7b", "serve-8b", "startwarm-7b", "determinism-7b", "soak", "ranks-7b"),),
    "a": (
        ("serve-7b", "serve-8b", "serve-oversubscribed-8b-largest", "ranks-7b", "startwarm-7b"),
        ("quant", "sweep"),
    ),
    "b": (
        ("sched", "exllama-7b", "starts-7b", "determinism-7b"),
        ("soak", "exllama-demo", "demo", "adapters-modes", "adapters-crossover", "checks"),
    ),
    "c": (
        ("serve-7b-arrival", "serve-8b-arrival", "variants-7b", "variants-8b"),
        ("adapters-load", "adapters-modes-cached", "adapters-oversubscribed-slots", "adapters-all-resident"),
    ),
})  # fmt: skip
WORKERS = "8"
TEST_PATHS = ("tests/kernels", "tests/runner/test_cuda_runner.py", "tests/runner/test_cuda_speculation.py")
DRAFT_TESTS = ("tests/kernels/test_verify_triton.py", "tests/runner/test_cuda_speculation.py")


def origin() -> dict[str, Any]:
    """Return where and with what a figure is made."""
    return {
        **provenance(packages=("torch", "triton")),
        "gpu": gpu() or "none",
        "command": "python -m perf.gpu.bench --out DIR --stages",
        "time": now(),
    }


def run_stage(name: str, out: Path, keep: Keep) -> dict[str, Any]:
    """Run a stage in this process and return its result; `keep` writes what there is so far."""
    from perf.gpu import (
        adapters,
        checks,
        cluster,
        demo,
        headline,
        latency,
        micro,
        offline,
        online,
        programs,
        quant_speed,
        sched,
        serving,
        soak,
        speculation,
        starts,
    )

    kind, _, rest = name.partition("-")
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": lambda: kernel_tests(keep, *tests_of(rest)),
        "sweep": lambda: swept(rest, keep),
        "checks": lambda: checks.run(keep, LIMITS[name] - 25),
        "micro": lambda: micro.run(keep, tuple(rest.split("-")) if rest else tuple(micro.PARTS)),
        "demo": demo.run,
        "soak": soak.run,
        "sched": lambda: sched.run(out, keep=keep),
        "quant": lambda: quant_speed.measure(quant_speed.options().parse_args([]), keep),
        "adapters": lambda: adapters.run(name, keep),
        "offline": lambda: offline.run(rest, keep),
        "online": lambda: online.run(rest, keep),
        "latency": lambda: latency.run(rest, keep),
        "determinism": lambda: offline.determinism(rest, keep),
        "variants": lambda: offline.variants(rest, keep),
        "serve": lambda: served(rest, keep),
        "ranks": lambda: serving.ranks(rest.removesuffix("-mixed"), keep, uniform=not rest.endswith("-mixed")),
        "starts": lambda: starts.run(rest, keep),
        "cluster": lambda: cluster.run(rest, keep),
        "headline": lambda: headline.run(rest, keep),
        "programs": lambda: programs.run(rest, keep),
        "speculation": lambda: speculation.run(rest, keep),
        "startwarm": lambda: serving.start_warm(rest, keep),
        "exllama": lambda: demo.run("exllama") if rest == "demo" else serving.on_backend(rest, "exllama", keep),
    }
    return stages[kind]()


def swept(rest: str, keep: Keep) -> dict[str, Any]:
    """Run a sweep: near the package's choices, of all tiles ("wide"), or of all tiles before norms ("parts")."""
    from perf.gpu import humming_sweep

    if rest == "parts":
        return humming_sweep.run_parts(keep)
    return humming_sweep.run(keep, *((170.0, (64, 256)) if rest == "wide" else ()))


def served(rest: str, keep: Keep) -> dict[str, Any]:
    """Run SHAPE, SHAPE-HOW (with the flags of serving.OTHERWISE), oversubscribed-SHAPE, or that and -largest."""
    from perf.gpu import offline, serving

    shape, _, how = rest.removeprefix("oversubscribed-").partition("-")
    rows, ranks = offline.ROWS[shape], offline.RANKS[shape]
    if rest.startswith("oversubscribed-"):
        return serving.oversubscribed(shape, ranks, keep, largest=how == "largest")
    return serving.otherwise(how, shape, rows, ranks, keep) if how else serving.run(shape, rows, ranks, keep)


def tests_of(name: str) -> tuple[str, ...]:
    """Return the test files of a stage: those of drafts, that of one kernel, or none for all."""
    return DRAFT_TESTS if name == "drafts" else (f"tests/kernels/test_{name}.py",) if name else ()


def kernel_tests(keep: Keep, *paths: str) -> dict[str, Any]:
    """Run unit tests of kernels on this GPU; without a GPU they would run in Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-v", "-n", WORKERS, "-p", "no:cacheprovider"]
    command += ["-p", "no:benchmark", *(paths or TEST_PATHS)]  # that plugin warns beside xdist, and warnings are errors
    passed, failed = 0, list[str]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            passed += " PASSED " in line
            failed += [line.split()[-1]] if " FAILED " in line or " ERROR " in line else []
            if passed % 50 == 0:
                keep({"passed": passed, "failed": failed})
    if process.returncode and not failed:
        failed = [f"pytest ended with {process.returncode}"]
    return {"passed": passed, "failed": failed}


def main() -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--call", choices=list(CALLS), help="the lanes of a ten-minute call")
    parser.add_argument(
        "--lane", action="append", default=[], type=stages_of, metavar="STAGE,STAGE,…",
        help="stages one after another on a GPU of their own; STAGE+STAGE at the same time",
    )  # fmt: skip
    parser.add_argument("--stages", nargs="+", default=[], type=stage_of, metavar="STAGE", help=f"{', '.join(LIMITS)}")
    parser.add_argument("--seconds", type=float, default=1e9, help="for all stages; what does not fit is cut short")
    parser.add_argument("--archive", action="store_true", help="all results in one file of that folder")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.in_process:
        (stage,) = args.stages
        return in_process(stage, args.out)
    lanes = [Lane(stages, LIMITS, number) for number, stages in enumerate([*CALLS.get(args.call, ()), *args.lane])]
    if args.stages:
        lanes.append(Lane(args.stages, LIMITS))
    out = Path(tempfile.mkdtemp(prefix="inlaid-results-")) if args.archive else args.out
    archive = args.out / "results.tar.gz" if args.archive else None
    lines = run_lanes(lanes, out, time.monotonic() + args.seconds, archive)
    well = not any("failed" in line for line in lines)
    if args.call == "house":
        table, as_recorded = expected.compare(out, expected.read())
        lines += ["", table]
        well &= as_recorded
        (out / "house.md").write_text(f"```\n{table}\n```\n")
        if archive is not None:
            write_archive(out, archive)
    print("\n".join(["", *lines]))
    return int(not well)


def stage_of(text: str) -> str:
    """Return a stage by its name, or by the one that recorded results call it by; refuse one that does not exist."""
    name = text.replace("cliff-resident", "all-resident").replace("cliff", "oversubscribed")
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"no such stage: {text}; there are {', '.join(LIMITS)}")
    return name


def stages_of(text: str) -> tuple[str, ...]:
    """Return the stages of a --lane option: names with commas between, or joined by +."""
    return tuple("+".join(map(stage_of, stage.split("+"))) for stage in text.split(","))


def in_process(stage: str, out: Path) -> int:
    """Run one stage in this process and write its result."""
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
    except Exception as error:  # noqa: BLE001 - what was found before must be written
        traceback.print_exc()
        result = {**result, "error": f"{type(error).__name__}: {error}"}
    write(file, about | {"result": result})
    return int(bool(result.get("error") or result.get("failed")))


def write(file: Path, found: dict[str, Any]) -> None:
    """Write a result in place of the one that was there, whole or not at all."""
    write_atomically(file, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
