"""Token maps: sizes, windows, and masks and indices that depend on the size of a map.

Shapes: B images, C channels, H x W a token map, nW windows per image, each of h x w tokens.
"""

import functools
import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .tracing import is_transformed

PADDING = -1  # region id of padding, see ``window_regions``


def to_pair(size: int | Iterable[int], name: str) -> tuple[int, int]:
    """Convert an integer (of any integer type) or a pair of integers to (height, width).

    Raises:
        ValueError: ``size`` is neither; the message calls it ``name``.
    """
    if hasattr(size, "__index__"):
        side = operator.index(size)
        return side, side
    try:
        height, width = size
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={size!r}: give an integer, or (height, width) as two integers") from None


def ceil_divide(size: int, divisor: int) -> int:
    return -(-size // divisor)


def partition_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Split maps into windows. (B, H, W, C) -> (B * nW, h * w, C)."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def merge_windows(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of ``partition_windows``: (B * nW, h * w, C) -> (B, H, W, C)."""
    rows, columns = grid[0] // window[0], grid[1] // window[1]
    x = x.unflatten(1, window).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def window_regions(
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    padded: tuple[int, int],
    *,
    device: torch.device | None = None,
) -> Tensor | None:
    """Region id of each token of each window; softmax attention is restricted to tokens of the same region.

    A cyclic shift puts tokens from opposite edges of the map in one window; they get different ids. Padding has its own id.

    Returns:
        (nW, h * w) ids, ``PADDING`` for padding; None if there is neither shift nor padding.
    """
    if padded == grid and not any(shift):
        return None
    region = torch.zeros(padded, dtype=torch.long, device=device)
    for axis in (0, 1):
        if shift[axis]:  # the rows or columns that ``roll`` moves to the opposite edge
            region.narrow(axis, 0, shift[axis]).add_(1 + axis)
    region[grid[0] :] = PADDING
    region[:, grid[1] :] = PADDING
    region = region.roll((-shift[0], -shift[1]), dims=(0, 1))
    return partition_windows(region[None, :, :, None], window).squeeze(-1)


def cached_constant(build: Callable[..., Tensor | None], *arguments: tuple[int, ...], like: Tensor) -> Tensor | None:
    """``build(*arguments, device=like.device)``, cached, so that training steps do not compute it again.

    Masks and indices are constants of the map size. They are not buffers, because everything that handles buffers would have to
    except them: averages of models, construction on the ``meta`` device, ``to_empty``, and offloading.
    """
    # Tensors that are created in a trace or under a dispatch mode (such as fake tensors) must not be cached.
    if is_transformed() or type(like) not in (Tensor, nn.Parameter) or torch._C._len_torch_dispatch_stack():
        return build(*arguments, device=like.device)
    return _build_constant(build, arguments, like.device)


@functools.lru_cache(maxsize=128)
def _build_constant(build: Callable[..., Tensor | None], arguments: tuple, device: torch.device) -> Tensor | None:
    with torch.inference_mode(False):  # autograd cannot save inference tensors
        return build(*arguments, device=device)
