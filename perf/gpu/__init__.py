"""Speed and correctness on a GPU: `python -m perf.gpu.bench` runs all of it and writes perf/results-style JSON."""
