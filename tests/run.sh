#!/usr/bin/env bash
# Everything that must pass: set-up with the test tools, lint, types, shell scripts, all tests.
#
#   bash tests/run.sh [arguments of pytest, for example -k resume or -m "not slow"]
#
# Time: the first run also installs and fills mypy's cache. Variables of setup_environment.sh (VENV_DIR, TORCH_VERSION,
# TORCH_INDEX_URL) hold here too.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

BIN=${VENV_DIR:-venv}/bin

bash setup_environment.sh --dev
echo "tests: ruff" && "$BIN/python" -m ruff check .
echo "tests: mypy" && "$BIN/python" -m mypy .
echo "tests: shellcheck" && "$BIN/shellcheck" setup_environment.sh run_all.sh tests/run.sh .ci/run
echo "tests: pytest" && exec "$BIN/python" -m pytest "$@"
