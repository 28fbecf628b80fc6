"""A task is added to a server under load: tokens per second and p99 inter-token latency over time, the job's stages
marked, the dip and the pause of the switch.

The demo, quantized for all tasks but one, serves closed-loop clients on their adapters; then the last task is ordered.
The dip compares the time before the order with the time from the order to the switch. `perf/gpu/online.py` does so on
a GPU, and `--stage` reports what that found. `perf.online_cost` has the cost of the job by itself; its file is taken
into the report.

    python -m perf.online_tasks --out perf/results/online-tasks [--cost FILE]     last line of output: JSON
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid
from inlaid.quant.quantize import quantize
from inlaid.quant.settings import Gate, Settings, TaskSource
from inlaid.report.plots import COLOURS, legend, new_figure, save
from inlaid.report.provenance import provenance
from perf.gpu.serving import free_port, stop, wait_ready
from perf.quant_cost import DEMO, demo_tasks

KEY = "measure"
POLL = 0.25  # seconds between two looks at the job
# The job's stages by the words of its reports; the first that fits.
STAGES = (
    ("checking tasks", "check the new task"),
    ("checking quantized", "check all tasks"),
    ("solved", "solve"),
    ("task ", "forward and Hessians"),
    ("", "start and end"),
)
OVER = ("serving", "ready", "refused", "failed", "cancelled")


@dataclass
class Watch:
    """Everything seen from outside: a pair (time, gap to the token before) for each token, and the job's reports."""

    tokens: list[tuple[float, float]] = field(default_factory=list)
    reports: list[tuple[float, str, str]] = field(default_factory=list)  # time, state, stage
    ordered: float = 0.0
    switched: float = 0.0
    card: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """Closed-loop clients: each asks one of the models in turn, streams the answer, and asks again."""

    clients: int
    models: Sequence[str]
    prompts: Sequence[Any]  # texts or token ids
    max_tokens: int


async def client(session: Any, url: str, load: Load, number: int, watch: Watch, until: asyncio.Event) -> None:
    """Ask until the end, and note when each token came."""
    turn = number
    while not until.is_set():
        body = {
            "model": load.models[turn % len(load.models)], "prompt": load.prompts[turn % len(load.prompts)],
            "max_tokens": load.max_tokens, "temperature": 0.0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        turn += load.clients
        before = None
        async with session.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    if before is not None:
                        watch.tokens.append((now, now - before))
                    before = now


async def watch_addition(
    url: str, order: dict[str, Any], load: Load, before: float, after: float, limit: float = 3600.0
) -> Watch:
    """Put a server under load, order a task after `before` seconds, and watch until `after` seconds past its end."""
    import aiohttp

    gc.collect()
    gc.freeze()  # each token's times are kept: looking through all objects for garbage would show as a pause
    watch, until = Watch(), asyncio.Event()
    headers = {"Authorization": f"Bearer {KEY}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 20, headers=headers) as session:
        clients = [asyncio.create_task(client(session, url, load, i, watch, until)) for i in range(load.clients)]
        await asyncio.sleep(before)
        watch.ordered = time.monotonic()
        async with session.post(f"{url}/v1/tasks", json=order) as answer:
            watch.card = await answer.json()
            assert answer.status == 200, watch.card
        while watch.card["state"] not in OVER and time.monotonic() - watch.ordered < limit:
            await asyncio.sleep(POLL)
            async with session.get(f"{url}/v1/tasks/{order['name']}") as answer:
                watch.card = await answer.json()
            watch.reports.append((time.monotonic(), watch.card["state"], watch.card["stage"]))
        watch.switched = time.monotonic()
        async with session.get(f"{url}/v1/base") as answer:
            watch.base = await answer.json()
        await asyncio.sleep(after)
        until.set()
        await asyncio.gather(*clients)
    return watch


def stage_of(report: str) -> str:
    return next(name for words, name in STAGES if words in report)


def summarize(watch: Watch, before: float, after: float) -> dict[str, Any]:
    """Return throughput and latencies before, while the job ran, and after, and each stage's seconds."""
    spans = {
        "before": (watch.ordered - before, watch.ordered),
        "during": (watch.ordered, watch.switched),
        "after": (watch.switched, watch.switched + after),
    }
    windows = {name: _window(watch.tokens, *span) for name, span in spans.items()}
    stages: dict[str, float] = {}
    for (start, _, report), (end, _, _) in zip(watch.reports, watch.reports[1:]):
        stages[stage_of(report)] = stages.get(stage_of(report), 0.0) + end - start
    switch = watch.base.get("last_switch") or {}
    around = [gap for when, gap in watch.tokens if abs(when - watch.switched) < 2]
    return {
        "windows": windows,
        "dip": 1 - windows["during"]["tokens_per_s"] / windows["before"]["tokens_per_s"],
        "p99_growth": windows["during"]["p99_itl_ms"] / windows["before"]["p99_itl_ms"] - 1,
        "seconds": watch.switched - watch.ordered,
        "stage_seconds": stages,
        "switch": switch,
        "longest_gap_at_the_switch_ms": 1e3 * max(around, default=0.0),
        "job": {key: watch.card.get(key) for key in ("state", "why", "seconds", "memory", "before", "after")},
    }


def _window(tokens: Sequence[tuple[float, float]], start: float, end: float) -> dict[str, float]:
    gaps = sorted(gap for when, gap in tokens if start <= when < end)
    if not gaps:
        raise RuntimeError("no token came in a window; the server stood still, or the windows are too short")
    return {
        "seconds": end - start,
        "tokens_per_s": len(gaps) / (end - start),
        "mean_itl_ms": 1e3 * mean(gaps),
        "p50_itl_ms": 1e3 * gaps[len(gaps) // 2],
        "p99_itl_ms": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "largest_ms": 1e3 * gaps[-1],
    }


def series(watch: Watch, before: float, bucket: float) -> list[dict[str, float]]:
    """Return tokens per second and p99 inter-token latency for each bucket of time, from `before` the order."""
    start = watch.ordered - before
    found: dict[int, list[float]] = {}
    for when, gap in watch.tokens:
        if when >= start:
            found.setdefault(int((when - start) / bucket), []).append(gap)
    rows = []
    for index in range(max(found, default=0)):
        gaps = sorted(found.get(index, []))
        p99 = 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))] if gaps else float("nan")
        rows.append({"at": (index + 0.5) * bucket - before, "tokens_per_s": len(gaps) / bucket, "p99_itl_ms": p99})
    return rows


