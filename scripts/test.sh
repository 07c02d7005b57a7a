#!/usr/bin/env bash
# Lint, check types, and run the tests in two processes, in a virtual environment that is created if missing. Arguments are
# passed to pytest: bash scripts/test.sh -k swin selects tests, -n 0 uses one process.
set -euo pipefail
source "$(dirname "$0")/environment.sh" pytest pytest-xdist hypothesis ruff mypy types-PyYAML onnx onnxscript onnxruntime pyarrow
ruff check .
ruff format --check .
mypy
# One thread per test process, so that the order of floating-point sums does not depend on the number of cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -n 2 --dist worksteal "$@"
