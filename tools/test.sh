#!/usr/bin/env bash
# Installs into .venv and runs the tests: all of them, or what pytest is told, e.g.
#   tools/test.sh                          everything
#   tools/test.sh -m 'not engines'         the fast ones
set -euo pipefail
cd "$(dirname "$0")/.."
tools/install.sh cpu,test
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec "${MEGATRON_OPD_VENV:-.venv}/bin/python" -m pytest "$@"
