"""Claims of Toppings: adapters loaded with the CPU's help, ranks in placement."""

from __future__ import annotations

from perf.papers.claims import NOT_HERE, PARTLY, REFUTED, REPRODUCED, Claim, Paper, Results, mean, row


def toppings(results: Results) -> Paper:
    """Adapters loaded with the CPU's help, ranks in placement."""
    adapters = results("h100-adapters.json")
    modes, loads = adapters["modes"]["result"]["rows"], adapters["load"]["result"]["rows"]
    crossover = adapters["crossover"]["result"]
    by_mode = [each for each in modes if each.get("zipf") == 1.0]
    first = {each["mode"]: each["ttft_mean_ms"] for each in by_mode}
    wins, cells = len(crossover["cpu_assist_wins"]), len(crossover["rows"])
    placed = results("sim-placement.json")["rows"]

    def ms(kernel: str, placement: str) -> float:
        return mean(placed, "mean_ms", kernel=kernel, placement=placement, rate=200.0)

    def gains(kernel: str) -> str:
        ours = ms(kernel, "rank-aware")
        others = (("dLoRA", "dlora-like"), ("random", "random"), ("first fit", "first-fit"), ("most idle", "most-idle"))
        return ", ".join(f"{name} {100 * (1 - ours / ms(kernel, other)):.0f}%" for name, other in others)

    def rank(of: int, key: str) -> float:
        return float(row(loads, rank=of)[key])

    fit = results("h100-sched.json")["result"]["fit_on_unseen_steps"]
    return Paper(
        "Toppings: CPU-assisted, rank-aware adapter serving (ATC 2025)",
        "`--adapter-load` (on-demand, pipelined, cpu-assist), the placement `rank-aware` in `inlaid cluster`.",
        [
            Claim(
                "Computing a cold adapter's part on the CPU while it loads shortens the first token",
                "cached < CPU-assisted < on demand; 7B, rank 64",
                "mean TTFT at Zipf 1.0, 8B: "
                + ", ".join(f"{name} {value:.1f} ms" for name, value in first.items())
                + f"; of {cells} cells of rank, prompt and bus the CPU wins {wins}. A pinned copy takes "
                f"{rank(64, 'pinned_ms'):.1f} ms at rank 64, less than the CPU's part of a prompt",
                NOT_HERE if wins <= cells // 10 else PARTLY,
                ("perf/results/h100-adapters.json",),
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
                f"padded, 200 req/s: {gains('padded')}; exact: {gains('exact')}. Ours do not pad, so ranks alone gain "
                "nothing over the most idle instance",
                PARTLY,
                ("perf/results/sim-placement.json", "perf/results/sim-placement-padded.png"),
            ),
            Claim(
                "A linear model of ranks and batch explains a step",
                "R squared 0.96",
                f"R squared {fit['r_squared']:.3f} on unseen steps of an 8B on one H100",
                REPRODUCED if fit["r_squared"] >= 0.95 else PARTLY,
                ("perf/results/h100-sched.json",),
            ),
        ],
    )
