"""One format for workloads: TOML in, planned requests out.

The simulator (`inlaid sim`), an engine in this process (`perf.in_process`) and servers over HTTP (`perf.client`) all
call `plan.plan` on the same `spec.Workload`, so that one file and one seed give each of them the same requests. The
named suites are files of this format in `suites/`. Nothing here imports torch, the engine or the simulator.
"""
