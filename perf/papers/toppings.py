"""Claims of Toppings: adapters loaded with the CPU's help, ranks in placement."""

from __future__ import annotations

from perf.papers.claims import NOT_HERE, PARTLY, REFUTED, REPRODUCED, Claim, Paper, Results, mean, row


def toppings(results: Results) -> Paper:
    """Adapters loaded with the CPU's help, ranks in placement."""
    adapters = results("h100-adapters.json")
    loads, crossover = adapters["load"]["result"]["rows"], adapters["crossover"]["result"]
    wins, cells = len(crossover["cpu_assist_wins"]), len(crossover["rows"])
    placed, machine = results("sim-placement.json")["rows"], results("inlaid/sim/machines/h200.json")
    links = {run["link_gbps"]: run["rows"] for run in results("toppings-cpu.json")["runs"]}
    there = results("h200-toppings.json")["result"]["rows"]

    def firsts(link: float) -> str:
        return ", ".join(f"{each['mode']} {each['first_token_ms']:.0f}" for each in links[link])

    def fastest(key: str) -> float:
        return max(float(each[key]) for each in results("assist-map.json")["rows"])

    def ms(kernel: str, placement: str, rate: float) -> float:
        return mean(placed, "mean_ms", kernel=kernel, placement=placement, rate=rate)

    def gains(kernel: str, rate: float = 200.0) -> str:
        ours = ms(kernel, "rank-aware", rate)
        others = (
            ("dLoRA", "dlora-like"), ("dLoRA with migration", "dlora-migration"), ("random", "random"),
            ("first fit", "first-fit"), ("most idle", "most-idle"),
        )  # fmt: skip
        return ", ".join(f"{name} {round(100 * (1 - ours / ms(kernel, other, rate)))}%" for name, other in others)

    def rank(of: int, key: str) -> float:
        return float(row(loads, rank=of)[key])

    refit = results("h200-sched.json")["refit"]["rows"]
    off = max(abs(each[f"{name}_error"]) for each in refit for name in ("throughput", "ttft", "latency"))
    checked = results("sim-placement.json")["check"]
    apart = max(abs(each["mean_ms"] / each["engine_mean_ms"] - 1) for each in checked)
    live = results("placement-live.json")["rows"]
    return Paper(
        "Toppings: CPU-assisted, rank-aware adapter serving (ATC 2025)",
        "`--adapter-mode` (cached, on-demand, pipelined; cpu-assist was built, measured and retired), each request's "
        "seconds by part (`docs/spans.md`), the placement `rank-aware` in `inlaid cluster`.",
        [
            Claim(
                "Computing a cold adapter's part on the CPU while it loads shortens the first token",
                "cached < CPU-assisted < on demand; 7B, rank 64",
                "the artifact's 60 requests on a CPU, first token in ms: over a stand-in bus of 0.01 GB/s "
                f"{firsts(0.01)}, as in the paper; at memory's own speed {firsts(0.0)}. On GPUs: of {cells} cells of "
                f"rank, prompt and bus on an H100 the CPU wins {wins}; a lone request on an H200, a 7B and rank 64, "
                + ", ".join(f"{each['mode']} {each['ttft_mean_ms']:.1f}" for each in there)
                + f". It would pay on buses below {fastest('best_gbps'):.0f} GB/s at best and below "
                f"{fastest('launched_gbps'):.0f} as it was built (PCIe 5 has about 50), for short prompts and high "
                "ranks",
                NOT_HERE if wins <= cells // 10 else PARTLY,
                (
                    "perf/results/assist-map.json",
                    "perf/results/assist-map.md",
                    "perf/results/assist-map.png",
                    "perf/results/toppings-cpu.json",
                    "perf/results/h100-adapters.json",
                    "perf/results/h200-toppings.json",
                ),
                "bash perf/toppings.sh",
            ),
            Claim(
                "Loading an adapter takes a few to tens of milliseconds, by its rank",
                "a few to tens",
                "from pageable memory, as the artifact copies: "
                + ", ".join(f"rank {of} {rank(of, 'pageable_ms'):.1f} ms" for of in (8, 64, 128))
                + "; from pinned memory "
                + ", ".join(f"{rank(of, 'pinned_ms'):.1f}" for of in (8, 64, 128)),
                REPRODUCED if rank(128, "pageable_ms") > 10 else REFUTED,
                ("perf/results/h100-adapters.json",),
            ),
            Claim(
                "Placing by rank beats other placements (mean time per token, padded kernels)",
                "dLoRA 22%, random 23%, first fit 57%",
                f"on a trace of functions of Azure's statistics, 200 req/s, padded: {gains('padded')}; exact: "
                f"{gains('exact')}; our kernels at 340 req/s: {gains('ours', 340.0)}. Ours do not pad, so ranks alone "
                f"gain little over the most idle instance. Replicas of the engine in the simulator differ by "
                f"{100 * apart:.1f}% at most; live ones on a CPU, mean ms/token against simulated: "
                + ", ".join(
                    f"{each['placement']} {each['live_mean_ms']:.1f} against {each['simulated_mean_ms']:.1f}"
                    for each in live
                ),
                PARTLY,
                (
                    "perf/results/sim-placement.json",
                    "perf/results/sim-placement-padded.png",
                    "perf/results/sim-placement-distributions.png",
                    "perf/results/placement-live.json",
                ),
            ),
            Claim(
                "A linear model of ranks and batch explains a step",
                "R squared 0.96",
                f"R squared {machine['held_out_r_squared']:.3f} on held-out steps of an 8B on one H200, with "
                "staircases for its graphs' sizes; throughput, first tokens and latency of unseen traffic within "
                f"{100 * off:.1f}%",
                REPRODUCED if machine["held_out_r_squared"] >= 0.95 and off < 0.05 else PARTLY,
                ("perf/results/h200-sched.json", "inlaid/sim/machines/h200.json"),
                "python -m perf.rounds perf/results/h200-sched-rounds.json --machine h200",
            ),
        ],
    )
