"""Cost of quantizing: the time of one more task, and the memory held.

Adding a task must not cost what quantizing for all of them did: the demo's twelve tasks are quantized together, then
eleven and one more, and the processor's seconds spent on Hessians are compared. Memory must not grow with the depth of
the model, and with the tasks that are there already only by as many as are checked at a time: random blocks, few and
many, are quantized for a first task, a second and a twelfth, each in a process of its own, and the peak of anonymous
memory (weights, Hessians, hidden states; not the mapped files) stands beside what one block, its Hessians and the new
task's hidden states come to.

    python -m perf.quant_cost --out perf/results/cpu-quant-cost.json        last line of output: JSON
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.quant import loop
from inlaid.quant.aggregate import MINIMAX_LOSS
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid
from inlaid.quant.quantize import add_task, quantize
from inlaid.quant.settings import Gate, Place, Settings, TaskSource
from inlaid.report.provenance import provenance

DEMO = Path("models/demo")
BLOCK = MappingProxyType(
    {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}
)


# Freed memory goes back to the system at once, so that the peak is of what is in use and not of what malloc kept, for
# each thread apart.
ALONE = MappingProxyType({"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"})


class HessianClock:
    """Counter of processor seconds in forward passes with Hessians; wall time would count other work too."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.work = loop.block_hessians

    def __call__(self, *args: Any, **more: Any) -> Any:
        start = time.process_time()
        result = self.work(*args, **more)
        self.seconds += time.process_time() - start
        return result

    def of(self, job: Callable[[], Any]) -> tuple[float, float]:
        """Hessian seconds and all seconds of a job."""
        self.seconds, start = 0.0, time.process_time()
        loop.block_hessians = self
        job()
        loop.block_hessians = self.work
        return self.seconds, time.process_time() - start


def demo_tasks() -> list[TaskSource]:
    names = sorted(json.loads(Path("data/tasks.json").read_text()))
    return [TaskSource(name, DEMO / "adapters" / name, Path(f"data/{name}/calibration.jsonl")) for name in names]


def one_more_task(folder: Path) -> dict[str, float]:
    sources, settings, clock = demo_tasks(), Settings(aggregation="mean"), HessianClock()
    twelve, whole = clock.of(lambda: quantize(DEMO / "base", sources, settings, folder / "twelve"))
    quantize(DEMO / "base", sources[:-1], settings, folder / "eleven")
    one, added = clock.of(lambda: add_task(folder / "eleven", sources[-1]))
    same = all(
        file.read_bytes() == (folder / "eleven" / file.name).read_bytes()
        for file in (folder / "twelve").glob("*.safetensors")
    )
    return {
        "processor_seconds_of_hessians_twelve": twelve,
        "processor_seconds_of_hessians_twelfth": one,
        "share": one / twelve,
        "processor_seconds_twelve": whole,
        "processor_seconds_adding": added,
        "same_bits": same,
    }


@dataclass(frozen=True)
class Case:
    """A job whose memory is measured: the next task comes to a base of so many blocks that has so many tasks. With
    none it is quantized for the first time."""

    depth: int
    tasks: int
    aggregation: str = "mean"


CASES = (Case(4, 0), Case(16, 0), Case(4, 1), Case(16, 1), Case(2, 11), Case(2, 11, MINIMAX_LOSS))


def prepare(case: Case, folder: Path) -> None:
    """Write a random base, quantized for the tasks that are there before."""
    config = AutoConfig.for_model("llama", **BLOCK, num_hidden_layers=case.depth, vocab_size=1024)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder / "base")
    for file in (DEMO / "base").glob("tokenizer*"):
        (folder / "base" / file.name).write_bytes(file.read_bytes())
    if case.tasks:
        settings = replace(_settings(case), aggregation="mean")  # sooner done; the next task brings its own
        quantize(folder / "base", _plain_tasks()[: case.tasks], settings, folder / "out", Place(), Gate(force=True))


def peak(case: Case, folder: Path) -> dict[str, float]:
    """Measure MiB at the peak of the job, beside the sizes it should hold."""
    source, settings = _plain_tasks()[case.tasks], _settings(case)
    if case.tasks:
        record = json.loads((folder / "out" / "inlaid.json").read_text())
        record["settings"]["aggregation"] = case.aggregation
        (folder / "out" / "inlaid.json").write_text(json.dumps(record))
    ended, most, before = threading.Event(), 0.0, status_mib("RssAnon")

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.01):
            most = max(most, status_mib("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    if case.tasks:
        made = add_task(folder / "out", source, Place(), Gate(force=True))
    else:
        made = quantize(folder / "base", [source], settings, folder / "out", Place(), Gate(force=True))
    ended.set()
    watcher.join()
    hidden, mlp = BLOCK["hidden_size"], BLOCK["intermediate_size"]
    block = 4 * hidden**2 + 3 * hidden * mlp
    return {
        "anonymous_peak": most - before,
        "anonymous_at_the_start": before,
        "resident_peak": status_mib("VmHWM"),
        "one_block": 4 * block / 2**20,
        "its_hessians": 4 * (3 * hidden**2 + mlp**2) / 2**20,
        "hidden_states_of_the_new_task": 4 * hidden * made.tasks[source.name]["tokens"] / 2**20,
        "all_blocks": 4 * block * case.depth / 2**20,
    }


def _settings(case: Case) -> Settings:
    return Settings(Grid(4, 128), CalibrationSettings(max_tokens=8192), aggregation=case.aggregation)


def _plain_tasks() -> list[TaskSource]:
    """Return the demo's tasks on the random base alone: its adapters are of another shape."""
    return [replace(source, adapter=Path("none")) for source in demo_tasks()]


def status_mib(name: str) -> float:
    """Read a line of this process's status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this kernel does not report {name}; run on Linux")


def measured(case: Case, store: Path) -> dict[str, float]:
    """Measure a case in two processes of its own, so that memory used to prepare it is not counted."""
    prepared, used = store / f"{case.depth}-{case.tasks}", store / "used"
    if not prepared.exists():
        _process("prepare", case, prepared)
    shutil.copytree(prepared, used)
    found: dict[str, float] = _process("measure", case, used)
    shutil.rmtree(used)
    return found


def _process(step: str, case: Case, folder: Path) -> Any:
    words = ["--step", step, "--case", json.dumps(asdict(case)), "--folder", str(folder)]
    command = [sys.executable, "-m", "perf.quant_cost", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | ALONE)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--step", choices=("prepare", "measure"), help="used by the run itself, with the next two")
    parser.add_argument("--case", type=json.loads)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.step:
        made = (prepare if args.step == "prepare" else peak)(Case(**args.case), args.folder)
        print(json.dumps(made))
        return
    if args.out is None:
        parser.error("--out says where the figures go")
    begun, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        cost = one_more_task(Path(name))
        cases = Bar(CASES, desc="memory", file=sys.stderr)
        memory = [asdict(case) | measured(case, Path(name)) for case in cases]
    result = {
        "adding_the_twelfth_task": cost,
        "memory_mib": memory,
        "provenance": provenance(seed=Settings().calibration.seed)
        | {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "memory_cases": dict(ALONE),
            "load_average": {"before": load, "after": os.getloadavg()[0]},
            "seconds": round(time.monotonic() - begun),
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
