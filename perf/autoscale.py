"""`python -m perf.autoscale TEMPLATE.toml --out DIR`: BlitzScale's templates with their scaling, on the simulator.

The template's [router] bounds and a model's figures make the planner (`--planner slo`: an objective does; `split`: the
bounds, with prefill and decode on replicas of their own, as in BlitzScale); a feature's flags choose where a new
replica's weights come from; the dataset is a trace in Azure's format. Each point gets a JSON file and a figure of four
panels: request rate, replicas over time, TTFT and time between tokens, GPU-seconds. Keys without a meaning are told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from inlaid.cluster.placement import make_placement
from inlaid.cluster.planner import BoundsPlanner, Planner, Router, SloPlanner, router_of
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.flags import Parser
from inlaid.report.plots import legend, new_figure, save
from inlaid.report.provenance import provenance
from inlaid.sim.apart import ScaledApart
from inlaid.sim.cluster import ClusterOutcome
from inlaid.sim.cost import load_cost, prices_of
from inlaid.sim.request_log import Arrival, RequestRecord
from inlaid.sim.scaling import Machine, Scaled, Start, parse_feature
from inlaid.sim.simulate import Setup
from inlaid.workload.toml import load_toml
from inlaid.workload.traces import Trace, TraceRow, read_trace, repeat_rows

WINDOW = 5.0  # seconds of a point in the figures
TTFT, TBT = 1.0, 0.1  # the objective, in seconds
BLOCK = 16  # tokens
SIDES = ("lower", "upper")
Point = tuple[float, int, int, int]  # seconds, replicas wanted, there, serving
_NO_MODEL = "the machine's cost file stands for the model"
WITHOUT_MEANING: Mapping[str, str] = MappingProxyType(
    {
        "global.num_gpus_per_node": "the simulator has no nodes",
        "global.cuda_devices": "the simulator has no devices",
        "server.ibv_rate": "the simulator's peers send at a rate of its own",
        "server.inter_node": "the simulator has no nodes",
        "server.config": "the simulator has no nodes",
        "router.port": "the simulator has no ports",
        "extra-envs": "the simulator starts no processes",
        "model.model_path": _NO_MODEL,
        "model.tokenizer": _NO_MODEL,
        "model.num_hidden_layers": _NO_MODEL,
    }
)
BOUNDS, SLO, SPLIT = "bounds", "slo", "split"  # planners
TOGETHER = "prefill and decode share replicas; it has its meaning with --planner split"
BY_OBJECTIVE = "--planner slo scales by an objective"
FLAGS_OF_SPLIT = ("mutate", "mock_transfer")


def reasons(planner: str) -> dict[str, str]:
    """Return why keys of a template mean nothing under a planner."""
    found = dict(WITHOUT_MEANING)
    if planner != SPLIT:
        found |= {f"router.{key}": TOGETHER for key in ("migration_lower_bound", "migration_upper_bound")}
        found |= {"router.mock_transfer_millis": TOGETHER, "model.tokens_transferred_per_sec": TOGETHER}
    if planner == SLO:
        found |= {f"router.{kind}_{side}_bound": BY_OBJECTIVE for kind in ("prefill", "decode") for side in SIDES}
        found |= {"router.scale_down_threshold_millis": BY_OBJECTIVE, "model.tokens_prefilled_per_sec": BY_OBJECTIVE}
    return found


def without_meaning(data: Mapping[str, Any], model: str, reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of a template that mean nothing to a run, with the reason."""
    sections = {**data, "model": data["models"][model]}
    found = {}
    for key, reason in reasons.items():
        section, _, name = key.partition(".")
        if name in sections.get(section, ()) or (not name and section in sections):
            found[key.replace("model.", f"models.{model}.")] = reason
    return found


