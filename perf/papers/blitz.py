"""Claims of BlitzScale: replicas that start fast, and a grid of experiments."""

from __future__ import annotations

from perf.papers.claims import NOT_YET, PARTLY, REPRODUCED, Claim, Paper, Results


def blitz(results: Results) -> Paper:
    """Replicas that start fast, and a grid of experiments."""
    (found,) = results("autoscale-blitz-bounds.json")["points"].values()
    cached, host, peer = (found[name] for name in ("sllm_cache_replace", "sllm_optimal", "blitz_ultra"))
    lower = 1 - peer["ttft_p99_ms"] / cached["ttft_p99_ms"]
    always = peer["most_replicas"] * peer["replicas"]["rows"][-1][0]
    file = "perf/results/autoscale-blitz-bounds.json"
    return Paper(
        "BlitzScale: fast autoscaling with live weights (OSDI 2025)",
        "the grid of experiments (`python -m perf.runner`: templates, features, checkpoints, dry runs), `[router]` "
        "bounds in `inlaid cluster --router` and in the simulator, start-ups from disk, host and peer (simulated).",
        [
            Claim(
                "Weights from a peer cut the tail of first tokens in a burst",
                "up to 94% against ServerlessLLM",
                f"p99 TTFT {cached['ttft_p99_ms']:.0f} ms with a host cache that misses, {host['ttft_p99_ms']:.0f} "
                f"with one that always hits, {peer['ttft_p99_ms']:.0f} from peers: {100 * lower:.0f}% lower "
                "(8B on H100s, simulated)",
                REPRODUCED if lower > 0.8 else PARTLY,
                (file, "perf/results/autoscale-blitz-bounds.png"),
            ),
            Claim(
                "Scaling takes less GPU time than replicas for the peak, with the same objective",
                "49% less",
                f"{peer['gpu_seconds']:.0f} GPU-seconds, {100 * peer['attainment']:.1f}% in time; its "
                f"{peer['most_replicas']} replicas of the peak, all the time, would be {always:,.0f}",
                REPRODUCED if peer["gpu_seconds"] < 0.51 * always and peer["attainment"] > 0.99 else PARTLY,
                (file,),
            ),
            Claim(
                "Weights move between real GPUs while a replica starts",
                "over NVLink and RDMA",
                "simulated only",
                NOT_YET,
            ),
        ],
    )
