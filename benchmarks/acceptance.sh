#!/usr/bin/env bash
# Runs the whole program once on this machine and prints one table of what held.
# Needs the extra [gpu], an H100 that does nothing else, 20 GB of disk for the checkpoints, no network,
# and under 9 minutes. On a CPU it is a rehearsal at size tiny.
#
#   benchmarks/acceptance.sh OUT [--size tiny|mid|4b]
#
# OUT gets acceptance.md and acceptance.json, the records, the executed notebooks, and logs/.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/acceptance.sh OUT [--size tiny|mid|4b]}")
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec python3 benchmarks/acceptance.py "$out" "${@:2}"
