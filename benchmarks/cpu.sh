#!/usr/bin/env bash
# Measures execution fast against eager on a CPU: size mid (8 layers, hidden 1024), random weights, batches 1, 8 and 32;
# for awq at batch 1 torch's int4 and Intel's ark against the torch fallback. Configurations are interleaved; ark needs
# the extra [cpu]. Run it on an idle machine:  benchmarks/cpu.sh [FILE.jsonl]
set -euo pipefail
cd "$(dirname "$0")/.."
file=${1:-outputs/cpu/mid.jsonl}
run() { python -m colqwen_lab sweep --size mid --weights random --control -o "$file" "$@"; }
run -m base,awq -b 1 -c eager/lean/torch -c fast/lean/auto -c eager/lean/ark
run -m base -b 8,32 -c eager/lean/auto -c fast/lean/auto
run -m awq -b 8,32 -c eager/lean/ark -c fast/lean/auto
python benchmarks/tables.py "$file"
