"""Speed and correctness on a GPU: `python -m perf.gpu.bench` runs stages, each of which writes one JSON result."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("INLAID_BENCH_ROOT", "/tmp/inlaid-bench"))  # models, adapters and caches of the stages
Keep = Callable[[dict[str, Any]], None]  # writes a stage's result as far as it has come
