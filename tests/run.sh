#!/usr/bin/env bash
# Everything that must pass: set-up with the test tools, lint, types, shell scripts, all tests.
#
#   bash tests/run.sh [--all] [arguments of pytest, for example -k resume]
#
#   --all   also every repetition: more random kills, more damaged inputs, the plans of all sizes
#
# Time: 12 minutes at most on two cores; the first run also installs and fills mypy's cache. Variables of
# setup_environment.sh (VENV_DIR, TORCH_VERSION, TORCH_INDEX_URL) hold here too; OMP_NUM_THREADS (1) is the number of
# compute threads of each of the two test processes.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

BIN=${VENV_DIR:-venv}/bin

bash setup_environment.sh --dev
echo "tests: ruff" && "$BIN/python" -m ruff check .
echo "tests: imports" && "$BIN/lint-imports" --no-cache
echo "tests: mypy" && "$BIN/python" -m mypy .
echo "tests: shellcheck" && "$BIN/shellcheck" setup_environment.sh run_all.sh tests/run.sh .ci/run findings/*.sh benchmarks/*.sh
echo "tests: pytest" && exec "$BIN/python" -m pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"