def marks(watch: Watch) -> list[tuple[float, float, str]]:
    """Return (from, to, stage) of the job, in seconds from the order."""
    spans: list[tuple[float, float, str]] = []
    for (start, _, report), (end, _, _) in zip(watch.reports, watch.reports[1:]):
        name = stage_of(report)
        first, last = start - watch.ordered, end - watch.ordered
        if spans and spans[-1][2] == name:
            spans[-1] = (spans[-1][0], last, name)
        else:
            spans.append((first, last, name))
    return spans


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw tokens per second over p99 inter-token latency, the job's stages as bands, the switch as a line."""
    figure, axes = new_figure((9, 5), rows=2)
    names = [name for _, name in STAGES]
    for (axis,), key, label in zip(axes, ("tokens_per_s", "p99_itl_ms"), ("tokens/s", "p99 inter-token latency, ms")):
        rows = result["series"]
        axis.plot([row["at"] for row in rows], [row[key] for row in rows], color=COLOURS[0], linewidth=1.2)
        seen: set[str] = set()
        for start, end, name in result["stages"]:
            shown = None if name in seen else name
            axis.axvspan(start, end, color=COLOURS[1 + names.index(name)], alpha=0.2, linewidth=0, label=shown)
            seen.add(name)
        axis.axvline(result["summary"]["seconds"], color="black", linestyle="--", linewidth=1, label="switch")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[1][0].set_xlabel("seconds from the order")
    legend(figure, axes[0], columns=6)
    save(figure, file)


