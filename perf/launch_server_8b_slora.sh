#!/usr/bin/env bash
# S-LoRA on llama-3.1-8b:  bash perf/launch_server_8b_slora.sh [--policy slora] [--port 8000] [-- --max_total_token_num 10000 ...]
# Says what to install where it is absent. MODEL and ADAPTERS as in launch_server_8b.sh; PEER_PYTHON=python of S-LoRA's environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch models/cache/llama-3.1-8b llama-3.1-8b --kind slora "$@"
