#!/usr/bin/env bash
# inlaid on llama-3.1-8b, 4-bit:  bash perf/launch_server_8b.sh [--policy vtc] [--port 8000] [-- --any-flag-of-inlaid-serve ...]
# MODEL=FOLDER another model; ADAPTERS="NAME=PATH ... or folders or globs" the adapters to serve.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch models/cache/llama-3.1-8b-4bit llama-3.1-8b "$@"
