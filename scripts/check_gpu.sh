#!/usr/bin/env bash
# What to run the first time that a GPU is available: checks first, then measurements, in less than 8 minutes on one GPU.
# bash scripts/check_gpu.sh [DIR]: all output is written to DIR (default: gpu_check), with the tables in DIR/summary.md.
# Without a GPU, only the checks that need none are run. The exit status is 1 if a check fails; measurements do not affect it.
set -euo pipefail
source "$(dirname "$0")/environment.sh" pytest pytest-xdist hypothesis
output="${1:-gpu_check}"
mkdir -p "$output"
failed=0

run() { # arguments: check or measure, a name, a time limit in seconds, and a command; the output is written to DIR/<name>.log
  local kind="$1" name="$2" limit="$3" status=0 started=$SECONDS
  shift 3
  timeout --kill-after=5 "$limit" "$@" >"$output/$name.log" 2>&1 || status=$?
  if [ "$status" -eq 0 ]; then
    echo "$name: passed in $((SECONDS - started)) s"
  elif [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    echo "$name: stopped after $limit s, see $output/$name.log"
  else
    echo "$name: failed with status $status, see $output/$name.log"
  fi
  if [ "$status" -ne 0 ] && [ "$kind" = check ]; then failed=1; fi
  { echo "## $name"; echo; grep '^|' "$output/$name.log" || echo "no table"; echo; } >>"$output/summary.md"
}

benchmark() { # arguments: a name, a time limit in seconds, and arguments of scripts/benchmark.py
  local name="$1" limit="$2"
  shift 2
  run measure "$name" "$limit" python scripts/benchmark.py "$@" --json "$output/$name.json"
}

: >"$output/summary.md"
run measure environment 20 python -c 'import torch
from utils.environment import describe_environment
for item in describe_environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1).items(): print(*item)'
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU: only the checks that need none are run, and nothing is measured"
  run check kernels_without_gpu 300 python scripts/check_gpu.py
  exit "$failed"
fi
nvidia-smi >"$output/nvidia-smi.log" 2>&1 || true
run check kernels 75 python scripts/check_gpu.py
run check tests 130 env FLATTEN_TEST_GPU=1 python -m pytest -q -n 0 -x tests/test_gpu.py
benchmark operator_bf16 25 attention --precision bf16 --tokens 196 784 3136 16384 --batch-size 64 --rounds 5
benchmark operator_fp32 25 attention --precision fp32 --tokens 196 784 3136 16384 --batch-size 64 --rounds 5
benchmark swin_t 40 model flatten_swin_t --precision bf16 fp32 --batch-size 64 --steps training --rounds 5
benchmark swin_t_compiled 60 model flatten_swin_t --precision bf16 --batch-size 64 --steps training --rounds 5 --compile
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    run check "$tool" 25 compute-sanitizer --tool "$tool" --error-exitcode 1 python scripts/check_gpu.py --quick
  done
else
  echo "compute-sanitizer is not installed: skipped"
fi
run measure quickstart 40 bash scripts/quickstart.sh
cat "$output/summary.md"
exit "$failed"
