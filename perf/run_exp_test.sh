#!/usr/bin/env bash
# A few requests to a running server, to see that everything works:  bash perf/run_exp_test.sh [URL] [flags of perf.client]
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
shift || true
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec "$PYTHON" -m perf.client --base-url "$url" --ready-timeout 120 --arrival poisson --rate 4 --num-requests 12 \
    --input uniform:8:64 --output uniform:4:32 --warmup 2 --slo e2el_ms=6000 --max-failed-share 0 "$@"
