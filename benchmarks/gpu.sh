#!/usr/bin/env bash
# Measures base and awq of the 4B (random weights, the report's queries) in the report's configuration, the best one,
# two in between, and base with FP8 activations: all interleaved, with an A/A control.
#
#   benchmarks/gpu.sh [FILE.jsonl] [BATCH_SIZES]
#
# Needs the extra [gpu] and 60 GB of GPU memory. Ten batch sizes take about ten minutes on an idle H100.
# Then: papermill notebooks/compare.ipynb configurations.ipynb --cwd notebooks -p configurations FILE.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
file=${1:-outputs/gpu/configurations.jsonl}
batches=${2:-1,2,4,8,16,32,64,128,256,512}
python -m colqwen_lab sweep -m base,awq --size 4b --weights random -b "$batches" --control -o "$file" \
  -c report -c eager/lean/tritonv2 -c fast/lean/tritonv2 -c best -c fast/lean/fp8
python benchmarks/tables.py "$file"
