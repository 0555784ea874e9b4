#!/usr/bin/env bash
# Issue 4, point 2: execution fast against eager on a CPU, size mid (8 layers, hidden 1024), random weights, batches 1, 8
# and 32; for awq at batch 1 torch's int4 and Intel's ark against the torch fallback. Ways are timed in turn; ark needs
# the extra [cpu]. Run it on a machine that does nothing else:  benchmarks/cpu.sh [FILE.jsonl]
set -euo pipefail
cd "$(dirname "$0")/.."
file=${1:-outputs/cpu/mid.jsonl}
run() { colqwen-lab sweep --size mid --weights random --control -o "$file" "$@"; }
run -m base -m awq -b 1 --way eager/lean/torch --way fast/lean/auto --way eager/lean/ark
run -m base -b 8,32 --way eager/lean/auto --way fast/lean/auto
run -m awq -b 8,32 --way eager/lean/ark --way fast/lean/auto
python benchmarks/tables.py "$file"
