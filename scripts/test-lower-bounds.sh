#!/usr/bin/env bash
# Runs the tests with every runtime dependency, and TRL, at the lower bound that pyproject.toml
# states. What follows the script's name goes on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
scripts/install.sh "$folder/venv"
"$folder/venv/bin/python" - >"$folder/bounds.txt" <<'PYTHON'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
bounds = [*project["dependencies"], *project["optional-dependencies"]["trl"]]
print("\n".join(dependency.replace(">=", "==") for dependency in bounds))
PYTHON
cat "$folder/bounds.txt"
"$folder/venv/bin/python" -m pip install -qq -r "$folder/bounds.txt"
# transformers 5.16 reads images with torchvision alone, and there is no build of it for every torch
OMP_NUM_THREADS=1 "$folder/venv/bin/pytest" -n 2 --ignore tests/test_images.py \
    --deselect "tests/test_examples.py::test_a_script_runs[vision]" "$@"
