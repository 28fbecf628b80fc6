#!/usr/bin/env bash
# Train the twelve adapters for SmolLM2 that the repository bundles: models/smollm2/adapters. Some minutes on a GPU.
# Killed and started again, it goes on where it was.
#   bash models/train_smollm2.sh                        into models/smollm2/adapters
#   bash models/train_smollm2.sh --out FOLDER ARGS …    elsewhere, or with other flags of models.train_lora
# Environment: INLAID_PYTHON (default: .venv/bin/python, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
python=${INLAID_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ -f models/cache/smollm2/config.json ] || bash models/download.sh smollm2
"$python" -m data.real_tasks --out data/cache/real
tasks=()
for folder in data/cache/real/*/; do
    name=$(basename "$folder")
    tasks+=(--task "$name=data/cache/real/$name/train.jsonl")
done
exec "$python" -m models.train_lora models/cache/smollm2 "${tasks[@]}" --out models/smollm2/adapters \
    --rank 8 --targets q_proj v_proj --steps 390 --batch 8 --rate 2e-3 --side-by-side 12 "$@"
