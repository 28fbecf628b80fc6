# What the scripts beside this file share: the repository's root, and a Python that can run inlaid.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${PYTHON:-}" ]; then
    if [ -n "${INLAID_PYTHON:-}" ]; then PYTHON=$INLAID_PYTHON
    elif [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python
    else PYTHON=python3; fi
fi

# launch MODEL_FOLDER NAME ARGS...: a server on $MODEL (or else the folder) with the adapters of $ADAPTERS.
launch() {
    local model=${MODEL:-$1} name=$2
    shift 2
    # shellcheck disable=SC2086  # $ADAPTERS holds several words on purpose
    exec "$PYTHON" -m perf.launch --model "$model" --fetch "$name" ${ADAPTERS:+--adapters $ADAPTERS} "$@"
}
