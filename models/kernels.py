"""Triton kernels of focused linear attention, forward and backward; ``models/kernel_operator.py`` launches them.

They compute the operator of ``models/fused_attention.py``, whose docstring defines x, t, u, c, e, S and s. Eager torch
operations move 132 tensors of the size of q forward and backward; these four kernels move 15. A kernel reads its inputs from
memory once and recomputes x, t and u in registers.

Shapes: B images or windows, N queries, M keys, H heads, D channels per head, C = H * D; BN tokens per block.

Each program handles one chunk of the tokens of one image: BLOCKS blocks of BN tokens, and all heads, because the norms |t| and
|u| and the gradient of c are sums over all heads. Programs do not share sums: each writes its partial sum, and torch adds the
partial sums in a fixed order, without atomics. The chunks do not depend on the number of images. Therefore, the bits of the
results are the same in every run, and for an image they do not depend on the other images of the batch.

Statistics (B, 3, n) of each token are max(x), |t| and |u|. Summaries (B, H, D + 1, D) contain S in rows 0 to D - 1 and s in row
D, so that rows are aligned for vector loads. All intermediate values are float32.

Within a program, phases exchange values through global memory: ``tl.debug_barrier`` makes the writes of all threads visible.
"""

import triton
import triton.language as tl

from .kernel_tiles import (
    EPS,
    convolve,
    load_features,
    load_key_factor,
    load_statistics,
    load_summary,
    load_tile,
    matmul,
    measure,
    store_statistics,
    store_summary,
    store_tile,
)

# Numbers that vary between calls: Triton must not compile a kernel for each of their values.
COUNTS = ["N", "M", "H", "BLOCKS", "num_chunks", "height", "width", "prefix"]


