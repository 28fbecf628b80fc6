"""Speed and correctness on a GPU: `python -m perf.gpu.bench` runs all of it and writes perf/results-style JSON."""

import os
from pathlib import Path

ROOT = Path(os.environ.get("INLAID_BENCH_ROOT", "/tmp/inlaid-bench"))  # models, adapters and caches of the stages
