#!/usr/bin/env bash
# Throughput, latency, job completion and SLO attainment of a running server, over a list of rates, and a report:
#   bash perf/run_exp.sh [URL] [flags of perf.client]
# Environment: RATES="1 2 4 8", DURATION=60 (seconds a rate), INPUT, OUTPUT (lengths), SLO="e2el_ms=6000",
# DISTRIBUTION=zipf, OUT=folder. A rate whose result is there already is not run again.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
shift || true
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
out=${OUT:-.inlaid/run_exp/$(date +%Y%m%d-%H%M%S)}
results=()
for rate in ${RATES:-1 2 4 8}; do
    result=$out/rate-$rate.json
    results+=("$result")
    if [ ! -e "$result" ]; then
        echo "== $rate requests/s for ${DURATION:-60} s"
        # shellcheck disable=SC2086  # $SLO may hold several words on purpose
        "$PYTHON" -m perf.client --base-url "$url" --ready-timeout 600 --arrival poisson --rate "$rate" \
            --duration "${DURATION:-60}" --input "${INPUT:-uniform:8:512}" --output "${OUTPUT:-uniform:8:512}" \
            --distribution "${DISTRIBUTION:-zipf}" --warmup 8 --slo ${SLO:-e2el_ms=6000} \
            --label "rate-$rate" --out "$result" "$@"
    fi
done
"$PYTHON" -m perf.report "${results[@]}" --out "$out/report.html"