@triton.jit(do_not_specialize=COUNTS)
def key_summary_kernel(
    k_ptr, v_ptr, position_ptr, inverse_ptr, weight_ptr, statistics_ptr, partial_ptr,
    stride_kb, stride_kn, stride_vb, stride_vn, M, H, BLOCKS, num_chunks,
    POWER: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, HAS_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of the keys, and the partial summary of one chunk. partial: (B, chunks, H, D + 1, D)."""
    program = tl.program_id(0).to(tl.int64)
    image = program // num_chunks
    first = (tl.program_id(0) % num_chunks) * BLOCKS * BN
    k_ptr += image * stride_kb
    v_ptr += image * stride_vb
    weight_ptr += image * M
    statistics_ptr += image * 3 * M
    partial_ptr += program * H * D * (D + 1)
    for block in range(BLOCKS):
        rows = first + block * BN + tl.arange(0, BN)
        inside = rows < M
        statistics = measure(k_ptr, position_ptr, inverse_ptr, rows, inside, stride_kn, H, POWER, D, BN, True)
        store_statistics(statistics_ptr, rows, inside, M, statistics[0], statistics[1], statistics[2])
    tl.debug_barrier()
    for head in range(H):
        S = tl.zeros([D, D], tl.float32)
        s = tl.zeros([D], tl.float32)
        for block in range(BLOCKS):
            rows = first + block * BN + tl.arange(0, BN)
            inside = rows < M
            largest, unit_norm, powers_norm = load_statistics(statistics_ptr, rows, inside, M)
            factor = load_key_factor(weight_ptr, rows, inside, M, largest, unit_norm, powers_norm, HAS_WEIGHT)
            _, _, powers = load_features(
                k_ptr, position_ptr, inverse_ptr, rows, inside, stride_kn, largest, H, head, POWER, D, True
            )
            values = load_tile(v_ptr, rows, inside, stride_vn, head * D + tl.arange(0, D))
            S += matmul(tl.trans(powers), values * factor[:, None], PRECISION)
            s += tl.sum(powers * factor[:, None], 0)
        store_summary(partial_ptr, head, S, s, D)


@triton.jit(do_not_specialize=COUNTS)
def output_kernel(
    q_ptr, v_ptr, inverse_ptr, summary_ptr, filter_ptr, bias_ptr, statistics_ptr, out_ptr,
    stride_qb, stride_qn, stride_vb, stride_vn, N, H, height, width, prefix, num_chunks,
    POWER: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of the queries, and the output u S / (u s + EPS / c) plus the convolution of v; one block per chunk."""
    image = tl.program_id(0).to(tl.int64) // num_chunks
    rows = (tl.program_id(0) % num_chunks) * BN + tl.arange(0, BN)
    inside = rows < N
    q_ptr += image * stride_qb
    v_ptr += image * stride_vb
    summary_ptr += image * H * D * (D + 1)
    out_ptr += image * N * H * D
    largest, unit_norm, powers_norm = measure(q_ptr, q_ptr, inverse_ptr, rows, inside, stride_qn, H, POWER, D, BN, False)
    store_statistics(statistics_ptr + image * 3 * N, rows, inside, N, largest, unit_norm, powers_norm)
    offset = EPS * powers_norm / (largest * unit_norm)  # EPS / c
    for head in range(H):
        channels = head * D + tl.arange(0, D)
        S, s = load_summary(summary_ptr, head, D, False)
        _, _, powers = load_features(q_ptr, q_ptr, inverse_ptr, rows, inside, stride_qn, largest, H, head, POWER, D, False)
        denominator = tl.sum(powers * s[None, :], 1) + offset
        out = matmul(powers, S, PRECISION) / denominator[:, None]
        if SIDE > 0:
            local = convolve(
                v_ptr, filter_ptr, rows, inside, stride_vn, H * D, channels, height, width, prefix, D, BN, SIDE, False
            )
            bias = tl.load(bias_ptr + channels)
            out += tl.where((rows >= prefix)[:, None], local + bias[None, :], 0.0)
        store_tile(out_ptr, rows, inside, H * D, channels, out)


@triton.jit
def feature_gradient(positive, unit, powers, grad_powers, grad_log_factor, unit_norm, powers_norm, POWER: tl.constexpr):
    """Gradients of log(x) and of the tokens, each (BN, D).

    With c = max(x) |t| / |u|, where max(x) cancels in the output and is a constant:
    grad_log_x = p u grad_u + grad_log_c (t^2 / |t|^2 - p u^2 / |u|^2).
    """
    unit_weight = grad_log_factor / (unit_norm * unit_norm)
    powers_weight = POWER * grad_log_factor / (powers_norm * powers_norm)
    grad_log_x = (POWER * grad_powers - powers_weight[:, None] * powers) * powers + unit_weight[:, None] * (unit * unit)
    return grad_log_x, tl.where(positive <= 0.0, 0.0, grad_log_x / (positive + EPS))  # NaN is not <= 0, and is kept


@triton.jit
def add_heads(scratch_ptr, first, num_tokens, H, BLOCKS, BN: tl.constexpr):
    """Write the sum of rows 0 to H - 1 of ``scratch``, (H + 1, n), to row H, for the tokens of one chunk."""
    tl.debug_barrier()
    for block in range(BLOCKS):
        rows = first + block * BN + tl.arange(0, BN)
        inside = rows < num_tokens
        total = tl.zeros([BN], tl.float32)
        for head in range(H):
            total += tl.load(scratch_ptr + head * num_tokens + rows, mask=inside, other=0.0)
        tl.store(scratch_ptr + H * num_tokens + rows, total, mask=inside)
    tl.debug_barrier()


@triton.jit
def summary_gradient(
    q_ptr, grad_ptr, inverse_ptr, summary_ptr, statistics_ptr, scratch_ptr, partial_ptr, bias_ptr,
    first, stride_qn, N, H, head, prefix, BLOCKS,
    POWER: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial gradients of the summary and of the bias, and grad_denominator of one head and chunk."""
    channels = head * D + tl.arange(0, D)
    S, s = load_summary(summary_ptr, head, D, False)
    grad_S = tl.zeros([D, D], tl.float32)
    grad_s = tl.zeros([D], tl.float32)
    grad_bias = tl.zeros([D], tl.float32)
    for block in range(BLOCKS):
        rows = first + block * BN + tl.arange(0, BN)
        inside = rows < N
        largest, unit_norm, powers_norm = load_statistics(statistics_ptr, rows, inside, N)
        _, _, powers = load_features(q_ptr, q_ptr, inverse_ptr, rows, inside, stride_qn, largest, H, head, POWER, D, False)
        grad = load_tile(grad_ptr, rows, inside, H * D, channels)
        grad_bias += tl.sum(tl.where((rows >= prefix)[:, None], grad, 0.0), 0)
        denominator = tl.sum(powers * s[None, :], 1) + EPS * powers_norm / (largest * unit_norm)
        grad /= denominator[:, None]
        grad_denominator = -tl.sum(matmul(powers, S, PRECISION) * grad, 1) / denominator
        tl.store(scratch_ptr + head * N + rows, grad_denominator, mask=inside)
        grad_S += matmul(tl.trans(powers), grad, PRECISION)
        grad_s += tl.sum(powers * grad_denominator[:, None], 0)
    store_summary(partial_ptr, head, grad_S, grad_s, D)
    tl.store(bias_ptr + channels, grad_bias)


@triton.jit
def query_gradient(
    q_ptr, grad_ptr, inverse_ptr, summary_ptr, statistics_ptr, scratch_ptr, log_scale_ptr, grad_q_ptr,
    first, stride_qn, stride_gn, N, H, head, BLOCKS,
    POWER: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and the partial gradient of log(1 / scale), of one head and chunk."""
    channels = head * D + tl.arange(0, D)
    transposed_S, s = load_summary(summary_ptr, head, D, True)
    grad_log_scale = tl.zeros([D], tl.float32)
    for block in range(BLOCKS):
        rows = first + block * BN + tl.arange(0, BN)
        inside = rows < N
        largest, unit_norm, powers_norm = load_statistics(statistics_ptr, rows, inside, N)
        offset = EPS * powers_norm / (largest * unit_norm)
        positive, unit, powers = load_features(
            q_ptr, q_ptr, inverse_ptr, rows, inside, stride_qn, largest, H, head, POWER, D, False
        )
        denominator = tl.sum(powers * s[None, :], 1) + offset
        grad = load_tile(grad_ptr, rows, inside, H * D, channels) / denominator[:, None]
        grad_denominator = tl.load(scratch_ptr + head * N + rows, mask=inside, other=0.0)
        grad_log_factor = -offset * tl.load(scratch_ptr + H * N + rows, mask=inside, other=0.0)
        grad_powers = matmul(grad, transposed_S, PRECISION) + grad_denominator[:, None] * s[None, :]
        grad_log_x, grad_q = feature_gradient(
            positive, unit, powers, grad_powers, grad_log_factor, unit_norm, powers_norm, POWER
        )
        grad_log_scale += tl.sum(grad_log_x, 0)
        store_tile(grad_q_ptr, rows, inside, stride_gn, channels, grad_q)
    tl.store(log_scale_ptr + channels, grad_log_scale)


@triton.jit(do_not_specialize=COUNTS)
def query_gradient_kernel(
    q_ptr, grad_ptr, inverse_ptr, summary_ptr, statistics_ptr, scratch_ptr, partial_ptr, log_scale_ptr, bias_ptr, grad_q_ptr,
    stride_qb, stride_qn, stride_gb, stride_gn, N, H, prefix, BLOCKS, num_chunks,
    POWER: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and partial gradients of the summary, of log(1 / scale) and of the bias.

    With numerator u S and denominator u s + EPS / c: grad_numerator = grad / denominator,
    grad_denominator = -sum(grad_numerator * numerator) / denominator, and grad_log_c = -EPS / c times the sum of
    grad_denominator over the heads.

    scratch: (B, H + 1, N), grad_denominator and its sum over the heads. partial: (B, chunks, H, D + 1, D).
    log_scale, bias: (B, chunks, C).
    """
    program = tl.program_id(0).to(tl.int64)
    image = program // num_chunks
    first = (tl.program_id(0) % num_chunks) * BLOCKS * BN
    q_ptr += image * stride_qb
    grad_q_ptr += image * stride_gb
    grad_ptr += image * N * H * D
    summary_ptr += image * H * D * (D + 1)
    statistics_ptr += image * 3 * N
    scratch_ptr += image * (H + 1) * N
    for head in range(H):
        summary_gradient(
            q_ptr, grad_ptr, inverse_ptr, summary_ptr, statistics_ptr, scratch_ptr, partial_ptr + program * H * D * (D + 1),
            bias_ptr + program * H * D, first, stride_qn, N, H, head, prefix, BLOCKS, POWER, D, BN, PRECISION,
        )  # fmt: skip
    add_heads(scratch_ptr, first, N, H, BLOCKS, BN)
    for head in range(H):
        query_gradient(
            q_ptr, grad_ptr, inverse_ptr, summary_ptr, statistics_ptr, scratch_ptr, log_scale_ptr + program * H * D,
            grad_q_ptr, first, stride_qn, stride_gn, N, H, head, BLOCKS, POWER, D, BN, PRECISION,
        )  # fmt: skip


@triton.jit
def value_gradient(
    k_ptr, v_ptr, grad_ptr, position_ptr, inverse_ptr, weight_ptr, grad_summary_ptr, filter_ptr, statistics_ptr, scratch_ptr,
    grad_v_ptr, first, stride_kn, stride_vn, stride_gn, M, H, head, height, width, prefix, BLOCKS,
    POWER: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, SIDE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of v, and the terms of grad_log_c, of one head and chunk."""
    channels = head * D + tl.arange(0, D)
    grad_S, grad_s = load_summary(grad_summary_ptr, head, D, False)
    for block in range(BLOCKS):
        rows = first + block * BN + tl.arange(0, BN)
        inside = rows < M
        largest, unit_norm, powers_norm = load_statistics(statistics_ptr, rows, inside, M)
        factor = load_key_factor(weight_ptr, rows, inside, M, largest, unit_norm, powers_norm, HAS_WEIGHT)
        _, _, powers = load_features(
            k_ptr, position_ptr, inverse_ptr, rows, inside, stride_kn, largest, H, head, POWER, D, True
        )
        grad_values = matmul(powers, grad_S, PRECISION)
        values = load_tile(v_ptr, rows, inside, stride_vn, channels)
        grad_log_factor = factor * (tl.sum(grad_values * values, 1) + tl.sum(powers * grad_s[None, :], 1))
        tl.store(scratch_ptr + head * M + rows, grad_log_factor, mask=inside)
        grad_values *= factor[:, None]
        if SIDE > 0:
            grad_values += convolve(
                grad_ptr, filter_ptr, rows, inside, H * D, H * D, channels, height, width, prefix, D, BN, SIDE, True
            )
        store_tile(grad_v_ptr, rows, inside, stride_gn, channels, grad_values)


@triton.jit
def key_gradient(
    k_ptr, v_ptr, position_ptr, inverse_ptr, weight_ptr, grad_summary_ptr, statistics_ptr, scratch_ptr, log_scale_ptr,
    grad_k_ptr, first, stride_kn, stride_vn, stride_gn, M, H, head, BLOCKS,
    POWER: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, HAS_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of k, and the partial gradient of log(1 / scale), of one head and chunk."""
    channels = head * D + tl.arange(0, D)
    transposed_grad_S, grad_s = load_summary(grad_summary_ptr, head, D, True)
    grad_log_scale = tl.zeros([D], tl.float32)
    for block in range(BLOCKS):
        rows = first + block * BN + tl.arange(0, BN)
        inside = rows < M
        largest, unit_norm, powers_norm = load_statistics(statistics_ptr, rows, inside, M)
        factor = load_key_factor(weight_ptr, rows, inside, M, largest, unit_norm, powers_norm, HAS_WEIGHT)
        values = load_tile(v_ptr, rows, inside, stride_vn, channels) * factor[:, None]
        grad_powers = matmul(values, transposed_grad_S, PRECISION) + factor[:, None] * grad_s[None, :]
        positive, unit, powers = load_features(
            k_ptr, position_ptr, inverse_ptr, rows, inside, stride_kn, largest, H, head, POWER, D, True
        )
        grad_log_factor = tl.load(scratch_ptr + H * M + rows, mask=inside, other=0.0)
        grad_log_x, grad_k = feature_gradient(
            positive, unit, powers, grad_powers, grad_log_factor, unit_norm, powers_norm, POWER
        )
        grad_log_scale += tl.sum(grad_log_x, 0)
        store_tile(grad_k_ptr, rows, inside, stride_gn, channels, grad_k)
    tl.store(log_scale_ptr + channels, grad_log_scale)


@triton.jit
def filter_gradient(
    v_ptr, grad_ptr, filter_ptr, first, stride_vn, M, H, head, height, width, prefix, BLOCKS,
    D: tl.constexpr, BN: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Partial gradient of the filter (SIDE * SIDE, C) of one head and chunk.

    One row of the filter at a time: its sums remain (BN, D), in registers, until the end of the chunk. The tap at (dy, dx)
    multiplies v at a token with the gradient at the token shifted by (-dy, -dx).
    """
    C = H * D
    channels = head * D + tl.arange(0, D)
    for i in range(SIDE):
        dy = SIDE // 2 - i
        far_left = tl.zeros([BN, D], tl.float32)
        left = tl.zeros([BN, D], tl.float32)
        middle = tl.zeros([BN, D], tl.float32)
        right = tl.zeros([BN, D], tl.float32)
        far_right = tl.zeros([BN, D], tl.float32)
        for block in range(BLOCKS):
            rows = first + block * BN + tl.arange(0, BN)
            y = (rows - prefix) // width
            x = rows - prefix - y * width
            inside = (rows < M) & (rows >= prefix) & (y + dy >= 0) & (y + dy < height)
            values = load_tile(v_ptr, rows, inside, stride_vn, channels)
            shifted = rows + dy * width
            left += values * load_tile(grad_ptr, shifted + 1, inside & (x + 1 < width), C, channels)
            middle += values * load_tile(grad_ptr, shifted, inside, C, channels)
            right += values * load_tile(grad_ptr, shifted - 1, inside & (x >= 1), C, channels)
            if SIDE == 5:
                far_left += values * load_tile(grad_ptr, shifted + 2, inside & (x + 2 < width), C, channels)
                far_right += values * load_tile(grad_ptr, shifted - 2, inside & (x >= 2), C, channels)
        centre = filter_ptr + (i * SIDE + SIDE // 2) * C + channels
        tl.store(centre - C, tl.sum(left, 0))
        tl.store(centre, tl.sum(middle, 0))
        tl.store(centre + C, tl.sum(right, 0))
        if SIDE == 5:
            tl.store(centre - 2 * C, tl.sum(far_left, 0))
            tl.store(centre + 2 * C, tl.sum(far_right, 0))


@triton.jit(do_not_specialize=COUNTS)
def key_gradient_kernel(
    k_ptr, v_ptr, grad_ptr, position_ptr, inverse_ptr, weight_ptr, grad_summary_ptr, filter_ptr, statistics_ptr, scratch_ptr,
    log_scale_ptr, grad_filter_ptr, grad_k_ptr, grad_v_ptr,
    stride_kb, stride_kn, stride_vb, stride_vn, stride_gb, stride_gn, M, H, height, width, prefix, BLOCKS, num_chunks,
    POWER: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, SIDE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v, and partial gradients of log(1 / scale) and of the filter.

    With e = [c v, c] for the weighted c: grad_e = u [grad_S, grad_s], grad_u = e [grad_S, grad_s]^T,
    grad_log_c = sum(grad_e * e) over the heads, and grad_v = c times the first D columns of grad_e, plus the transposed
    convolution of the gradient.

    scratch: (B, H + 1, M), terms of grad_log_c and their sum. log_scale: (B, chunks, C). grad_filter: (B, chunks,
    SIDE * SIDE, C).
    """
    program = tl.program_id(0).to(tl.int64)
    image = program // num_chunks
    first = (tl.program_id(0) % num_chunks) * BLOCKS * BN
    k_ptr += image * stride_kb
    v_ptr += image * stride_vb
    grad_k_ptr += image * stride_gb
    grad_v_ptr += image * stride_gb
    grad_ptr += image * M * H * D
    weight_ptr += image * M
    grad_summary_ptr += image * H * D * (D + 1)
    statistics_ptr += image * 3 * M
    scratch_ptr += image * (H + 1) * M
    for head in range(H):
        value_gradient(
            k_ptr, v_ptr, grad_ptr, position_ptr, inverse_ptr, weight_ptr, grad_summary_ptr, filter_ptr, statistics_ptr,
            scratch_ptr, grad_v_ptr, first, stride_kn, stride_vn, stride_gn, M, H, head, height, width, prefix, BLOCKS,
            POWER, D, BN, SIDE, HAS_WEIGHT, PRECISION,
        )  # fmt: skip
    add_heads(scratch_ptr, first, M, H, BLOCKS, BN)
    for head in range(H):
        key_gradient(
            k_ptr, v_ptr, position_ptr, inverse_ptr, weight_ptr, grad_summary_ptr, statistics_ptr, scratch_ptr,
            log_scale_ptr + program * H * D, grad_k_ptr, first, stride_kn, stride_vn, stride_gn, M, H, head, BLOCKS,
            POWER, D, BN, HAS_WEIGHT, PRECISION,
        )  # fmt: skip
    if SIDE > 0:
        for head in range(H):
            filter_gradient(
                v_ptr, grad_ptr, grad_filter_ptr + program * SIDE * SIDE * H * D, first, stride_vn, M, H, head,
                height, width, prefix, BLOCKS, D, BN, SIDE,
            )  # fmt: skip
