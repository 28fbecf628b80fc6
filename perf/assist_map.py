"""The crossover map of CPU-assisted prefill, Toppings' main idea: the speed of the bus below which it would pay.

    python -m perf.assist_map --out perf/results/assist-map.json

A lone request whose adapter (of every linear of a 7B) is not on the device, in three ways: load it and compute
(on-demand), compute each quarter of the layers when that has landed (pipelined), compute on the CPU what has not landed
(cpu-assist). Times follow from the bytes of the adapter over the bus, the measured speed of a host's matrix products,
and the measured seconds of a prompt (perf/results/h100-adapters.json). Two maps: with CPU work that costs the device
nothing but its own time, which is the best that any implementation could do; and with what a step costs on a GPU that
launches its kernels one by one, as it must when it waits for the host at each linear. The engine had the mode and
measured it before it was retired: its cells, which are recorded, are compared with the second map.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

import numpy as np

from inlaid.adapters.modes import NUM_GROUPS
from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.report.plots import colours, legend, new_figure, save
from inlaid.report.provenance import provenance
from inlaid.report.tables import markdown

RESULTS = Path(__file__).parent / "results"
HIDDEN, MIDDLE, LAYERS = 4096, 11008, 32  # of a 7B
SUM = LAYERS * (4 * 2 * HIDDEN + 3 * (HIDDEN + MIDDLE))  # inputs plus outputs of all its linears
RANKS, PROMPTS = (8, 16, 32, 64, 128, 256), (16, 256, 1024)
LINKS = np.geomspace(0.1, 128.0, 400)  # GB/s
BETTER = 0.95  # of the other ways' time: what a feature must save to pay
BUSES = (("PCIe 3 x16", 12.0), ("PCIe 4 x16", 25.0), ("PCIe 5 x16", 50.0))  # GB/s from pinned memory


@dataclass(frozen=True)
class Host:
    """A host: its name, and the operations that its cores make in a second of an adapter's products."""

    name: str
    gflops: float


@dataclass(frozen=True)
class Case:
    """A request: the rank of its adapter, its prompt, and the seconds that the prompt alone takes."""

    rank: int
    prompt: int
    prefill: float

    def load(self, link: float) -> float:
        """Return the seconds of the adapter's 16-bit weights over a bus of so many GB/s."""
        return 2 * self.rank * SUM / (link * 1e9)

    def assist(self, host: Host) -> float:
        """Return the seconds of the adapter's products for the whole prompt on the CPU."""
        return 2 * self.prompt * self.rank * SUM / (host.gflops * 1e9)


def times(case: Case, link: float, host: Host, launches: float = 0.0) -> dict[str, float]:
    """Return the seconds to the first token in each way; a step that waits at each linear costs `launches` more."""
    load, compute = case.load(link), case.prefill / NUM_GROUPS
    pipelined = assisted = 0.0
    for group in range(1, NUM_GROUPS + 1):
        landed = load * group / NUM_GROUPS
        pipelined = max(pipelined, landed) + compute
        assisted += compute + (case.assist(host) / NUM_GROUPS if landed > assisted else 0.0)
    return {
        "on-demand": load + case.prefill,
        "pipelined": min(pipelined + launches, load + case.prefill),
        "cpu-assist": assisted + launches,
    }


def crossover(case: Case, host: Host, launches: float = 0.0) -> float:
    """Return the fastest bus, in GB/s, on which the CPU's help saves 5% or more; 0: on none that was tried."""
    for link in LINKS[::-1]:
        found = times(case, float(link), host, launches)
        if found["cpu-assist"] < BETTER * min(found["on-demand"], found["pipelined"]):
            return float(link)
    return 0.0


def host_cores() -> int:
    """Count the cores of this process."""
    return len(os.sched_getaffinity(0))


def host_gflops(rows: int = 256, rank: int = 64, repeats: int = 7) -> float:
    """Measure the billions of operations a second of x A' B' in single precision, on all cores of this machine."""
    import torch

    x_MK, a_RK, b_NR = torch.ones(rows, HIDDEN), torch.ones(rank, HIDDEN), torch.ones(HIDDEN, rank)
    threads = torch.get_num_threads()
    torch.set_num_threads(host_cores())
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            begin = time.perf_counter()
            for _ in range(8):
                (x_MK @ a_RK.t()) @ b_NR.t()
            seconds.append((time.perf_counter() - begin) / 8)
    torch.set_num_threads(threads)
    return 2 * rows * rank * 2 * HIDDEN / median(seconds) / 1e9


def measured(results: Path) -> tuple[dict[int, float], float, list[dict[str, Any]]]:
    """Return the seconds of each prompt, those of a step that waits at each linear, and the recorded run's cells."""
    found = json.loads((results / "h100-adapters.json").read_text())
    (pinned,) = [row for row in found["load"]["result"]["rows"] if row["rank"] == 64]
    link = pinned["mib"] * 2**20 / (pinned["pinned_ms"] / 1e3) / 1e9
    cells = found["crossover"]["result"]["rows"]
    quiet = [row for row in cells if not row["bus_busy"] and row["rank"] == 16]
    prompts = {row["prompt"]: row["on-demand_ms"] / 1e3 - Case(16, row["prompt"], 0.0).load(link) for row in quiet}
    return prompts, found["crossover"]["result"]["patience_ms"] / 1e3, cells


