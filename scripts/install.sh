#!/usr/bin/env bash
# Makes a virtual environment (the folder given, .venv by default) with bara, the quickstart's
# model and texts, and everything that the development tools and the tests need. Nothing is compiled.
# Safe to run again. PYTHON in the environment says which Python to take.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
torch_version=2.13.0

find_python() {
    # A name on the PATH may be a pyenv shim that does not run; Debian's python may lack venv.
    for name in ${PYTHON:-} python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    echo "bara needs Python 3.11 or later with its venv module (Debian: python3-venv)" >&2
    return 1
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    "$python" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null &&
    [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    # The default build for Linux brings gigabytes of CUDA. Without a GPU take a CPU build: one that
    # pip is configured to find, or else the one of PyTorch's own index.
    echo "Installing a CPU build of PyTorch into $venv ..."
    pip install "torch==$torch_version+cpu" 2>/dev/null ||
        pip install --timeout 10 --retries 0 torch \
            --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
        pip install "torch==$torch_version"
fi
echo "Installing bara into $venv ..."
pip install -e '.[dev]'
pip install --no-deps -r scripts/no-deps.txt
