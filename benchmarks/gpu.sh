#!/usr/bin/env bash
# Issue 4, point 3: base and awq of the 4B (random weights, the report's queries) in the report's way, in the best, in what
# lies between, and base with FP8 activations: all in turn, at batch 1 to 512, with an A/A control. Needs the extra [gpu]
# and 60 GB of GPU memory; nine to ten minutes on an H100 that does nothing else:  benchmarks/gpu.sh [FILE.jsonl]
# Then: papermill notebooks/compare.ipynb ways.ipynb --cwd notebooks -p ways FILE.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
file=${1:-outputs/gpu/ways.jsonl}
python -m colqwen_lab sweep -m base -m awq --size 4b --weights random -b 1,2,4,8,16,32,64,128,256,512 --control -o "$file" \
  --way report --way eager/lean/tritonv2 --way fast/lean/tritonv2 --way best --way fast/lean/fp8
python benchmarks/tables.py "$file"
