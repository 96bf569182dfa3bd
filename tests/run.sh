#!/usr/bin/env bash
# Installs what is missing, checks the style, runs the tests; arguments go to pytest: bash tests/run.sh -k metrics
cd "$(dirname "$0")/.." || exit 2
. ./setup.sh
"$PYTHON" -m ruff check . && "$PYTHON" -m pytest -q tests "$@"
