#!/bin/sh
# Every setting of one peer, each measured as soon as it is there: rows are appended as they come.
#   benchmarks/peers/run.sh hqq
set -eu
tool=$1
out=${OUT:-benchmarks/results/quality_peers.csv}

while read -r name flags; do
  folder=build/peers/out/$tool-$name
  # shellcheck disable=SC2086
  [ -f "$folder/peer.json" ] || "build/peers/venv-$tool/bin/python" "benchmarks/peers/run_$tool.py" $flags </dev/null
  grep -qs "^$tool-$name," "$out" || python benchmarks/quality.py "$folder" --original studies/quality/data/models/smollm2 --out "$out" </dev/null
done <"benchmarks/peers/settings/$tool.txt"
