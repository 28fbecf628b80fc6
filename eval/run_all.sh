#!/usr/bin/env bash
# All of the accuracy test on the bundled demo: every variant at 4, 3 and 2 bits on all twelve tasks, then the engine
# against transformers and peft. Killed and started again, it goes on where it was. Results: eval/results/.
#   bash eval/run_all.sh                the whole grid
#   bash eval/run_all.sh quick          a subset of two minutes, without touching the committed results
#   bash eval/run_all.sh seeds          every variant over three calibration seeds, judged by one forward pass (hours)
#   bash eval/run_all.sh --base smollm2 [ARGS …]   the real base's twelve tasks over three calibration seeds, by one forward
#                                       pass: minutes on a GPU, hours on a CPU; the report is eval/results/smollm2
#   bash eval/run_all.sh ARGS …         passed on to `python -m eval.run`
# Environment: INLAID_PYTHON=python3 uses this Python instead of .venv's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
python=${INLAID_PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "run_all.sh: no $python; run: bash install.sh eval (or set INLAID_PYTHON)" >&2; exit 1; }

run() { "$python" -m eval.run "$@"; }

if [ "${1:-}" = quick ]; then
    shift
    run --tasks to_velar,text_summary,code,maths --variants fp16,rtn,mlgptq-minimax --bits 4,2 --examples 16 \
        --calibration-tokens 2048 --compare oracle --out .inlaid/eval/quick "$@"
elif [ "${1:-}" = seeds ]; then
    shift
    run --variants all --bits 4,3,2 --group-size 128,128,32 --seeds 0,1,2 --examples 32 --forward-only --no-alone \
        --no-figures --out eval/results/quant-demo "$@"
elif [ "${1:-} ${2:-}" = "--base smollm2" ]; then
    shift 2
    [ -f models/cache/smollm2/config.json ] || bash models/download.sh smollm2
    "$python" -m data.real_tasks --out data/cache/real
    run --base smollm2 --variants fp16,rtn,gptq-mixed,mlgptq-mean,mlgptq-trace-mean,mlgptq-minimax-loss,per-task \
        --bits 4,3,2 --seeds 0,1,2 --examples 100 --forward-only --backend blocks --workers 0 \
        --out eval/results/smollm2 "$@"
elif (($#)); then
    run "$@"
else
    run --examples 32 --calibration-tokens 6144 --out eval/results/demo "$@"
    run --variants fp16,rtn,mlgptq-minimax --bits 4 --examples 32 --calibration-tokens 6144 \
        --compare oracle --no-figures --out eval/results/demo-oracle
fi
