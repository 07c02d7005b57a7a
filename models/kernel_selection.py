"""Choice between the Triton kernels and torch operations for focused linear attention, and the self-check of the kernels.

Shapes: B images or windows, N queries, M keys, H heads, D channels per head, C = H * D.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import fused_attention, kernel_operator
from .kernel_operator import choose_precision
from .plain_attention import Inputs, Options
from .tracing import is_batched, is_function_transformed

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")
MIN_TRITON = (3, 9)  # earlier versions gave wrong gradients and illegal memory accesses on Hopper GPUs
MIN_CAPABILITY = (8, 0)  # TF32
HEAD_DIMS = (16, 32, 64)
KERNEL_SIDES = (0, 3, 5)  # 0: no convolution
# Maximum relative L2 error of outputs and gradients in the self-check.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3}
TOLERANCE_WITHOUT_TF32 = 3e-5
MAX_OFFSET = 2**31  # the kernels address the elements of an image with 32-bit integers


class Variant(NamedTuple):
    """The properties of a call for which Triton compiles different kernels.

    Args:
        side: side of the depthwise convolution's kernel; 0 without it.
        masked: the keys have weights.
        precision: of the products, see ``choose_precision``.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    side: int
    power: float
    masked: bool
    precision: str


# Triton interprets the kernels on the CPU, for tests. Triton reads this variable at its import.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Variant -> reason not to use the kernels; "" if they passed the self-check in this process.
_verdicts: dict[Variant, str] = {}


def find_obstacle(variant: Variant) -> str:
    """Reason why the kernels do not support this device, GPU software, data type or layer; "" if they do."""
    if variant.device.type not in ("cuda", "meta") and not IS_INTERPRETED:
        return f"the device is a {variant.device.type.upper()}"
    if variant.dtype not in TOLERANCES:
        return f"the kernels do not support {str(variant.dtype).removeprefix('torch.')}"
    if variant.head_dim not in HEAD_DIMS:
        return f"the head dimension is {variant.head_dim}; the kernels support {', '.join(map(str, HEAD_DIMS))}"
    if variant.side not in KERNEL_SIDES:
        return f"the convolution kernel is {variant.side} x {variant.side}; the kernels support 3 x 3 and 5 x 5"
    if IS_INTERPRETED or variant.device.type == "meta":
        return ""
    if torch.version.hip:
        return "the kernels have not been tested with ROCm"
    if (capability := torch.cuda.get_device_capability(variant.device)) < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0"
    return find_triton_problem()


