#!/usr/bin/env bash
# Lint and test, in an environment that it makes itself. Arguments go to pytest: bash scripts/test.sh -k swin
set -euo pipefail
source "$(dirname "$0")/environment.sh" pytest hypothesis ruff onnx onnxscript onnxruntime
ruff check .
ruff format --check .
# Two cores' worth of threads, so that timings and sums do not depend on the machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
python -m pytest "$@"
