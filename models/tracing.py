"""Detection of torch's compilers, tracers and function transforms, for which models select standard operations."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a compiler, a tracer, ``torch.func`` or forward-mode differentiation is active.

    All of these need standard operations instead of custom backward passes and cached tensors.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_function_transformed()


def is_function_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor represents a batch of tensors (``vmap``, ``is_grads_batched``, ``jacobian(vectorize=True)``)."""
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)