def arrivals(dataset: Mapping[str, Any], most: int) -> list[Arrival]:
    """Read a dataset's trace, again and again until its time_in_secs."""
    spec = Trace(dataset["dataset_path"], max_input=most // 2, max_output=most // 4)
    read = read_trace(spec)
    seconds = dataset.get("time_in_secs")
    last = max(row.at or 0.0 for row in read)
    if seconds is not None:
        read = [row for row in read if (row.at or 0.0) < seconds] if seconds <= last else _looped(read, seconds, last)
    return [_arrival(number, row) for number, row in enumerate(read)]


def _looped(read: list[TraceRow], seconds: float, last: float) -> list[TraceRow]:
    return repeat_rows(read, seconds, None, last)


def _arrival(number: int, row: TraceRow) -> Arrival:
    output = max(1, row.output_length or 1)
    params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0, seed=0)
    prompt = [1] * max(1, row.input_length or 1)
    return Arrival(
        row.at or 0.0, NewRequest(id=str(number), prompt=prompt, params=params, true_output_len=output, tenant="all")
    )


def simulate(
    trace: list[Arrival], router: Router, start: Start, machine: str, planner: str
) -> tuple[Scaled, ClusterOutcome]:
    """Serve a trace on as many replicas as the planner says."""
    cost = load_cost(machine)
    setup = Setup(
        cost=cost,
        num_tokens=router.num_available_blocks * BLOCK,
        lengths="none",
        scheduler={"max_num_seqs": 128},
        max_paired_tenants=0,
    )
    prices = prices_of(cost)
    placement = make_placement("predicted", prices)
    if planner == SPLIT:
        scaled: Scaled = ScaledApart(trace, setup, placement, router, start, Machine())
        return scaled, scaled.run()
    made: Planner = BoundsPlanner(router)
    if planner == SLO:
        made = SloPlanner(router.least, router.most, prices, TTFT, TBT, hold=2.0)
    scaled = Scaled(trace, setup, placement, made, router, start, Machine())
    return scaled, scaled.run()


def summarize(all_records: Sequence[RequestRecord], points: Sequence[Point], gpu_seconds: float) -> dict[str, Any]:
    """Return a point's figures and its lines over time."""
    records = [record for record in all_records if record.first_token is not None and record.finish is not None]
    first = np.array([record.ttft for record in records])
    between = np.array([(r.finish - r.first_token) / max(1, r.output_len - 1) for r in records])  # type: ignore[operator]
    times = np.array([record.arrival for record in records])
    lines = []
    for left in np.arange(0.0, times.max() + WINDOW, WINDOW):
        inside = (times >= left) & (times < left + WINDOW)
        if inside.any():
            shown = [float(np.percentile(values[inside], q)) for values in (first, between) for q in (50, 99)]
            lines.append([float(left), float(inside.sum() / WINDOW), *(round(1e3 * value, 2) for value in shown)])
    return {
        "requests": len(all_records),
        "lost": len(all_records) - len(records),
        "ttft_p50_ms": round(1e3 * float(np.percentile(first, 50)), 1),
        "ttft_p99_ms": round(1e3 * float(np.percentile(first, 99)), 1),
        "tbt_p99_ms": round(1e3 * float(np.percentile(between, 99)), 1),
        "attainment": round(float(np.mean((first <= TTFT) & (between <= TBT))), 4),
        "gpu_seconds": round(gpu_seconds, 1),
        "most_replicas": max(point[2] for point in points),
        "over_time": {"columns": ["s", "rate", "ttft_p50", "ttft_p99", "tbt_p50", "tbt_p99"], "rows": lines},
        "replicas": {"columns": ["s", "wanted", "there", "serving"], "rows": points[::4]},
    }


def draw(path: Path, title: str, rows: Mapping[str, dict[str, Any]]) -> None:
    """Draw the four panels, a colour for each feature."""
    figure, ((rate, replicas), (times, used)) = new_figure((11, 7), 2, 2)
    for number, (name, row) in enumerate(rows.items()):
        colour = f"C{number}"
        lines, there = np.array(row["over_time"]["rows"]), np.array(row["replicas"]["rows"])
        if not number:
            rate.plot(lines[:, 0], lines[:, 1], color="black", label="requests a second")
        replicas.step(there[:, 0], there[:, 1], color=colour, linestyle=":", label=f"{name}: needed")
        replicas.step(there[:, 0], there[:, 3], color=colour, label=f"{name}: serving")
        times.plot(lines[:, 0], lines[:, 3], color=colour, label=f"{name}: TTFT p99")
        times.plot(lines[:, 0], lines[:, 2], color=colour, linestyle="--", label=f"{name}: TTFT p50")
        times.plot(lines[:, 0], lines[:, 5], color=colour, linestyle=":", label=f"{name}: between tokens p99")
        spent = np.cumsum(there[:, 2] * np.diff(there[:, 0], prepend=0.0))
        used.plot(there[:, 0], spent, color=colour, label=f"{name}: {row['gpu_seconds']:.0f} GPU-seconds")
    rate.set_ylabel("requests/s")
    replicas.set_ylabel("replicas")
    times.set_ylabel("ms")
    times.set_yscale("log")
    used.set_ylabel("GPU-seconds")
    for axis in (rate, replicas, times, used):
        axis.set_xlabel("s")
    figure.suptitle(title)
    legend(figure, (replicas, times, used), columns=3)
    save(figure, path)


