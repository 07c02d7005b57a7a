"""Device functions of the Triton kernels in ``models/kernels.py``, which defines the shapes.

x, t, u and c are defined in ``models/fused_attention.py``.
"""

import triton
import triton.language as tl

from .fused_attention import EPS as EPS_VALUE

EPS = tl.constexpr(EPS_VALUE)
SMALLEST = tl.constexpr(1e-37)  # start of running maxima; smaller than x of any token


@triton.jit
def raise_to_power(t, POWER: tl.constexpr):
    """t^p for t >= 0, by repeated squaring if p is an integer: more accurate than exp2(p * log2(t))."""
    if POWER < 64 and POWER % 1 == 0:
        result = tl.full(t.shape, 1.0, tl.float32)
        for bit in tl.static_range(6):
            if (POWER >> bit) % 2 == 1:
                result *= t
            t *= t
        return result
    else:
        return tl.exp2(POWER * tl.log2(t))


@triton.jit
def round_to_tf32(x):
    """Round to the nearest TF32 number; tensor cores truncate. NaN is kept: the sum could carry its bits over to -0."""
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """Product of float32 matrices in TF32 (``tf32``), or as three TF32 products with float32 accuracy (``tf32x3``)."""
    if PRECISION == "tf32":
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_tile(ptr, rows, inside, stride, channels):
    """Channels of a block of tokens, (BN, D), in float32; zero where ``inside`` is False."""
    return tl.load(ptr + rows[:, None] * stride + channels[None, :], mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_positive(ptr, position_ptr, rows, inside, stride, C, channels, HAS_POSITION: tl.constexpr):
    """relu(tokens + position), (BN, D). NaN is not replaced by zero."""
    x = load_tile(ptr, rows, inside, stride, channels)
    if HAS_POSITION:
        x += load_tile(position_ptr, rows, inside, C, channels)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def measure(
    ptr, position_ptr, inverse_ptr, rows, inside, stride, H,
    POWER: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, HAS_POSITION: tl.constexpr,
):  # fmt: skip
    """Statistics max(x), |t| and |u| of a block of tokens, each (BN,), in one pass over the heads.

    As in online softmax, sums that were scaled by a smaller maximum are rescaled when the maximum increases.
    """
    largest = tl.full([BN], SMALLEST, tl.float32)
    unit_square = tl.zeros([BN], tl.float32)
    powers_square = tl.zeros([BN], tl.float32)
    for head in range(H):
        channels = head * D + tl.arange(0, D)
        positive = load_positive(ptr, position_ptr, rows, inside, stride, H * D, channels, HAS_POSITION)
        x = (positive + EPS) * tl.load(inverse_ptr + channels)[None, :]
        new_largest = tl.maximum(largest, tl.max(x, 1))
        ratio = largest / new_largest
        ratio_power = raise_to_power(ratio, POWER)
        unit = x / new_largest[:, None]
        powers = raise_to_power(unit, POWER)
        unit_square = unit_square * (ratio * ratio) + tl.sum(unit * unit, 1)
        powers_square = powers_square * (ratio_power * ratio_power) + tl.sum(powers * powers, 1)
        largest = new_largest
    return largest, tl.sqrt(unit_square), tl.sqrt(powers_square)


@triton.jit
def load_statistics(ptr, rows, inside, num_tokens):
    largest = tl.load(ptr + rows, mask=inside, other=1.0)
    unit_norm = tl.load(ptr + num_tokens + rows, mask=inside, other=1.0)
    powers_norm = tl.load(ptr + 2 * num_tokens + rows, mask=inside, other=1.0)
    return largest, unit_norm, powers_norm


@triton.jit
def store_statistics(ptr, rows, inside, num_tokens, largest, unit_norm, powers_norm):
    tl.store(ptr + rows, largest, mask=inside)
    tl.store(ptr + num_tokens + rows, unit_norm, mask=inside)
    tl.store(ptr + 2 * num_tokens + rows, powers_norm, mask=inside)


@triton.jit
def load_features(
    ptr, position_ptr, inverse_ptr, rows, inside, stride, largest, H, head,
    POWER: tl.constexpr, D: tl.constexpr, HAS_POSITION: tl.constexpr,
):  # fmt: skip
    """relu(tokens + position), t and u of one head, each (BN, D); zero outside the image."""
    channels = head * D + tl.arange(0, D)
    positive = load_positive(ptr, position_ptr, rows, inside, stride, H * D, channels, HAS_POSITION)
    unit = (positive + EPS) * tl.load(inverse_ptr + channels)[None, :] / largest[:, None]
    unit = tl.where(inside[:, None], unit, 0.0)  # EPS / scale is not normalised there, and its powers may overflow
    return positive, unit, raise_to_power(unit, POWER)


@triton.jit
def load_key_factor(weight_ptr, rows, inside, M, largest, unit_norm, powers_norm, HAS_WEIGHT: tl.constexpr):
    """Factor c of each key times the weight of the key, (BN,); zero outside the image."""
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + rows, mask=inside, other=0.0)
    else:
        weight = tl.where(inside, 1.0 / M, 0.0)
    return largest * unit_norm / powers_norm * weight


@triton.jit
def load_summary(ptr, head, D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """S (D, D), or its transpose, and s (D,) of one head."""
    lanes = tl.arange(0, D)
    ptr += head * D * (D + 1)
    S = tl.load(ptr + lanes[:, None] * D + lanes[None, :])
    if TRANSPOSED:
        S = tl.trans(S)
    return S, tl.load(ptr + D * D + lanes)


@triton.jit
def store_summary(ptr, head, S, s, D: tl.constexpr):
    lanes = tl.arange(0, D)
    ptr += head * D * (D + 1)
    tl.store(ptr + lanes[:, None] * D + lanes[None, :], S)
    tl.store(ptr + D * D + lanes, s)


@triton.jit
def store_tile(ptr, rows, inside, stride, channels, tile):
    tl.store(ptr + rows[:, None] * stride + channels[None, :], tile.to(ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def convolve(
    ptr, filter_ptr, rows, inside, stride, C, channels, height, width, prefix,
    D: tl.constexpr, BN: tl.constexpr, SIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution without bias at a block of tokens, (BN, D); zero for prefix tokens.

    TRANSPOSED selects the gradient of the input: the filter (SIDE * SIDE, C) is then read backwards.
    """
    y = (rows - prefix) // width
    x = rows - prefix - y * width
    total = tl.zeros([BN, D], tl.float32)
    for i in range(SIDE):  # not unrolled: 25 taps at once would need more than 255 registers
        dy = i - SIDE // 2
        inside_row = inside & (rows >= prefix) & (y + dy >= 0) & (y + dy < height)
        for j in tl.static_range(SIDE):
            dx = j - SIDE // 2
            inside_map = inside_row & (x + dx >= 0) & (x + dx < width)
            tap = i * SIDE + j
            if TRANSPOSED:
                tap = SIDE * SIDE - 1 - tap
            coefficients = tl.load(filter_ptr + tap * C + channels)
            total += load_tile(ptr, rows + dy * width + dx, inside_map, stride, channels) * coefficients[None, :]
    return total
