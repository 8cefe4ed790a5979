#!/usr/bin/env bash
# Installs DeepSpeed beside the development tools (it compiles a part of itself: g++ is needed) and
# runs its tests on the CPU. What follows the script's name goes on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
scripts/install.sh "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-build-isolation deepspeed
OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/pytest" tests/test_deepspeed.py "$@"
