"""Compile the Triton kernels without a GPU, and read the registers, stack and shared memory that they need."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from models import kernels
from models.kernel_operator import choose_precision, launch_options

KERNELS = ("key_summary_kernel", "output_kernel", "query_gradient_kernel", "key_gradient_kernel")
# Arguments with the data type of q, k and v; all other tensors are float32.
TOKENS = {"q_ptr", "k_ptr", "v_ptr", "grad_ptr", "out_ptr", "grad_q_ptr", "grad_k_ptr", "grad_v_ptr"}
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compile_kernel(
    name: str,
    *,
    capability: int,
    head_dim: int,
    dtype: torch.dtype,
    side: int = 5,
    power: int | float = 3,
    masked: bool = False,
) -> CompiledKernel:
    """Compile a kernel of ``models/kernels.py`` as its launch would, for the GPU architecture ``sm_<capability>``."""
    kernel, precision = getattr(kernels, name), choose_precision(dtype)
    options = launch_options(head_dim, precision)
    constants = {"D": head_dim, "BN": options.pop("block_size"), "POWER": power, "PRECISION": precision}
    constants |= {"SIDE": side, "HAS_WEIGHT": masked}
    signature, constant_values, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            constant_values[(index,)] = constants[argument]
            continue
        is_pointer = argument.endswith("_ptr")
        signature[argument] = ("*" + TRITON_TYPES[dtype if argument in TOKENS else torch.float32]) if is_pointer else "i32"
        if is_pointer or argument.startswith("stride"):  # the launch finds that these are multiples of 16
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constant_values, attrs=attributes)
    options |= {"num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


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
            "dtype": TRITON_TYPES[dtype],
            "products": choose_precision(dtype),
            "kernel": name.removesuffix("_kernel"),
            **measure_resources(compile_kernel(name, capability=capability, head_dim=head_dim, dtype=dtype)),
        }
        for capability in capabilities
        for head_dim in head_dims
        for dtype in dtypes
        for name in KERNELS
    ]
