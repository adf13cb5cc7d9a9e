"""The ragged products as Triton kernels.

Common to all: rows lie sorted by expert, and a table of tiles (`plan_kernel`) names the expert and rows of each tile, so no
tile mixes experts and nothing is padded in memory. Rows behind the last expert's are one more segment, whose products have
no terms: they become zeros in the same launch.

Sums are formed in ACC: fp32, and fp64 for fp64, which only the interpreter runs.

Two axes are *paired*: index 2f + h stands for f of half h, h = 0 the gate and 1 the up projection. The weights keep their
[E, 2, F, D] layout, since only the addresses of whole rows of D elements change, and an output tile holds gate and up of the
same f next to each other: the activation needs no second accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plan_kernel(  # type: ignore[no-untyped-def]
    counts_ptr,
    tiles_ptr,
    starts_ptr,
    num_rows,
    num_experts,
    num_tiles,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tiles[0..2, i] = expert, first row, end row of tile i (first = end: no such tile); starts[e], e up to and including E.

    The end of the last expert is cut to the number of rows, so wrong counts cannot lead outside of the tensors.
    """
    e = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + e, mask=e < num_experts, other=0).to(tl.int32)
    ends = tl.cumsum(counts, 0)
    starts = tl.minimum(ends - counts, num_rows)
    ends = tl.where(e < num_experts, tl.minimum(ends, num_rows), num_rows)
    tiles = (ends - starts + ROWS - 1) // ROWS
    tiles = tl.where(e <= num_experts, tiles, 0)
    last_tiles = tl.cumsum(tiles, 0)
    first_tiles = last_tiles - tiles
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.sum((last_tiles[None, :] <= i[:, None]).to(tl.int32), 1)
    mine = e[None, :] == expert[:, None]
    row = tl.sum(tl.where(mine, starts[None, :] + (i[:, None] - first_tiles[None, :]) * ROWS, 0), 1)
    end = tl.minimum(row + ROWS, tl.sum(tl.where(mine, ends[None, :], 0), 1))
    inside = i < num_tiles
    tl.store(tiles_ptr + i, expert, mask=inside)
    tl.store(tiles_ptr + num_tiles + i, row, mask=inside)
    tl.store(tiles_ptr + 2 * num_tiles + i, end, mask=inside)
    tl.store(starts_ptr + e, starts, mask=(e <= num_experts) & (tl.program_id(0) == 0))


@triton.jit
def tile_position(num_tiles, num_cols, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(tile of rows, tile of columns): GROUP row tiles walk the columns together, so their operands stay in L2."""
    pid = tl.program_id(0)
    first = pid // (GROUP * num_cols) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = pid % (GROUP * num_cols)
    return first + within % size, within // size


@triton.jit
def token_of(choice, CHOICES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Token of a flat (token, choice) index: by a constant and in 32 unsigned bits, since the loops do it for every row."""
    return (choice.to(tl.uint32) // CHOICES).to(tl.int64)


@triton.jit
def axis_offsets(i, stride, stride_half, PAIRED: tl.constexpr):  # type: ignore[no-untyped-def]
    i = i.to(tl.int64)
    if PAIRED:
        return i // 2 * stride + i % 2 * stride_half
    else:
        return i * stride


@triton.jit
def tile_product(  # type: ignore[no-untyped-def]
    x_ptrs,
    w_ptrs,
    n,
    N,
    K,
    w_step,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """ACC [ROWS, COLS] = sum over k < K of x[ROWS, k] w[k, COLS], from pointers to the first step's tiles."""
    acc = tl.zeros((ROWS, COLS), ACC)
    k = tl.arange(0, DEPTH)
    for k0 in range(0, K, DEPTH):
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - k0, other=0.0)
        if EVEN_N and EVEN_K:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(k[:, None] < K - k0) & (n[None, :] < N), other=0.0)
        if UPCAST:
            x, w = x.to(ACC), w.to(ACC)
        acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=ACC)
        x_ptrs += DEPTH
        w_ptrs += w_step
    return acc


