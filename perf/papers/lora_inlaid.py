"""Claims of LoRA-Inlaid: joint quantization, tasks that are added, multi-task scheduling."""

from __future__ import annotations

from collections.abc import Iterator

from perf.papers.claims import NOT_YET, PARTLY, REFUTED, REPRODUCED, Claim, Paper, Results, row


def lora_inlaid(results: Results) -> Paper:
    """Joint quantization, dynamic tasks, multi-task scheduling."""
    return Paper(
        "LoRA-Inlaid: multi-task LoRA serving on one quantized base (NeurIPS 2024)",
        "`inlaid quantize` (multi-task GPTQ, seven aggregations), `inlaid task` and `/v1/tasks` (incremental), the "
        "policy `inlaid` (predicted lengths, grouping). The paper's code is not public: its figures are second-hand.",
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
    whole = shares["inlaid"]
    grouping = whole / shares["inlaid:grouping=0,beta=1000"]
    yield Claim(
        "Each part of the scheduler counts",
        "shortest first 2.27x, prediction 1.23x, grouping 1.16x (100 tasks)",
        f"at 6.5 req/s shortest first {whole / shares['inlaid:ageing=1000000']:.2f}x, prediction "
        f"{whole / shares['inlaid without lengths']:.2f}x, grouping {grouping:.2f}x",
        PARTLY if grouping < 1.1 else REPRODUCED,
        ("perf/results/sim-tasks.json", "perf/results/sim-tasks.md"),
    )
    thousand = row(results("h100-adapters.json")["cliff_slots"]["result"]["rows"], adapters=1000)
    yield Claim(
        "Up to 1,000 tasks on one GPU",
        "1,000",
        f"1,000 adapters of rank 16 over 64 places, 8B, one H100: {thousand['output_tokens_per_second']:,.0f} tok/s, "
        f"p99 TTFT {thousand['ttft_p99_ms']:.0f} ms",
        REPRODUCED,
        ("perf/results/h100-adapters.json", "perf/results/h100-oversubscribed.png"),
    )
    yield Claim(
        "More throughput and lower latency than S-LoRA with a 16-bit base",
        "1.58x, 1.76x at most",
        "needs our engine with its advantages switched off on one GPU",
        NOT_YET,
    )
