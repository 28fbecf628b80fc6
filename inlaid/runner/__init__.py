"""The device's side of a step: inputs, graphs, sampling. One runner for CPUs, one for GPUs."""