def rows_of(hosts: Sequence[Host], prompts: dict[int, float], launches: float) -> list[dict[str, Any]]:
    """Return a row for each host, rank and prompt: the crossover at best, and with launches one by one."""
    return [
        {
            "host": host.name,
            "rank": rank,
            "prompt": prompt,
            "best_gbps": round(crossover(Case(rank, prompt, prompts[prompt]), host), 2),
            "launched_gbps": round(crossover(Case(rank, prompt, prompts[prompt]), host, launches), 2),
        }
        for host in hosts
        for rank in RANKS
        for prompt in PROMPTS
    ]


def text(record: dict[str, Any]) -> str:
    """Format the map: a table of GB/s by rank for each host, the best possible and, in brackets, as it was built."""
    parts = [
        "# Where the CPU's help would pay",
        "GB/s of the bus from host memory to the device below which computing a cold adapter's part on the CPU saves "
        "5% or more of the time to the first token, at best; in brackets with a GPU that launches its kernels one by "
        f"one meanwhile, as the engine did ({record['launches_ms']:.0f} ms). A pinned copy over PCIe 5 x16 has about "
        "50 GB/s, PCIe 4 25, PCIe 3 12. A 7B, adapters of every linear, a lone request. Made by "
        f"`{record['command']}` at {record['commit']}; the method is in `perf/assist_map.py`, the figure is "
        "assist-map.png.",
    ]
    for host, gflops in record["hosts"].items():
        mine = [row for row in record["rows"] if row["host"] == host]
        cells = {(row["rank"], row["prompt"]): f"{row['best_gbps']:g} ({row['launched_gbps']:g})" for row in mine}
        lines = [[str(rank), *(cells[rank, prompt] for prompt in PROMPTS)] for rank in RANKS]
        head = ("rank", *(f"{prompt} tokens" for prompt in PROMPTS))
        parts += [f"## {host}: {gflops:,.0f} GFLOP/s", markdown(head, lines)]
    helped = [
        min(value for key, value in row.items() if key.startswith("cpu-assist")) for row in record["measured_cells"]
    ]
    others = [min(row["on-demand_ms"], row["pipelined_ms"]) for row in record["measured_cells"]]
    wins = sum(a < b for a, b in zip(helped, others))
    parts.append(
        "Measured on an H100 before the mode was retired (h100-adapters.json): the CPU's help was faster than both "
        f"other ways in {wins} of {len(helped)} cells of rank, prompt and a quiet or busy bus."
    )
    return (
        "\n\n".join(
            part if part.startswith("|") else fill(part, 120, break_long_words=False, break_on_hyphens=False)
            for part in parts
        )
        + "\n"
    )


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the crossovers by rank, a panel for each host: below a line the CPU's help would pay."""
    hosts = list(dict.fromkeys(row["host"] for row in rows))
    colour = colours(map(str, PROMPTS))
    figure, (axes,) = new_figure((4.6 * len(hosts), 4.4), 1, len(hosts))
    for axis, host in zip(axes, hosts):
        for prompt in PROMPTS:
            mine = [row for row in rows if (row["host"], row["prompt"]) == (host, prompt)]
            for key, style, how in (("best_gbps", "-", "at best"), ("launched_gbps", ":", "launched one by one")):
                points = [(row["rank"], row[key]) for row in mine if row[key]]
                if points:
                    axis.plot(*zip(*points), style, marker="o", markersize=3, color=colour[str(prompt)],
                              label=f"{prompt} tokens, {how}")  # fmt: skip
        for name, speed in BUSES:
            axis.axhline(speed, color="black", linewidth=0.6)
            axis.annotate(name, (RANKS[0], speed), fontsize=7, va="bottom")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(float(LINKS[0]), float(LINKS[-1]))
        axis.set_title(host)
        axis.set_xlabel("rank")
    axes[0].set_ylabel("bus below which the CPU's help pays, GB/s")
    legend(figure, axes, columns=3)
    save(figure, path, (".png",))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the map and its figure."""
    parser = Parser(prog="perf.assist_map", description=__doc__)
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME=GFLOPS",
        help="a host measured elsewhere; may be repeated",
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        elsewhere = [Host(name, float(value)) for name, _, value in (text.partition("=") for text in args.host)]
        prompts, launches, cells = measured(RESULTS)
    except (ValueError, OSError, KeyError) as error:
        print(f"perf.assist_map: {error}", file=sys.stderr)
        return 2
    made = provenance()
    hosts = [Host(f"{made['processor']}".split(",")[0] + f", {host_cores()} cores", host_gflops()), *elsewhere]
    rows = rows_of(hosts, prompts, launches)
    record = {
        **made,
        "hosts": {host.name: host.gflops for host in hosts},
        "prompt_ms": {prompt: 1e3 * seconds for prompt, seconds in prompts.items()},
        "launches_ms": 1e3 * launches,
        "buses_gbps": dict(BUSES),
        "rows": rows,
        "measured_cells": cells,
    }
    write_atomically(args.out, (json.dumps(record, indent=1) + "\n").encode())
    args.out.with_suffix(".md").write_text(text(record))
    draw(args.out.with_suffix(""), rows)
    best = max(row["launched_gbps"] for row in rows)
    print(f"wrote {args.out}: with launches one by one the CPU's help pays on buses of {best:g} GB/s and less")
    return 0


if __name__ == "__main__":
    sys.exit(main())
