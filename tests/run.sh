#!/usr/bin/env bash
# Installs what is missing, checks the style, runs the tests; arguments go to pytest: bash tests/run.sh -k metrics
cd "$(dirname "$0")/.." || exit 2
also="pytest xdist ruff"
. ./setup.sh
export OMP_NUM_THREADS=1 # processes side by side, one thread each
"$PYTHON" -m ruff check . && "$PYTHON" -m ruff format --check --quiet . &&
    "$PYTHON" -m pytest -q -o tmp_path_retention_policy=failed -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder tests "$@"
