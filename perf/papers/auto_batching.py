"""Claims of the auto-batching framework: generate calls as a fused graph."""

from __future__ import annotations

from perf.papers.claims import PARTLY, REFUTED, REPRODUCED, Claim, Paper, Results, row


def auto_batching(results: Results) -> Paper:
    """Generate calls as a fused graph."""
    made = results("programs-cpu.json")
    distinct = row(made["switches"], kind="distinct", ranks="mixed")
    slower, same = distinct["times_slower"], distinct["equal_answers"]
    times = row(made["rows"], kind="distinct", ranks="mixed")["times_faster"]
    ranks = results("h200-ac6fdf2.json")["stages"]["ranks-7b"]["result"]["rows"]
    mixed, mean_rank = (row(ranks, names=name, concurrency=64)["output_tokens_per_second"] for name in ("m", "u"))
    file = "perf/results/programs-cpu.json"
    return Paper(
        "Tensor-program optimization with auto-batching (ETH Zurich, master's thesis)",
        "`inlaid.program` (graphs of calls with adapters, compiled and fused) and `/v1/programs`. The thesis's own "
        "figures are not public; its framework fuses decodes of calls that are at the same depth.",
        [
            Claim(
                "Fused calls answer as single ones do",
                "intended",
                f"without each short-cut: {', '.join(sorted(set(same.values())))} answers the same",
                REPRODUCED if set(same.values()) == {"{0} of {0}".format(made["inputs"])} else REFUTED,
                (file,),
            ),
            Claim(
                "Fusing decodes across adapters pays",
                "no figure",
                f"without it a program takes {slower['without fuse_decode']:.2f} times as long, without any short-cut "
                f"{slower['without any']:.2f} (processor time, demo on a CPU); one call after another by HTTP "
                f"{times['one after another']:.1f}",
                REPRODUCED if slower["without fuse_decode"] > 1.2 else REFUTED,
                (file, "perf/results/programs-cpu.png"),
            ),
            Claim(
                "Adapters of several ranks in one batch need not be padded",
                "splitting and combining studied",
                f"7B on one H200, ranks 8 to 128 mixed {mixed:,.0f} tok/s, all of their mean rank {mean_rank:,.0f}",
                REPRODUCED if mixed > 0.97 * mean_rank else PARTLY,
                ("perf/results/h200-ac6fdf2.json",),
                "python -m perf.gpu.bench --out DIR --stages ranks-7b",
            ),
        ],
    )
