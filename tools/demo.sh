#!/usr/bin/env bash
# Installs into .venv and distils a weak arithmetic student from its teacher: the whole system on two CPU cores.
#   tools/demo.sh [key=value ...]     e.g. tools/demo.sh loop.max_lag=0 estimator.name=head_tail_reverse_kl
# About 2 minutes to install (once, 4 GB) and less than 5 to run. Results land in runs/demo-TIME.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/install.sh cpu
bin=${MEGATRON_OPD_VENV:-.venv}/bin
examples/arithmetic/prepare.sh
exec "$bin/megatron-opd" train examples/arithmetic/config.yaml "run.dir=runs/demo-$(date +%Y%m%d-%H%M%S)" "$@"
