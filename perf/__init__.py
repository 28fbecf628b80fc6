"""The performance harness: workloads sent over HTTP or to an engine in process, summaries, reports and grids.

`perf.client` measures any OpenAI-compatible server as a user would see it, `perf.in_process` the engine without HTTP,
`perf.validate` the simulator against the engine, and `perf.gpu` kernels and steps. They share one format of workloads,
`inlaid.workload`, with the simulator.
"""