@triton.jit
def rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    y_ptr,
    tiles_ptr,
    order_ptr,
    num_tiles,
    num_experts,
    N,
    K,
    stride_x,
    stride_w,
    stride_wn,
    stride_wk,
    stride_half,
    SWIGLU: tl.constexpr,
    hidden_ptr,
    GATHER: tl.constexpr,
    CHOICES: tl.constexpr,
    PAIRED_N: tl.constexpr,
    PAIRED_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """y[r, n] = sum over k of x[source of r, k] w[expert of r, n, k]; SWIGLU: hidden[r, f] = silu(y[r, 2f]) y[r, 2f + 1] too."""
    tile, col = tile_position(num_tiles, tl.cdiv(N, COLS), GROUP)
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + num_tiles + tile)
    end = tl.load(tiles_ptr + 2 * num_tiles + tile)
    if first < end:
        r = first + tl.arange(0, ROWS)
        # rows past the end read the last row again: their products are not stored, and the loop needs no mask for them
        source = tl.minimum(r, end - 1).to(tl.int64)
        if GATHER:
            source = token_of(tl.load(order_ptr + source), CHOICES)
        n = col * COLS + tl.arange(0, COLS)
        k = tl.arange(0, DEPTH)
        x_ptrs = x_ptr + source[:, None] * stride_x + k[None, :]
        w_ptrs = w_ptr + expert.to(tl.int64) * stride_w + axis_offsets(n, stride_wn, stride_half, PAIRED_N)[None, :]
        w_ptrs += axis_offsets(k, stride_wk, stride_half, PAIRED_K)[:, None]
        w_step = stride_wk * (DEPTH // 2 if PAIRED_K else DEPTH)
        K = tl.where(expert < num_experts, K, 0)
        acc = tile_product(x_ptrs, w_ptrs, n, N, K, w_step, ROWS, COLS, DEPTH, EVEN_N, EVEN_K, UPCAST, ACC)
        r64 = r.to(tl.int64)
        inside = r[:, None] < end
        tl.store(y_ptr + r64[:, None] * N + n[None, :], acc, mask=inside & (n[None, :] < N))
        if SWIGLU:
            gate, up = tl.split(tl.reshape(acc, (ROWS, COLS // 2, 2)))
            f = col * (COLS // 2) + tl.arange(0, COLS // 2)
            hidden = gate * tl.sigmoid(gate) * up
            tl.store(hidden_ptr + r64[:, None] * (N // 2) + f[None, :], hidden, mask=inside & (f[None, :] < N // 2))


@triton.jit
def halves(x, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def eighth(x, i: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns i * COLS / 8 to (i + 1) * COLS / 8."""
    x = halves(x, ROWS, COLS)[i // 4]
    x = halves(x, ROWS, COLS // 2)[i // 2 % 2]
    return halves(x, ROWS, COLS // 4)[i % 2]


@triton.jit
def swiglu_grad_part(  # type: ignore[no-untyped-def]
    d,
    scale_ptr,
    order_ptr,
    weighted,
    pre_ptr,
    grad_pre_ptr,
    hidden_ptr,
    r,
    end,
    first_f,
    N,
    SCALED: tl.constexpr,
    EVEN_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The epilogue of `swiglu_grad_kernel` for hidden columns first_f to first_f + COLS; returns sum over f of d * hidden."""
    r = r.to(tl.int64)
    f = first_f + tl.arange(0, COLS)
    g = 2 * first_f + tl.arange(0, COLS * 2)
    pairs = r[:, None] * (2 * N) + g[None, :]
    inside = r[:, None] < end
    if EVEN_N:
        f_inside, g_inside = inside, inside
    else:
        f_inside, g_inside = inside & (f[None, :] < N), inside & (g[None, :] < 2 * N)
    pre = tl.load(pre_ptr + pairs, mask=g_inside, other=0.0).to(d.dtype)
    gate, up = tl.split(tl.reshape(pre, (ROWS, COLS, 2)))
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    total = tl.sum(d * hidden, 1)
    if SCALED:
        # read for each piece, so that they take no registers between; rows of no expert may have any weight, and stay zero
        choice = tl.load(order_ptr + r, mask=r < end, other=0)
        scale = tl.load(scale_ptr + choice, mask=(r < end) & weighted, other=0.0).to(d.dtype)
        d *= scale[:, None]
        hidden *= scale[:, None]
    tl.store(hidden_ptr + r[:, None] * N + f[None, :], hidden, mask=f_inside)
    grad_gate = d * up * (sigmoid + silu * (1.0 - sigmoid))
    grad_pre = tl.reshape(tl.join(grad_gate, d * silu), (ROWS, COLS * 2))
    tl.store(grad_pre_ptr + pairs, grad_pre, mask=g_inside)
    return total


@triton.jit
def swiglu_grad_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    w_ptr,
    pre_ptr,
    scale_ptr,
    grad_pre_ptr,
    hidden_ptr,
    grad_scale_ptr,
    tiles_ptr,
    order_ptr,
    num_tiles,
    num_experts,
    num_rows,
    N,
    K,
    stride_grad,
    stride_w,
    stride_wk,
    SCALED: tl.constexpr,
    CHOICES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """From the gradient of the output to that of the pre-activation, in one pass over the pre-activation.

    d[r, f] = sum over k of grad[r, k] w[e, k, f]; hidden = silu(gate) up is formed again. Unscaled: grad_pre = d * hidden'.
    SCALED, for rows weighted and summed by token: grad is read at the row's token, s[r] = scale at the row's choice, grad_pre =
    s d hidden', stored is s * hidden (for the weight gradient); the gradient of s, sum over f of d * hidden, goes to
    grad_scale[column tile, r]: one number per tile of columns, so that no order is left to chance.
    """
    tile, col = tile_position(num_tiles, tl.cdiv(N, COLS), GROUP)
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + num_tiles + tile)
    end = tl.load(tiles_ptr + 2 * num_tiles + tile)
    if first < end:
        r, n, k = first + tl.arange(0, ROWS), col * COLS + tl.arange(0, COLS), tl.arange(0, DEPTH)
        source = tl.minimum(r, end - 1).to(tl.int64)
        if SCALED:
            source = token_of(tl.load(order_ptr + source), CHOICES)
        grad_ptrs = grad_ptr + source[:, None] * stride_grad + k[None, :]
        w_ptrs = w_ptr + expert.to(tl.int64) * stride_w + n[None, :] + k.to(tl.int64)[:, None] * stride_wk
        K = tl.where(expert < num_experts, K, 0)
        d = tile_product(grad_ptrs, w_ptrs, n, N, K, DEPTH * stride_wk, ROWS, COLS, DEPTH, EVEN_N, EVEN_K, UPCAST, ACC)
        # piece by piece: a whole tile's gate, up projection and gradients do not fit registers
        total = tl.zeros((ROWS,), ACC)
        for i in tl.static_range(8):
            piece = eighth(d, i, ROWS, COLS)
            total += swiglu_grad_part(
                piece, scale_ptr, order_ptr, expert < num_experts, pre_ptr, grad_pre_ptr, hidden_ptr,
                r, end, col * COLS + i * (COLS // 8), N, SCALED, EVEN_N, ROWS, COLS // 8,
            )  # fmt: skip
        if SCALED:
            tl.store(grad_scale_ptr + col.to(tl.int64) * num_rows + r, total, mask=r < end)


@triton.jit
def weight_grad_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    out_ptr,
    starts_ptr,
    order_ptr,
    M,
    N,
    stride_a,
    stride_b,
    stride_out,
    stride_m,
    stride_half,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    CHOICES: tl.constexpr,
    PAIRED_M: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[e, m, n] = sum over the rows r of expert e of a[source of r, m] b[source of r, n]; zeros for an empty expert."""
    expert = tl.program_id(1)
    row_tile, col = tile_position(tl.cdiv(M, ROWS), tl.cdiv(N, COLS), GROUP)
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    m = row_tile * ROWS + tl.arange(0, ROWS)
    n = col * COLS + tl.arange(0, COLS)
    acc = tl.zeros((ROWS, COLS), ACC)
    for r0 in range(start, end, DEPTH):
        r = r0 + tl.arange(0, DEPTH)
        inside = r < end
        r = r.to(tl.int64)
        if GATHER_A or GATHER_B:
            source = token_of(tl.load(order_ptr + r, mask=inside, other=0), CHOICES)
        row_a = source if GATHER_A else r
        row_b = source if GATHER_B else r
        # both operands are masked: the next expert's rows may hold infinities, which a zero on one side would turn into NaN
        mask_a = inside[:, None] if EVEN_M else inside[:, None] & (m[None, :] < M)
        mask_b = inside[:, None] if EVEN_N else inside[:, None] & (n[None, :] < N)
        a = tl.load(a_ptr + row_a[:, None] * stride_a + m[None, :], mask=mask_a, other=0.0)
        b = tl.load(b_ptr + row_b[:, None] * stride_b + n[None, :], mask=mask_b, other=0.0)
        if UPCAST:
            a, b = a.to(ACC), b.to(ACC)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee", out_dtype=ACC)
    out_ptrs = out_ptr + expert.to(tl.int64) * stride_out + axis_offsets(m, stride_m, stride_half, PAIRED_M)[:, None] + n[None, :]
    tl.store(out_ptrs, acc, mask=(m[:, None] < M) & (n[None, :] < N))
