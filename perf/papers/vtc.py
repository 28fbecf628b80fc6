"""Claims of VTC: fairness in service."""

from __future__ import annotations

from perf.papers.claims import NOT_YET, PARTLY, REFUTED, REPRODUCED, Claim, Paper, Results, row


def vtc(results: Results) -> Paper:
    """Fairness in service."""
    rows = results("sim-vtc-artifact.json")["rows"]
    suites = sorted(path.stem for path in (results.root / "perf/results").glob("sim-*.json"))
    gaps = [
        found
        for suite in suites
        for found in results(f"{suite}.json").get("rows", ())
        if found.get("policy") == "vtc" and "bound" in found
    ]
    within = sum(found["largest_gap"] <= found["bound"] for found in gaps)

    def of(suite: str, policy: str, key: str) -> float:
        return float(row(rows, suite=suite, policy=policy, way="ours")[key])

    def waits(policy: str) -> float:
        tenants = row(results("sim-on_off_less.json")["rows"], policy=policy)["tenants"]
        return float(tenants["client-0"]["mean_ttft"])

    real = {name: of("real", name, "mean_difference") for name in ("fcfs", "lcf", "vtc", "vtc:predict=oracle")}
    like = {
        name: float(row(rows, suite="real", policy=name, way="like the artifact")["mean_difference"])
        for name in ("vtc", "vtc:predict=oracle")
    }
    page = "perf/results/sim-vtc-artifact.md"
    return Paper(
        "VTC: fairness in serving large language models (OSDI 2024)",
        "the policies `vtc` (with predicted and oracle lengths), `lcf`, `drr`, `rpm`, all suites of the artifact in "
        "`inlaid sim`, weights and limits changed while serving. The paper's figures are recomputed from its artifact.",
        [
            Claim(
                "Two clients that wait all the time never differ by more than the bound",
                "proved",
                f"within the bound in {within} of {len(gaps)} simulated suites",
                REPRODUCED if within == len(gaps) else REFUTED,
                ("perf/results/sim-overload.json", page, "perf/results/sim-overload.png"),
            ),
            Claim(
                "Under overload FCFS serves by who sends most, VTC equally",
                "average difference: FCFS 439, VTC 104, oracle 0.5",
                f"FCFS {of('overload', 'fcfs', 'mean_difference'):.0f}, "
                f"VTC {of('overload', 'vtc', 'mean_difference'):.0f}, oracle "
                f"{of('overload', 'vtc:predict=oracle', 'mean_difference'):.1f}",
                REPRODUCED
                if 100 * of("overload", "vtc", "mean_difference") < of("overload", "fcfs", "mean_difference")
                else PARTLY,
                ("perf/results/sim-vtc-artifact.json", page),
            ),
            Claim(
                "A client within its share does not feel the others",
                "on_off_less, mean TTFT of client 0: VTC 3.5 s, FCFS 85 s",
                f"VTC {waits('vtc'):.1f} s, FCFS {waits('fcfs'):.1f} s",
                REPRODUCED if 10 * waits("vtc") < waits("fcfs") else REFUTED,
                ("perf/results/sim-on_off_less.json", "perf/results/sim-on_off_less.png"),
            ),
            Claim(
                "Limits of requests per minute buy fairness with throughput, VTC does not",
                "real trace: RPM 5 340 tok/s, VTC 779, FCFS 777",
                f"RPM 5 {of('real', 'rpm:limit=5', 'throughput'):.0f} tok/s, VTC {of('real', 'vtc', 'throughput'):.0f}"
                f", FCFS {of('real', 'fcfs', 'throughput'):.0f}",
                REPRODUCED
                if of("real", "rpm:limit=5", "throughput") < 0.7 * of("real", "vtc", "throughput")
                else REFUTED,
                ("perf/results/sim-vtc-artifact.json", page, "perf/results/sim-real.png"),
            ),
            Claim(
                "On the real trace VTC is fairer than FCFS and LCF",
                "average difference: FCFS 434, LCF 324, VTC 252",
                f"FCFS {real['fcfs']:.0f}, LCF {real['lcf']:.0f}, VTC {real['vtc']:.0f}, means over five drawn traces",
                REPRODUCED if real["vtc"] < min(real["fcfs"], real["lcf"]) else REFUTED,
                ("perf/results/sim-vtc-artifact.json", page),
            ),
            Claim(
                "Known lengths make VTC fairer still",
                "252 to 228",
                f"{real['vtc']:.0f} to {real['vtc:predict=oracle']:.0f}: ours admits at every step, so there are no "
                f"rounds left for lengths to mend; with the artifact's rules {like['vtc']:.0f} to "
                f"{like['vtc:predict=oracle']:.0f}. A tenant that comes back must be lifted to what others were "
                "delivered: lifted to what they were charged ahead, as in the artifact, it was 223",
                REPRODUCED
                if real["vtc:predict=oracle"] < real["vtc"]
                else PARTLY
                if like["vtc:predict=oracle"] < like["vtc"]
                else REFUTED,
                ("perf/results/sim-vtc-artifact.json", page),
            ),
            Claim("The same on a live server", "all suites on an A10G", "no run is recorded yet", NOT_YET),
        ],
    )
