#!/usr/bin/env bash
# Makes the models and prompts where they are missing, then distils. Needs the environment of tools/install.sh.
#   examples/smollm2/run.sh [key=value ...]        e.g. examples/smollm2/run.sh loop.steps=200 run.dir=runs/longer
# Two CPU cores, 9 GB of memory, 15 to 30 minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${MEGATRON_OPD_VENV:-.venv}/bin/python"
here=examples/smollm2
[ -e $here/models/student/model.safetensors ] || "$python" $here/prepare.py
exec "$python" -m megatron_opd train $here/config.yaml "run.dir=runs/smollm2-$(date +%Y%m%d-%H%M%S)" "$@"
