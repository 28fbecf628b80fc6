#!/usr/bin/env bash
# Make an environment with auto-gptq and show that it and inlaid read each other's checkpoints.
#   bash third_party/auto_gptq/check.sh
# It needs Python 3.11, for which auto-gptq's last release has wheels, and 1.2 GB; nothing of it touches .venv.
# Environment:
#   INLAID_AUTO_GPTQ=.inlaid/auto_gptq   where the environment is
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
env=${INLAID_AUTO_GPTQ:-.inlaid/auto_gptq}
python=${INLAID_PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "check.sh: no $python: run bash install.sh first, or set INLAID_PYTHON" >&2; exit 1; }
if [ ! -e "$env/whole" ]; then
    command -v python3.11 >/dev/null || { echo "check.sh: auto-gptq needs python3.11; install it" >&2; exit 1; }
    python3.11 -m venv "$env"
    "$env/bin/pip" install --quiet --no-deps "${INLAID_TORCH:-torch==2.13.0}"
    "$env/bin/pip" install --quiet --no-deps -r third_party/auto_gptq/requirements.txt
    touch "$env/whole"
fi
export PYTHONPATH="$PWD" OMP_NUM_THREADS=1
exec "$python" third_party/auto_gptq/check.py --auto-gptq "$env/bin/python" "$@"
