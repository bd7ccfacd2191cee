#!/usr/bin/env bash
# What only a GPU can tell, of this checkout against another one, side by side, in under 8 minutes:
#
#   bash benchmarks/gpu.sh --against DIR [--sizes base large] [--batches 32 1024 4096] [--minutes 7.5]
#
# All options: python benchmarks/gpu.py --help
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
BIN=${VENV_DIR:-venv}/bin
exec "$BIN/python" benchmarks/gpu.py "$@"