def run(data: Mapping[str, Any], machine: str, planner: str, out: Path) -> dict[str, Any]:
    """Run all selected points; return their rows by name."""
    selection, told = data["selection"], dict[str, str]()
    found: dict[str, Any] = {}
    for model_name in selection["models"]:
        model = data["models"][model_name]
        if model.get("tp_size", 1) != 1:
            raise ValueError(
                f"models.{model_name}.tp_size is {model['tp_size']}: simulated replicas have one GPU each, whose "
                "figures are of a model that fits there; select models of tp_size 1"
            )
        router = router_of(data.get("router", {}), model)
        told |= without_meaning(data, model_name, reasons(planner))
        for dataset_name in selection["datasets"]:
            trace = arrivals(data["datasets"][dataset_name], router.num_available_blocks * BLOCK)
            rows: dict[str, dict[str, Any]] = {}
            for feature in selection.get("features", [""]):
                if feature and feature not in data.get("features", {}):
                    raise ValueError(f"[features] has no {feature!r}; it has {', '.join(data.get('features', {}))}")
                start, without = parse_feature(data["features"][feature] if feature else "")
                if planner != SPLIT:
                    without |= {flag: TOGETHER for flag in FLAGS_OF_SPLIT if getattr(start, flag)}
                told |= {f"features.{feature}.{flag}": reason for flag, reason in without.items()}
                scaled, outcome = simulate(trace, router, start, machine, planner)
                rows[feature] = {"start": msgspec.structs.asdict(_Start(start.source, start.live, start.mock))}
                rows[feature] |= summarize(outcome.records, scaled.timeline.points, outcome.replica_seconds)
                shown = {key: rows[feature][key] for key in ("ttft_p99_ms", "attainment", "gpu_seconds")}
                print(f"{model_name} {dataset_name} {feature}: {shown}", flush=True)
            name = f"{model_name}-{dataset_name}"
            draw(out / f"autoscale-{name}-{planner}", f"{name}: {planner} planner on simulated {machine}", rows)
            found[name] = rows
    return {"points": found, "without_meaning_here": told}


class _Start(msgspec.Struct):
    weights_from: str
    serves_while_loading: bool
    mocked: bool


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="perf.autoscale", description="Run a BlitzScale template's scaling on the simulator.")
    parser.add_argument("template", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and figures")
    parser.add_argument("--machine", default="h100", help="a machine of the simulator")
    parser.add_argument("--features", default="", help="comma-separated; default: those that the template selects")
    parser.add_argument(
        "--planner",
        choices=(BOUNDS, SLO, SPLIT),
        default=BOUNDS,
        help="the template's bounds; an objective; or the bounds with prefill and decode on replicas of their own",
    )
    arguments: argparse.Namespace = parser.parse_args(argv)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        data = load_toml(arguments.template)
        if arguments.features:
            data["selection"]["features"] = arguments.features.split(",")
        found = run(data, arguments.machine, arguments.planner, arguments.out)
    except (ValueError, OSError, KeyError) as error:
        print(f"perf.autoscale: {arguments.template}: {error}", file=sys.stderr)
        return 2
    manifest = {**provenance(0), "machine": arguments.machine, "planner": arguments.planner, **found}
    path = arguments.out / f"autoscale-{arguments.planner}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    for key, reason in found["without_meaning_here"].items():
        print(f"without a meaning here: {key}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
