"""The Triton kernels: numbers in the interpreter, compilation for GPUs that are not present, and the choice of the backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="CPU-only builds of torch have no Triton")
from benchmarks.resources import compile_kernels, measure_resources
from models import kernel_operator

ROOT = Path(__file__).parent.parent.parent
MAX_STACK = 32  # bytes; ptxas spills a few bytes when this allows more programs per multiprocessor


def run_interpreted(*arguments: str) -> None:
    """Run test files in a process in which Triton interprets kernels on the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments]
    outcome = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=3600, check=False
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_interpreted_kernels_equal_standard_operations():
    run_interpreted("tests/models/interpreted_kernels.py", "-m", "not slow")


def test_interpreted_kernels_work_with_the_features_of_torch_and_in_whole_runs():
    run_interpreted("tests/models/interpreted_runs.py", "tests/models/interpreted_integration.py")


@pytest.mark.slow
def test_interpreted_kernels_at_the_shapes_of_the_models_and_in_compiled_runs():
    run_interpreted("tests/models/interpreted_runs.py", "tests/models/interpreted_kernels.py", "-m", "slow")


# The kernels that spill more than MAX_STACK, with their stack in bytes; docs/performance.md says what this costs.
SPILLS = {("query_gradient_kernel", 80, 64, "tf32x3"): 256}


def check_resources(capability: int, head_dim: int, dtype: torch.dtype, **options) -> None:
    compiled = compile_kernels(capability=capability, head_dim=head_dim, dtype=dtype, **options)
    assert len(compiled) == 4
    for name, kernel in compiled.items():
        resources = measure_resources(kernel)
        key = (name, capability, head_dim, kernel_operator.choose_precision(dtype))
        assert resources["stack"] <= SPILLS.get(key, MAX_STACK), (name, resources)
        assert resources["shared_memory"] <= 48 * 1024, (name, resources)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_without_spilling_registers(capability):
    check_resources(capability, 32, torch.bfloat16)


def test_kernels_are_not_compiled_again_for_other_numbers_of_tokens_and_heads():
    first = compile_kernels(capability=90, head_dim=32, dtype=torch.bfloat16)
    second = compile_kernels(capability=90, head_dim=32, dtype=torch.bfloat16, num_heads=1, grid=(8, 4))
    assert {name: kernel.hash for name, kernel in first.items()} == {name: kernel.hash for name, kernel in second.items()}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_all_variants_of_the_kernels_compile(capability, head_dim, dtype):
    check_resources(capability, head_dim, dtype)
    check_resources(capability, head_dim, dtype, side=3, power=2.5, masked=True)
    check_resources(capability, head_dim, dtype, side=0, power=1)
