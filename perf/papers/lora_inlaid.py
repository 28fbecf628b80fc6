"""Claims of LoRA-Inlaid: joint quantization, tasks that are added, multi-task scheduling."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from perf.gpu.headline_table import PAPER, ratios
from perf.papers.claims import PARTLY, REFUTED, REPRODUCED, Claim, Paper, Results, mean, row


def lora_inlaid(results: Results) -> Paper:
    """Joint quantization, dynamic tasks, multi-task scheduling."""
    return Paper(
        "LoRA-Inlaid: multi-task LoRA serving on one quantized base (NeurIPS 2024)",
        "`inlaid quantize` (multi-task GPTQ, seven aggregations), `inlaid task` and `/v1/tasks` (incremental), the "
        "policy `inlaid` (predicted lengths, few tasks in a step, a bound on waiting). The paper's code is not public: "
        "its figures are second-hand.",
        [*_joint_quantization(results), *_tasks_added(results), *_multi_task_scheduling(results)],
    )


def _joint_quantization(results: Results) -> Iterator[Claim]:
    found, seeds = results("eval/results/demo.json")["summary"], results("eval/results/quant-demo.json")["cells"]

    def drops(variant: str, bits: int) -> str:
        of = row(found, variant=variant, bits=bits)
        return f"{of['average_drop']:.2f} ({of['worst_drop']:.1f})"

    def worst(bits: int, name: str) -> float:
        cells = [cell["losses"] for cell in seeds if cell["bits"] == bits]
        return sum(float(max(cell[name][task] - cell["16-bit"][task] for task in cell[name])) for cell in cells) / len(
            cells
        )

    def points(bits: int, variant: str) -> float:
        return float(row(found, variant=variant, bits=bits)["average_drop"])

    better = all(worst(bits, "mlgptq minimax-loss") < worst(bits, "gptq-mixed") for bits in (4, 3, 2))
    yield Claim(
        "A base calibrated with every task's adapter loses less than one calibrated on their mixed data",
        "4 bits, average drop: 1.70% against 4.72%",
        "4, 3, 2 bits, worst task's loss in nats: "
        + ", ".join(f"{worst(b, 'mlgptq minimax-loss'):.3f} against {worst(b, 'gptq-mixed'):.3f}" for b in (4, 3, 2))
        + "; average (worst) drop in points at 3 bits "
        + f"{drops('mlgptq-minimax-loss', 3)} against {drops('gptq-mixed', 3)}. The demo's 5 million parameters",
        PARTLY if better else REFUTED,
        ("eval/results/quant-demo.json", "eval/results/demo.json", "eval/results/quant-demo.md"),
        "bash eval/run_all.sh seeds",
    )
    yield Claim(
        "Taking the elementwise maximum over the tasks' Hessians is what makes it good",
        "the paper's aggregation",
        f"2 bits, average drop in points: maximum {points(2, 'mlgptq-max'):.1f}, mean {points(2, 'mlgptq-mean'):.1f}, "
        f"mixed data {points(2, 'gptq-mixed'):.1f}. The maximum of matrices need not be positive definite",
        REFUTED if points(2, "mlgptq-max") > points(2, "gptq-mixed") else REPRODUCED,
        ("eval/results/demo.json",),
    )
    yield Claim(
        "Rounding loses more than GPTQ with the tasks' data",
        "4 bits: 4.02% against 1.70%",
        f"4 bits {drops('rtn', 4)} against {drops('mlgptq-minimax-loss', 4)}, "
        f"3 bits {drops('rtn', 3)} against {drops('mlgptq-minimax-loss', 3)} (average, worst in points)",
        REPRODUCED if points(3, "rtn") > points(3, "mlgptq-minimax-loss") else REFUTED,
        ("eval/results/demo.json", "eval/results/demo-radar.png"),
    )


def _tasks_added(results: Results) -> Iterator[Claim]:
    cost = results("cpu-quant-cost.json")["adding_the_twelfth_task"]
    online = results("online-tasks-h200.json")["summary"]
    yield Claim(
        "Adding tasks later gives the same base as quantizing for all at once",
        "identical",
        f"the same bits: {'yes' if cost['same_bits'] else 'no'}; the twelfth task takes {cost['share']:.3f} of the "
        "time of twelve tasks' Hessians",
        REPRODUCED if cost["same_bits"] else REFUTED,
        ("perf/results/cpu-quant-cost.json",),
    )
    yield Claim(
        "A task is added while serving, without an interruption",
        "throughput 10 to 13% lower meanwhile",
        f"{-100 * online['dip']:.0f}% lower over {online['seconds']:.0f} s, the switch itself "
        f"{1e3 * online['switch']['seconds']:.0f} ms; a 7B, 64 clients on 32 adapters, one H200, a share of half",
        REPRODUCED if online["dip"] < 0.13 else REFUTED,
        ("perf/results/online-tasks-h200.json", "perf/results/online-tasks-h200.png"),
    )


def _multi_task_scheduling(results: Results) -> Iterator[Claim]:
    tasks, live = results("sim-tasks.json"), results("scheduling-real-engine.json")["rows"]
    loads = {
        rate: tuple(row(tasks["load"], rate=rate, policy=name)["slo_attainment"] for name in ("inlaid", "fcfs"))
        for rate in (6.0, 6.5, 7.0, 7.5)
    }
    real = {
        load: tuple(row(live, load=load, policy=name)["slo_attainment"] for name in ("inlaid", "fcfs"))
        for load in (1.05, 1.2, 1.4)
    }
    ratios = [ours / other for ours, other in [*loads.values(), *real.values()]]
    yield Claim(
        "Scheduling by predicted lengths answers more requests in time",
        "SLO attainment 3.9x on average, 10x at most, against S-LoRA",
        "against FCFS on the same engine, simulated at "
        + ", ".join(f"{rate:g} req/s {a / b:.2f}x" for rate, (a, b) in loads.items())
        + "; the real engine on a CPU at "
        + ", ".join(f"{load:g} of its capacity {a / b:.1f}x" for load, (a, b) in real.items()),
        REPRODUCED if min(ratios) >= 1 and max(ratios) >= 3.9 else PARTLY,
        ("perf/results/sim-tasks.json", "perf/results/scheduling-real-engine.json", "perf/results/sim-tasks.png"),
    )
    shares = {
        each["policy"] + ("" if each["lengths"] == "history" else " without lengths"): each["slo_attainment"]
        for each in tasks["ablation"]
    }
    whole = shares["inlaid:seniority=1000000"]
    few = {
        bound: [row(tasks["seniority"], rate=6.5, policy=f"inlaid:seniority={bound},beta={beta}")["slo_attainment"]
                for beta in (10, 32)]
        for bound in (1_000_000, 60)
    }  # fmt: skip
    grouping = {bound: tight / loose for bound, (tight, loose) in few.items()}
    yield Claim(
        "Each part of the scheduler counts",
        "shortest first 2.27x, prediction 1.23x, grouping 1.16x (100 tasks)",
        "at 6.5 req/s, with no bound on waiting, as there: shortest first "
        f"{whole / shares['inlaid:seniority=0']:.2f}x, 10 tasks in a step for 32 {grouping[1_000_000]:.2f}x; a bound "
        f"of 60 s leaves {shares['inlaid'] / whole:.2f} of it, with prediction "
        f"{shares['inlaid'] / shares['inlaid without lengths']:.2f}x and 10 tasks for 32 {grouping[60]:.2f}x",
        PARTLY if min(grouping.values()) < 1 else REPRODUCED,
        ("perf/results/sim-tasks.json", "perf/results/sim-tasks.md"),
    )
    yield from _waiting_and_lengths(results)
    thousand = row(results("h100-adapters.json")["cliff_slots"]["result"]["rows"], adapters=1000)
    yield Claim(
        "Up to 1,000 tasks on one GPU",
        "1,000",
        f"1,000 adapters of rank 16 over 64 places, 8B, one H100: {thousand['output_tokens_per_second']:,.0f} tok/s, "
        f"p99 TTFT {thousand['ttft_p99_ms']:.0f} ms",
        REPRODUCED,
        ("perf/results/h100-adapters.json", "perf/results/h100-oversubscribed.png"),
    )
    yield _headline(results)


def _waiting_and_lengths(results: Results) -> Iterator[Claim]:
    tasks = results("sim-tasks.json")
    waits = {
        rate: [
            row(tasks["load"], rate=rate, policy="fcfs")["max_ttft"],
            *(row(tasks["seniority"], rate=rate, policy=f"inlaid:seniority={bound},beta=32")["max_ttft"]
              for bound in (60, 1_000_000)),
        ]
        for rate in (6.5, 7.0)
    }  # fmt: skip
    yield Claim(
        "No task starves",
        "no bound is given, and unfairness is named as a limit",
        "no later request overtakes one after `seniority` (60) seconds; longest first token "
        + ", ".join(
            f"at {rate:g} req/s {ours:.0f} s (fcfs {fcfs:.0f}, without the bound {free:.0f})"
            for rate, (fcfs, ours, free) in waits.items()
        ),
        REPRODUCED if all(ours <= 60 + fcfs for fcfs, ours, _ in waits.values()) else REFUTED,
        ("perf/results/sim-tasks.json", "perf/results/sim-tasks.md"),
    )
    found = results("sim-predictors.json")
    ours, theirs = (
        row(found["errors"], predictor=name) for name in ("inlaid's, learning while it serves", "learned encoder")
    )
    share = {
        name: mean(found["scheduling"], "slo_attainment", trace="the demo's tasks", lengths=name)
        for name in ("fcfs", "inlaid's", "learned encoder")
    }
    own = share["inlaid's"]
    yield Claim(
        "A learned model predicts lengths well enough to schedule by",
        "a separate model of 255 MB, 16 ms a request",
        f"the demo's twelve tasks, error as a factor and pairs of a task in order: an encoder trained before "
        f"{theirs['mean_error_factor']:.3f}, {theirs['pairs_in_order_within_a_task']:.0%}, ours, which learns while it "
        f"serves, {ours['mean_error_factor']:.3f}, {ours['pairs_in_order_within_a_task']:.0%}, in "
        f"{1e3 * ours['ms_per_request']:.0f} us instead of {theirs['ms_per_request']:.1f} ms (one of 66 million "
        f"parameters {found['papers_size']['ms']:.0f}); in time {share['learned encoder']:.1%}, "
        f"{own:.1%} (fcfs {share['fcfs']:.1%})",
        REPRODUCED if share["learned encoder"] > share["fcfs"] else REFUTED,
        ("perf/results/sim-predictors.json", "perf/results/sim-predictors.md"),
    )


def _headline(results: Results) -> Claim:
    found = results("h200-headline-7b.json")["result"]["7b"]["rows"]
    better = [each for each in ratios(found) if each["system"] == "inlaid"]
    most, average = (
        {name: how([each[name] for each in better]) for name, *_ in PAPER} for how in (max, statistics.fmean)
    )
    reached = [most[name] >= highest for name, _, highest in PAPER]
    return Claim(
        "More throughput, lower latency and more answers in time than S-LoRA with a 16-bit base",
        ", ".join(f"{name} {usual:g}x on average, {highest:g}x at most" for name, usual, highest in PAPER),
        "against this engine with a 16-bit base, padded ranks and fcfs in 24 GiB of an H200, 7B, 2 to 1,000 tasks: "
        + ", ".join(f"{name} {average[name]:.2f}x, {most[name]:.2f}x" for name, *_ in PAPER)
        + ". 13B is not measured yet",
        REPRODUCED if all(reached) else PARTLY if min(most.values()) > 1 else REFUTED,
        ("perf/results/h200-headline-7b.json", "perf/results/h200-headline-7b.md"),
    )
