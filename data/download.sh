#!/usr/bin/env bash
# Fetch real data sets from the Hugging Face hub into data/cache (resumes; needs a network and the extra `eval`).
#   bash data/download.sh all                all of them
#   bash data/download.sh maths medical      some; without a name, the list is shown
# Environment: HF_TOKEN (where a data set asks for it), INLAID_PYTHON (default: .venv/bin/python, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${INLAID_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ $# = 0 ]; then set -- --help; fi
exec "$python" -m data.download_data "$@"
