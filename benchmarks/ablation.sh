#!/usr/bin/env bash
# What each special path of execution fast buys on a GPU: size 4b, random weights, 1 to 512 queries.
# Needs the extra [gpu], an H100 that does nothing else, 30 GB of its memory, and about 5 minutes:
#   benchmarks/ablation.sh OUT.json
set -euo pipefail
out=$(realpath "${1:?usage: benchmarks/ablation.sh OUT.json}")
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" python3 benchmarks/ablation.py "$out"