def table(result: dict[str, Any], cost: dict[str, Any] | None) -> str:
    """Return the report: the windows, the switch, and the cost beside the columns of the paper's Table 4."""
    summary = result["summary"]
    lines = [
        "# Tasks added while serving",
        "",
        f"`{result['provenance']['command']}`, commit {result['provenance']['commit']}; conditions are in the JSON.",
        "",
        "| window | seconds | tokens/s | mean ITL, ms | p99 ITL, ms | largest gap, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in summary["windows"].items():
        figures = (row["seconds"], row["tokens_per_s"], row["mean_itl_ms"], row["p99_itl_ms"], row["largest_ms"])
        lines.append(f"| {name} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
    switch = summary["switch"]
    lines += [
        "",
        f"Throughput while the job ran: {-100 * summary['dip']:+.1f}% (LoRA-Inlaid reports -10 to -13%); p99 "
        f"inter-token latency {100 * summary['p99_growth']:+.1f}%. The job took {summary['seconds']:.0f} s at a share "
        f"of {result['share']:g}. The switch: no step for {1e3 * switch.get('pause', 0):.1f} ms, "
        f"{switch.get('staying', 0)} requests finished on the old base; longest gap between two tokens within two "
        f"seconds of it {summary['longest_gap_at_the_switch_ms']:.0f} ms.",
    ]
    load, cores = result["provenance"].get("load_average", (0.0,))[0], result["provenance"].get("cores", 1)
    if load > cores:
        lines += ["", f"The machine was busy (load average {load:.0f} on {cores} cores): the dip is within its noise."]
    if cost is not None:
        lines += ["", *cost_table(cost, summary)]
    return "\n".join(lines) + "\n"


def cost_table(cost: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """Return rows of processor seconds in the columns of the paper's Table 4."""
    lines = [
        "The columns of the paper's Table 4 (its values are not public), in processor seconds of one thread:",
        "",
        "| job | forward, Hessians | aggregate, quantize | checks | rest | total | peak, MiB | worst old task, nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, job in cost["jobs"].items():
        label = "full job" if way == "full" else f"one more, offline, {way}"
        lines.append(_row(label, job["parts"], job["seconds"], job["peak_mib"], cost["worst_old_task"][way]))
    own = summary["job"]
    gained = max((own["after"][name] - loss for name, loss in own["before"].items()), default=0.0)
    lines.append(
        _row(
            "one more, online (wall seconds without rests)",
            own["seconds"],
            sum(own["seconds"].values()) - own["seconds"].get("resting", 0.0),
            own["memory"]["peak"] / 2**20,
            gained,
        )
    )
    return lines


def _row(label: str, parts: dict[str, float], total: float, peak: float, worst: float) -> str:
    forward = parts.get("forward", 0) + parts.get("Hessians", 0) + parts.get("bank", 0)
    solving, checking = parts.get("solving", 0), parts.get("checking", 0)
    figures = (forward, solving, checking, total - forward - solving - checking, total)
    return f"| {label} | {' | '.join(f'{figure:.1f}' for figure in figures)} | {peak:.0f} | {worst:+.4f} |"


def prepare(folder: Path, tokens: int, tasks: Sequence[TaskSource]) -> None:
    """Quantize the demo for these tasks, quickly: this base is to be replaced, not judged."""
    settings = Settings(Grid(refine=1), CalibrationSettings(tokens), "mean")
    quantize(DEMO / "base", tasks, settings, folder / "served", None, Gate(force=True))


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare, serve, add, and return everything measured."""
    tasks = demo_tasks()[: args.tasks]
    served, last = folder / "served", tasks[-1]
    if not served.exists():
        prepare(folder, args.tokens, tasks[:-1])
    port = free_port()
    adapters = [f"{task.name}={task.adapter}" for task in tasks[:-1]]
    command = [
        sys.executable, "-m", "inlaid", "serve", str(served), "--port", str(port), "--admin-key", KEY,
        "--lora-root", str(Path.cwd()), "--allow-runtime-lora", "--online-tasks", f"{served}.bank",
        "--task-gpu-share", str(args.share), "--task-tolerance", "9", "--on-base-switch", args.rule,
        "--base-switch-memory", args.memory, "--num-blocks", "2000", "--adapter", *adapters,
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_ready(server, port, 300)
        lines = [json.loads(line)["prompt"] for task in tasks for line in task.data.read_text().splitlines()[:20]]
        load = Load(args.clients, [task.name for task in tasks[:-1]], lines, 48)
        order = {
            "name": last.name, "adapter": str(last.adapter.resolve()), "data": str(last.data.resolve()),
            "solve": args.solve, "check": args.check,
        }  # fmt: skip
        watch = asyncio.run(watch_addition(f"http://127.0.0.1:{port}", order, load, args.before, args.after))
    finally:
        stop(server)
    return {
        "summary": summarize(watch, args.before, args.after),
        "series": series(watch, args.before, args.bucket),
        "stages": marks(watch),
        "share": args.share,
        "load": asdict(load) | {"prompts": len(lines)},
        "provenance": provenance()
        | {
            "load_average": os.getloadavg(),
            "cores": os.cpu_count(),
            "tokens_per_task": args.tokens,
            "tasks": args.tasks,
            "solve": args.solve,
            "check": args.check,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="files to write, without their suffix")
    parser.add_argument("--cost", type=Path, help="result of perf.online_cost, to be shown in the report")
    parser.add_argument("--stage", type=Path, help="report this result of perf.gpu.bench's stage online-SHAPE instead")
    parser.add_argument(
        "--folder", type=Path, help="where the base is made unless it is there; default: a temporary one"
    )
    parser.add_argument("--share", type=float, default=0.1, help="--task-gpu-share of the server")
    parser.add_argument("--rule", default="finish", help="--on-base-switch of the server")
    parser.add_argument("--memory", default="auto", help="--base-switch-memory of the server")
    parser.add_argument("--solve", default="exact", help="how the new base is solved")
    parser.add_argument("--check", default="exact", help="how tasks are checked")
    parser.add_argument("--clients", type=int, default=8, help="requests in flight")
    parser.add_argument("--tokens", type=int, default=2000, help="calibration tokens of each task")
    parser.add_argument("--tasks", type=int, default=len(demo_tasks()), help="tasks in all")
    parser.add_argument("--before", type=float, default=30.0, help="seconds before the order")
    parser.add_argument("--after", type=float, default=30.0, help="seconds after the switch")
    parser.add_argument("--bucket", type=float, default=2.0, help="seconds of a point of the figure")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.stage:
        measured = json.loads(args.stage.read_text())
        result = measured.pop("result") | {"provenance": measured}
    else:
        with tempfile.TemporaryDirectory() as name:
            result = run(args, args.folder or Path(name))
    cost = json.loads(args.cost.read_text()) if args.cost else None
    args.out.with_suffix(".json").write_text(json.dumps(result | ({"cost": cost} if cost else {}), indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(result, cost))
    draw(result, args.out)
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
