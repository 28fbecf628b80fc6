"""The ways in which an adapter comes to the device, and when a request may start in each. The store and the simulator
share them.

    cached      everything is on the device from the start
    on-demand   a request waits for the whole adapter
    pipelined   a request waits for the first layer group; steps wait for the others as they come to them
    cpu-assist  a request waits for nothing: layers that have not landed are computed from host memory

The simulator has all of them, for Toppings' figures. The engine had the last one too, which paid nowhere that it was
measured: perf/results/assist-map.md says on which buses it would.
"""

from __future__ import annotations

CACHED, ON_DEMAND, PIPELINED, CPU_ASSIST = SIMULATED = ("cached", "on-demand", "pipelined", "cpu-assist")
MODES = SIMULATED[:3]  # of the engine
NUM_GROUPS = 4  # of layers, as many as the model has at most


def why_not(mode: str) -> str | None:
    """Return why the engine does not have a mode, or None if it does."""
    if mode == CPU_ASSIST:
        return (
            "--adapter-mode cpu-assist is retired, since computing adapters on the CPU pays only on buses slower than "
            "those of today's GPUs (perf/results/assist-map.md); use on-demand or pipelined"
        )
    return None if mode in MODES else f"adapter mode {mode!r} is unknown; known: {', '.join(MODES)}"


def groups_to_start(mode: str, num_groups: int) -> int:
    """Return how many layer groups must have landed before a request may start."""
    if mode == PIPELINED:
        return 1
    return 0 if mode == CPU_ASSIST else num_groups
