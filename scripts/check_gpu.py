"""Check the Triton kernels of focused linear attention on this machine, and print what they need and how accurate they are.

With a GPU: compare outputs and gradients of the kernels with torch operations in float64, at the sizes of the models in fp32
and bf16, and at the first size in every precision. Compiling all other variants as well would take minutes. Without a GPU:
compile the kernels for GPUs with compute capability 8.0 and 9.0, and interpret them on the CPU.

Exit status 1 if a check fails. scripts/check_gpu.sh runs this script and all other checks for a new GPU.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import create_parser

# Token grid, heads, head dimension and side of the convolution, as in Swin-T (four stages), DeiT-T, PVT-T and CSwin-T.
SIZES = {
    "Swin-T, stage 1": ((56, 56), 3, 32, 5),
    "Swin-T, stage 2": ((28, 28), 6, 32, 5),
    "Swin-T, stage 3": ((14, 14), 12, 32, 5),
    "Swin-T, stage 4": ((7, 7), 24, 32, 5),
    "DeiT-T": ((14, 14), 3, 64, 5),
    "no convolution": ((28, 28), 2, 64, 0),
    "3 x 3, masked": ((56, 28), 2, 16, 3),
}


def check_on_gpu(quick: bool) -> bool:
    """Compare the kernels with torch operations, and print one row per size and precision. Returns whether all agree."""
    import torch

    from models.kernel_selection import Variant, compare, find_obstacle

    device, passed = torch.device("cuda", torch.cuda.current_device()), True
    print("| size | precision | TF32 | result | seconds |\n|---|---|---|---|---|")
    precisions = [(torch.float32, "tf32x3"), (torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float16, "tf32")]
    for position, (name, (grid, num_heads, head_dim, side)) in enumerate(SIZES.items()):
        if quick and position:
            break
        for dtype, precision in precisions[: 2 if position else 4]:
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            variant = Variant(device, dtype, head_dim, side, 3.0, "masked" in name, precision)
            started = time.perf_counter()
            reason = find_obstacle(variant) or compare(variant, num_heads=num_heads, grid=(9, 7) if quick else grid)
            cells = name, dtype, precision == "tf32", reason or "passed", time.perf_counter() - started
            print("| {} | {} | {} | {} | {:.2f} |".format(*cells), flush=True)
            passed &= not reason
    return passed


def compile_kernels() -> None:
    """Compile the kernels for GPUs that are not present, and print a table of what they need."""
    import torch

    from benchmarks.resources import tabulate_resources
    from benchmarks.tables import to_markdown

    print(to_markdown(tabulate_resources([80, 90], [32, 64], [torch.bfloat16, torch.float32])), flush=True)


def interpret_kernels() -> bool:
    """Interpret the kernels on the CPU at a small size. Returns whether they are correct."""
    import torch

    from models.kernel_selection import Variant, compare

    variant = Variant(torch.device("cpu"), torch.float32, 16, 3, 3.0, False, "tf32x3")
    reason = compare(variant, num_images=1, num_heads=1, grid=(5, 7))
    print(f"interpreted kernels: {reason or 'passed'}")
    return not reason


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="with a GPU: check one small size only, for compute-sanitizer")
    args = parser.parse_args()
    import torch

    from models.kernel_selection import IS_INTERPRETED, find_triton_problem

    if problem := find_triton_problem():
        print(f"{problem}: attention uses torch operations; nothing to check")
        return
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
        sys.exit(0 if check_on_gpu(args.quick) else 1)
    if IS_INTERPRETED:
        sys.exit(0 if interpret_kernels() else 1)
    print("no GPU: the kernels are compiled for other GPUs and interpreted on the CPU; nothing is measured\n", flush=True)
    compile_kernels()
    sys.exit(subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode)


if __name__ == "__main__":
    main()
