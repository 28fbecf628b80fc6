#!/usr/bin/env bash
# vLLM on llama-2-13b, 1, 2 or 4 replicas on neighbouring ports:
#   bash perf/launch_server_13b_vllm.sh 1                                   adapters (ADAPTERS) over one base
#   bash perf/launch_server_13b_vllm.sh 2 --merged FOLDER FOLDER            a merged model each
# Send to them with: python -m perf.client --base-url URL URL --route round-robin (adapters) or adapter (merged).
# QUANTIZED=1 serves the 4-bit base. All adapters fit into a batch, at their largest rank, unless flags after -- say otherwise.
# Says what to install where it is absent.
set -euo pipefail
replicas=${1:-1}
shift || true
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch models/cache/llama-2-13b${QUANTIZED:+-4bit} llama-2-13b --kind vllm --replicas "$replicas" "$@"
