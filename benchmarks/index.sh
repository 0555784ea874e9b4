#!/usr/bin/env bash
# Measures MaxSim search over 1,000, 10,000 and 50,000 synthetic pages of 1,260 x 320 values, for one query and for 64,
# in each index format, by the Triton kernel and by torch; first it checks scores against float64.
# Needs an H100 that does nothing else, 60 GB of its memory, and under 3 minutes. On a CPU it is a rehearsal.
#
#   benchmarks/index.sh FILE.jsonl [--tiles]
#
# --tiles only times other tiles of the kernel, over 10,000 pages, and writes no records.
set -euo pipefail
file=$(realpath -m "${1:?usage: benchmarks/index.sh FILE.jsonl [--tiles]}")
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec python3 benchmarks/index.py "$file" "${@:2}"
