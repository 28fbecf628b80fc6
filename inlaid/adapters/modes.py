"""The four ways in which an adapter comes to the device, and when a request may start in each. The store and the
simulator share them.

    cached      everything is on the device from the start
    on-demand   a request waits for the whole adapter
    pipelined   a request waits for the first layer group; steps wait for the others as they come to them
    cpu-assist  a request waits for nothing: layers that have not landed are computed from host memory
"""

from __future__ import annotations

CACHED, ON_DEMAND, PIPELINED, CPU_ASSIST = MODES = ("cached", "on-demand", "pipelined", "cpu-assist")
NUM_GROUPS = 4  # of layers, as many as the model has at most


def groups_to_start(mode: str, num_groups: int) -> int:
    """Return how many layer groups must have landed before a request may start."""
    if mode == PIPELINED:
        return 1
    return 0 if mode == CPU_ASSIST else num_groups
