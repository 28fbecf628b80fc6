#!/usr/bin/env bash
# Set up inlaid in .venv, then serve or test it. Each command works alone and a second run is quick.
#   bash install.sh                     install only
#   bash install.sh serve [ARGS …]      install, then `inlaid serve ARGS` (no model named: the bundled demo)
#   bash install.sh test  [ARGS …]      install with the development tools, then lint, type-check and test;
#                                       with ARGS: `pytest ARGS` only
#   bash install.sh EXTRA …             install with extras of pyproject.toml: cuda (CUDA kernels), eval (metrics of text)
# Environment:
#   INLAID_PYTHON=python3   use this Python as it is and install nothing (a GPU machine that already has torch)
#   INLAID_TORCH=torch==X   the torch to install (default: torch==2.13.0 without an NVIDIA GPU, torch with one)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '%s\n' "$*" >&2; }
die() { say "install.sh: $*"; exit 1; }

# extras: the names below [project.optional-dependencies] in pyproject.toml, on one line.
extras() { awk '/^\[/ { on = $0 == "[project.optional-dependencies]" } on && /^[a-z]+ = / { print $1 }' pyproject.toml | xargs; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.10 or newer found; install one, or name it: INLAID_PYTHON=/path/to/python bash install.sh …"
}

# install EXTRAS: make .venv hold inlaid with these extras; a stamp remembers what was done for which pyproject.toml.
install() {
    local extras=$1 stamp torch
    stamp=".venv/.inlaid-$extras-$(sha256sum pyproject.toml | cut -c1-16)"
    [ -e "$stamp" ] && return
    exec 9>.install.lock
    flock -w 1800 9 || die "another install.sh has held .install.lock for half an hour; remove the file if none runs"
    if [ ! -e "$stamp" ]; then
        if [ ! -x .venv/bin/python ] || ! new_enough .venv/bin/python; then
            say "Setting up .venv"
            rm -rf .venv
            "$(find_python)" -m venv .venv || die "could not make a virtual environment (on Debian: apt install python3-venv)"
        fi
        torch=${INLAID_TORCH:-$(command -v nvidia-smi >/dev/null && echo "torch>=2.8" || echo "torch==2.13.0")}
        say "Installing $torch (once; a few minutes on a slow line)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$torch" || die "pip could not install $torch"
        say "Installing inlaid${extras:+ with: $extras}"
        PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}" ||
            die "pip could not install inlaid's requirements; the lines above say why"
        touch "$stamp"
    fi
    exec 9>&-
}

# use EXTRAS: set $python to an interpreter that can run inlaid.
use() {
    if [ -n "${INLAID_PYTHON:-}" ]; then
        command -v "$INLAID_PYTHON" >/dev/null || die "INLAID_PYTHON=$INLAID_PYTHON is not there"
        new_enough "$INLAID_PYTHON" || die "INLAID_PYTHON=$INLAID_PYTHON is older than Python 3.10"
        python=$INLAID_PYTHON
    else
        install "$1"
        python=.venv/bin/python
    fi
}

# browser: have the browser that tests/console drives. Debian's own; nothing is fetched from other hosts.
browser() {
    command -v chromium >/dev/null && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "the tests need chromium; install it: apt-get install chromium"
    say "Installing chromium"
    { apt-get update && apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; } >/dev/null ||
        die "apt-get could not install chromium, which the tests of the console need"
}

run_tests() {
    local threads=${OMP_NUM_THREADS:-1}
    export OMP_NUM_THREADS=$threads PYTHONDONTWRITEBYTECODE=  # every process would compile all modules anew
    if (($#)); then
        exec "$python" -m pytest "$@"
    fi
    browser
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    local types failed=0 workers="--processes 4" # some wait; forks of one collection, which a process that has used CUDA cannot share
    if command -v nvidia-smi >/dev/null; then workers="-n 3 --dist loadfile --no-loadscope-reorder"; fi
    "$python" -m mypy & # on one core beside the tests' start; its errors fail the run at the end
    types=$!
    "$python" -m pytest $workers -q || failed=$?
    wait "$types" || failed=$?
    return "$failed"
}

command=${1:-install}
(($#)) && shift
case $command in
    install) use "" && say "Installed. Next: bash install.sh serve" ;;
    serve) use "" && exec "$python" -m inlaid serve "$@" ;;
    test) use "dev" && run_tests "$@" ;;
    *)
        known=" $(extras) "
        for name in "$command" "$@"; do
            [[ $known == *" $name "* ]] || die "unknown command or extra '$name'; commands: install, serve, test; extras:${known% }"
        done
        [ -z "${INLAID_PYTHON:-}" ] || die "INLAID_PYTHON is set, and with it nothing is installed; unset it, or use its own pip"
        use "$(IFS=, && echo "$command${*:+,$*}")"
        say "Installed with: $command${*:+ $*}. The command \`inlaid\` is .venv/bin/inlaid"
        ;;
esac
