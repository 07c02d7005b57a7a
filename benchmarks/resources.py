"""Compile the Triton kernels without a GPU, and read the registers, stack and shared memory that they need."""

import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from models import kernel_operator, kernels
from models.kernel_operator import COMPILER_OPTIONS, choose_precision, fill
from models.kernel_selection import Variant, random_inputs, run_form
from models.plain_attention import Options


class AbsentGPU:
    """A driver of Triton for a GPU that is not present: kernels can be compiled, but not launched."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, warp_size=32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # Triton caches compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernels(
    *,
    capability: int,
    head_dim: int,
    dtype: torch.dtype,
    side: int = 5,
    power: float = 3.0,
    masked: bool = False,
    num_heads: int = 2,
    grid: tuple[int, int] = (23, 13),
) -> dict[str, CompiledKernel]:
    """Compile the four kernels for the GPU architecture ``sm_<capability>``, from the arguments of a call on the CPU.

    The outputs of the call are meaningless, because its launches only compile.
    """
    compiled = {}

    def compile_only(kernel: str, num_programs: int, inputs: list, outputs: list, numbers: list[int], constants: dict) -> None:
        function = getattr(kernels, kernel)
        options = {**constants, **COMPILER_OPTIONS}
        compiled[kernel] = function.warmup(*fill(inputs, outputs), *numbers, **options, grid=(num_programs,))

    variant = Variant(torch.device("cpu"), dtype, head_dim, side, power, masked, choose_precision(dtype))
    inputs = random_inputs(variant, num_images=2, num_heads=num_heads, grid=grid)
    options = Options(num_heads, power, *grid, num_prefix_tokens=1)
    with (
        mock.patch.object(driver, "_active", AbsentGPU(capability)),
        mock.patch.object(kernel_operator, "launch", compile_only),
    ):
        run_form(kernel_operator.focused_attention, inputs, None, options)
    return compiled


def measure_resources(compiled: CompiledKernel) -> dict[str, int]:
    """Registers per thread, and bytes of stack per thread and of shared memory per program."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return {"registers": usage["REG"], "stack": usage["STACK"], "shared_memory": compiled.metadata.shared}


def tabulate_resources(capabilities: list[int], head_dims: list[int], dtypes: list[torch.dtype]) -> list[dict]:
    """Resources of all kernels, one record per kernel and combination."""
    return [
        {
            "GPU": f"sm_{capability}",
            "head_dim": head_dim,
            "dtype": str(dtype).removeprefix("torch."),
            "products": choose_precision(dtype),
            "kernel": name.removesuffix("_kernel"),
            **measure_resources(compiled),
        }
        for capability in capabilities
        for head_dim in head_dims
        for dtype in dtypes
        for name, compiled in compile_kernels(capability=capability, head_dim=head_dim, dtype=dtype).items()
    ]
