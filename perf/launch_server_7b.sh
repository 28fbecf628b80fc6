#!/usr/bin/env bash
# inlaid on llama-2-7b, 4-bit:  bash perf/launch_server_7b.sh [--policy vtc] [--port 8000] [-- --any-flag-of-inlaid-serve ...]
# MODEL=FOLDER another model; ADAPTERS="NAME=PATH ... or folders or globs" the adapters to serve.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch models/cache/llama-2-7b-4bit llama-2-7b "$@"
