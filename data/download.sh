#!/usr/bin/env bash
# Fetch the real tasks' data sets from the Hugging Face hub into data/cache (resumes; needs a network and the extra
# `eval`). A data set that cannot be had costs one line; the last line sums up.
#   bash data/download.sh                    all of them
#   bash data/download.sh gsm8k medmcqa      some; --help shows the list
# Environment: HF_TOKEN (where a data set asks for it), INLAID_PYTHON (default: .venv/bin/python, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${INLAID_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" -m data.download_data "$@"
