#!/usr/bin/env bash
# Check clients against the demo: run.sh all, or the names of some. Needs a network for what is not installed yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" tests/clients/run.py "$@"
