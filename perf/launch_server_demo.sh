#!/usr/bin/env bash
# The bundled demo with its twelve adapters:  bash perf/launch_server_demo.sh [--policy inlaid] [--port 8000] [-- ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# Two threads, a busy generator and two cores: they would wait for one another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m perf.launch "$@"