def find_triton_problem() -> str:
    """Why the installed Triton cannot compile the kernels; "" if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import triton
    except Exception as error:  # a damaged installation must not end a run that can use torch operations
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
        return f"Triton {triton.__version__} is installed; the kernels need 3.9"
    return ""


def supports(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, side: int, power: float, masked: bool, requested: str) -> bool:
    """Whether to compute this call with the kernels.

    The first call of each variant runs the self-check and logs a warning if it fails. ``torch.compile`` uses the kernels only
    if the variant has been checked before, by an eager call or by ``choose_backend``. On the meta device, where nothing is
    computed, ``triton`` selects the kernels without a check.
    """
    if requested == "torch" or not (q.is_cuda or IS_INTERPRETED or (q.is_meta and requested == "triton")):
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    if not q.dtype == k.dtype == v.dtype or q.shape[0] == 0:
        return False
    if any(x.shape[1] * max(x.stride(1), 3 * x.shape[2]) >= MAX_OFFSET for x in (q, k, v)):
        return False
    if torch.compiler.is_compiling():
        return _was_checked(q.device, q.dtype, q.shape[2] // num_heads, side, float(power), masked)
    if is_function_transformed() or any(map(is_batched, (q, k, v))):
        return False
    options = q.shape[2] // num_heads, side, float(power), masked, choose_precision(q.dtype)
    return not _check_once(Variant(q.device, q.dtype, *options))


@torch.compiler.assume_constant_result
def _was_checked(device, dtype, head_dim, side, power, masked) -> bool:
    return _verdicts.get(Variant(device, dtype, head_dim, side, power, masked, choose_precision(dtype))) == ""


def _check_once(variant: Variant) -> str:
    if variant not in _verdicts:
        _verdicts[variant] = find_obstacle(variant) or ("" if variant.device.type == "meta" else _check(variant))
    return _verdicts[variant]


def _check(variant: Variant) -> str:
    """Run the self-check; a failure is logged."""
    try:
        reason = compare(variant)
    except Exception as error:  # a kernel that does not compile or launch; the errors of Triton have no common type
        reason = f"a kernel failed: {type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    if reason:
        logger.warning("attention: the Triton kernels are not used for %s: %s", format_variant(variant), reason)
    return reason


def format_variant(variant: Variant) -> str:
    convolution = f"convolution {variant.side} x {variant.side}" if variant.side else "no convolution"
    return (
        f"{str(variant.dtype).removeprefix('torch.')}, head dimension {variant.head_dim}, {convolution}, "
        f"power {variant.power:g}{', masked keys' if variant.masked else ''}"
    )


def compare(variant: Variant, *, num_images: int = 2, num_heads: int = 2, grid: tuple[int, int] | None = None) -> str:
    """Compare outputs and gradients of the kernels with those of torch operations in float64, on random inputs.

    Also check that results repeat exactly, and that a NaN in an input reaches the output.

    Args:
        grid: height and width of the token map; by default, a map with two chunks of keys and a block that is not full.

    Returns:
        The first difference; "" if there is none.
    """
    grid = grid or (23, kernel_operator.MAX_TOKENS[variant.head_dim] // 20)
    inputs = random_inputs(variant, num_images=num_images, num_heads=num_heads, grid=grid)
    options = Options(num_heads, variant.power, *grid, num_prefix_tokens=1)
    exact = run_form(fused_attention.focused_attention, inputs, torch.float64, options)
    results = run_form(kernel_operator.focused_attention, inputs, None, options)
    precise = variant.dtype == torch.float32 and variant.precision != "tf32"
    tolerance = TOLERANCE_WITHOUT_TF32 if precise else TOLERANCES[variant.dtype]
    for (name, result), expected in zip(results.items(), exact.values(), strict=True):
        error = ((result.double() - expected).norm() / expected.norm()).item()
        if not error <= tolerance:
            return f"{name} differs from that of torch operations by {error:.1e} (relative L2 norm, maximum {tolerance:g})"
    repeated = run_form(kernel_operator.focused_attention, inputs, None, options)
    if different := [name for name, result in results.items() if not torch.equal(result, repeated[name])]:
        return f"{different[0]} differs between two identical calls"
    for name in ("q", "k", "v"):
        with_nan = inputs[name].clone()
        with_nan[0, 1, 0] = float("nan")
        out = run_form(kernel_operator.focused_attention, inputs | {name: with_nan}, None, options)["output"]
        if out.isfinite().all():
            return f"a NaN in {name} does not reach the output"
    return ""


def random_inputs(variant: Variant, *, num_images: int, num_heads: int, grid: tuple[int, int]) -> dict[str, Tensor | None]:
    """Random ``Inputs`` by name, and the gradient of the output, for maps with one prefix token."""
    generator = torch.Generator().manual_seed(0)  # not the global generator, whose state belongs to the run
    num_tokens, channels = grid[0] * grid[1] + 1, num_heads * variant.head_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(variant.device)

    q, k, v = random(num_images, num_tokens, 3 * channels).to(variant.dtype).chunk(3, dim=-1)
    weight = random(num_images, 1, num_tokens, 1).clamp(min=0) / num_tokens
    return {
        "q": q,
        "k": k,
        "v": v,
        "position": 0.5 * random(1, num_tokens, channels),
        "scale": 0.5 + random(1, 1, channels).abs(),
        "kernel": random(channels, 1, variant.side, variant.side) / variant.side if variant.side else None,
        "bias": random(channels) if variant.side else None,
        "key_weight": weight if variant.masked else None,
        "gradient": random(num_images, num_tokens, channels).to(variant.dtype),
    }


def run_form(form, inputs: dict[str, Tensor | None], dtype: torch.dtype | None, options: Options) -> dict[str, Tensor]:
    """Output and gradients of a form of the operator, with all inputs converted to ``dtype`` if it is given."""
    inputs = {name: None if x is None else x.detach().to(dtype or x.dtype) for name, x in inputs.items()}
    gradient = inputs.pop("gradient")
    differentiable = {name: x.requires_grad_() for name, x in inputs.items() if x is not None and name != "key_weight"}
    with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
        out = form(Inputs(**inputs), options)
        gradients = torch.autograd.grad(out, list(differentiable.values()), gradient)
    return {"output": out.detach(), **{f"the gradient of {name}": x for name, x in zip(differentiable, gradients, strict=True)}}


def model_variants(model: nn.Module, device: torch.device, dtypes: Iterable[torch.dtype]) -> list[Variant]:
    """Variants of the calls of a model's focused linear attention, in a fixed order; [] without such attention."""
    from .linear_attention import FocusedLinearAttention

    variants: dict[Variant, None] = {}
    for module in model.modules():
        if isinstance(module, FocusedLinearAttention) and module.kind == "focused" and module.fused:
            for dtype in dtypes:
                for masked in (False, True):  # images of other sizes may need masks
                    options = module.dim // module.num_heads, module.filter_side, float(module.power), masked
                    variants[Variant(device, dtype, *options, choose_precision(dtype))] = None
    return list(variants)


def choose_backend(model: nn.Module, device: torch.device, dtypes: Sequence[torch.dtype], requested: str) -> str:
    """Choose the backend of a model, and run the self-check if the kernels may be used.

    Args:
        dtypes: data types of q, k and v in this run.
        requested: one of ``BACKENDS``.

    Returns:
        The reason to use torch operations; "" to use the kernels.
    """
    if requested == "torch":
        return "MODEL.LA.BACKEND is torch"
    variants = model_variants(model, device, dtypes)
    if not variants:
        return "the model has no focused linear attention"
    return next(filter(None, map(_check_once, variants)), "")


def set_backend(model: nn.Module, backend: str) -> None:
    """Set the backend of all attention modules of a model, to one of ``BACKENDS``."""
    from .linear_attention import FocusedLinearAttention

    for module in model.modules():
        if isinstance(module, FocusedLinearAttention):
            module.backend = backend
