#!/usr/bin/env bash
# Toppings' comparison: cached, pipelined and on-demand adapters under the artifact's client:  bash perf/toppings.sh [flags of perf.toppings]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec "$PYTHON" -m perf.toppings "$@"
