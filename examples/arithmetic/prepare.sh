#!/usr/bin/env bash
# Writes the problems, once. Needs the environment that tools/install.sh makes; ten seconds.
set -euo pipefail
cd "$(dirname "$0")"
[ -e data/prompts.jsonl ] && exit 0
cd ../.. && exec "${MEGATRON_OPD_VENV:-.venv}/bin/python" examples/arithmetic/make_data.py
