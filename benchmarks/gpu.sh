#!/bin/bash
# Everything that wants a GPU, for a machine that is lent for minutes:
#
#     bash benchmarks/gpu.sh [OUT]
#
# The tests first, then the times; each part has its limit and writes what it finished to OUT
# (benchmarks/results without it), so that a machine that goes away takes little with it.
set -u
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python}
export PYTHONPATH=src HF_HUB_OFFLINE=1

"$python" -c "import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name())" ||
    { echo "no GPU in sight"; exit 1; }
timeout 150 "$python" -m pytest tests/test_gpu.py tests/test_kernels.py tests/test_fused.py -q --no-header |
    tee "$out/gpu-tests.txt" | tail -5
speed=("$python" benchmarks/compiled_speed.py --models llama-1b
    --output "$out/compiled_speed.jsonl" --page "$out/compiled-speed.md")
timeout 120 "${speed[@]}" --modes eager pytorch
timeout 200 "${speed[@]}" --modes eager compiled --methods lora bara balora --steps 12
timeout 100 "$python" benchmarks/decoding_speed.py --device cuda \
    --results "$out/decoding_speed_gpu.json"
