#!/usr/bin/env bash
# S-LoRA on llama-2-7b:  bash perf/launch_server_7b_slora.sh [--policy slora] [--port 8000] [-- --max_total_token_num 10000 ...]
# Says what to install where it is absent. MODEL and ADAPTERS as in launch_server_7b.sh; PEER_PYTHON=python of S-LoRA's environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch models/cache/llama-2-7b llama-2-7b --kind slora "$@"
