"""The LSH operations as Triton kernels.

Sums over a bucket's rows are gathers through `order`, without float atomics. Buckets are very uneven, since frequent tokens
make large ones, so those of more than CHUNK rows are summed in pieces: piece 2j + s holds the rows of one large bucket within
places [j * CHUNK, (j + 1) * CHUNK), and as no two large buckets fit into one such stretch beside each other, only that of
its first row (s = 0) and that of its last row (s = 1) can have a piece there. No table of pieces is needed.

Rows are int64 wherever they are multiplied by a stride.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes_kernel(  # type: ignore[no-untyped-def]
    x, rotation, codes, T, D, H, stride_x,
    WIDTH: tl.constexpr, HASHES: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Codes of TOKENS tokens in HASHES hashes; their projections never leave the registers."""
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    h = tl.program_id(1) * HASHES + tl.arange(0, HASHES)
    n = tl.program_id(1) * HASHES * WIDTH + tl.arange(0, HASHES * WIDTH)
    along = tl.zeros((TOKENS, HASHES * WIDTH), tl.float32)
    for first in range(0, D, DEPTH):
        d = first + tl.arange(0, DEPTH)
        x_tile = tl.load(x + t[:, None] * stride_x + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        axes = n.to(tl.int64)[None, :] * D + d[:, None]
        axes_tile = tl.load(rotation + axes, mask=(n < H * WIDTH)[None, :] & (d < D)[:, None], other=0.0)
        if UPCAST:
            x_tile, axes_tile = x_tile.to(tl.float32), axes_tile.to(tl.float32)
        along = tl.dot(x_tile, axes_tile, along, input_precision="ieee")
    along = tl.reshape(along, (TOKENS, HASHES, WIDTH))
    size = tl.abs(along)
    # no comparison would find a NaN
    size = tl.where(size == size, size, float("inf"))
    axis = tl.arange(0, WIDTH)[None, None, :]
    farthest = tl.min(tl.where(size == tl.max(size, 2)[:, :, None], axis, WIDTH), 2)
    negative = tl.sum(tl.where(axis == farthest[:, :, None], (along < 0).to(tl.int32), 0), 2)
    inside = (t < T)[:, None] & (h < H)[None, :]
    tl.store(codes + t[:, None] * H + h[None, :], (2 * farthest + negative).to(tl.int64), mask=inside)


@triton.jit
def _sum_rows(  # type: ignore[no-untyped-def]
    rows, order, weights, begin, end, d, D, stride,
    PER_ROW: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """WIDE [COLUMNS]: sum of columns d over places begin..end of `order`."""
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    for first in range(begin, end, ROWS):
        r = first + tl.arange(0, ROWS)
        choice = tl.load(order + r, mask=r < end, other=0)
        source = (choice // PER_ROW)[:, None] * stride + d[None, :]
        values = tl.load(rows + source, mask=(r < end)[:, None] & (d < D)[None, :], other=0.0).to(WIDE)
        if WEIGHTED:
            values *= tl.load(weights + choice, mask=r < end, other=0.0).to(WIDE)[:, None]
        total += values
    return tl.sum(total, 0)


@triton.jit
def _store_sum(  # type: ignore[no-untyped-def]
    total, size, b, d, out, scaled, factor, D, stride_factor, MEAN: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr
):
    """out[b] = total, or total / size; scaled[b] = -factor * total."""
    if MEAN:
        # the mean of one row is that row, whatever a division rounds to
        total = tl.where(size == 1, total, total / size.to(WIDE))
    tl.store(out + b * D + d, total.to(out.dtype.element_ty), mask=d < D)
    if SCALED:
        a = tl.load(factor + d * stride_factor, mask=d < D, other=0.0).to(WIDE)
        tl.store(scaled + b * D + d, (-a * total).to(scaled.dtype.element_ty), mask=d < D)


@triton.jit
def segment_kernel(  # type: ignore[no-untyped-def]
    rows, order, weights, starts, factor, out, scaled, D, stride, stride_factor,
    PER_ROW: tl.constexpr, WEIGHTED: tl.constexpr, MEAN: tl.constexpr, SCALED: tl.constexpr, CHUNK: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[b] = sum or mean over the rows of bucket b, if these are at most CHUNK."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(starts + b), tl.load(starts + b + 1)
    if end - begin <= CHUNK:
        total = _sum_rows(rows, order, weights, begin, end, d, D, stride, PER_ROW, WEIGHTED, WIDE, ROWS, COLUMNS)
        _store_sum(total, end - begin, b, d, out, scaled, factor, D, stride_factor, MEAN, SCALED, WIDE)


@triton.jit
def piece_kernel(  # type: ignore[no-untyped-def]
    rows, order, weights, bucket, starts, pieces, N, D, stride,
    PER_ROW: tl.constexpr, WEIGHTED: tl.constexpr, CHUNK: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """pieces[i] = sum over the rows of piece i, if it belongs to a bucket of more than CHUNK rows."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    low = i // 2 * CHUNK
    high = tl.minimum(low + CHUNK, N)
    at_low, at_high = tl.load(bucket + tl.load(order + low)), tl.load(bucket + tl.load(order + high - 1))
    b = tl.where(i % 2 == 0, at_low, at_high)
    begin, end = tl.load(starts + b), tl.load(starts + b + 1)
    if (end - begin > CHUNK) & ((i % 2 == 0) | (at_low != at_high)):
        begin, end = tl.maximum(begin, low), tl.minimum(end, high)
        total = _sum_rows(rows, order, weights, begin, end, d, D, stride, PER_ROW, WEIGHTED, WIDE, ROWS, COLUMNS)
        tl.store(pieces + i * D + d, total, mask=d < D)


@triton.jit
def join_kernel(  # type: ignore[no-untyped-def]
    order, bucket, starts, pieces, factor, out, scaled, N, D, stride_factor,
    MEAN: tl.constexpr, SCALED: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the pieces of the bucket of more than CHUNK rows that begins in stretch j, in order."""
    j = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # a large bucket that begins here reaches the last place of the stretch
    b = tl.load(bucket + tl.load(order + tl.minimum((j + 1) * CHUNK, N) - 1))
    begin, end = tl.load(starts + b), tl.load(starts + b + 1)
    if (end - begin > CHUNK) & (begin >= j * CHUNK):
        total = tl.zeros((COLUMNS,), WIDE)
        for i in range(j, (end - 1) // CHUNK + 1):
            piece = tl.where(i * CHUNK < begin, 2 * i + 1, 2 * i)
            total += tl.load(pieces + piece * D + d, mask=d < D, other=0.0)
        _store_sum(total, end - begin, b, d, out, scaled, factor, D, stride_factor, MEAN, SCALED, WIDE)


@triton.jit
def _kept(kept, choice, mask, HAS_KEPT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a choice travels. Rows of one that does not hold no meaning: they are not read, a product would keep their NaN."""
    if HAS_KEPT:
        mask = mask & (tl.load(kept + choice, mask=mask, other=0) != 0)
    return mask


@triton.jit
def restore_kernel(  # type: ignore[no-untyped-def]
    expert, centroids, x, weights, bucket, kept, factor, out, T, D, stride_e, stride_c, stride_x, stride_factor,
    K: tl.constexpr, HAS_KEPT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] = a x[t] (sum of w) + sum over kept k of w (expert - a centroid)[bucket[t, k]]."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for first in range(0, D, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        inside = (t < T)[:, None] & (d < D)[None, :]
        a = tl.load(factor + d * stride_factor, mask=d < D, other=0.0).to(WIDE)[None, :]
        total = tl.zeros((ROWS, COLUMNS), WIDE)
        weight_sum = tl.zeros((ROWS,), WIDE)
        moving = tl.zeros((ROWS,), tl.int32)
        for k in tl.static_range(K):
            here = _kept(kept, t * K + k, t < T, HAS_KEPT)
            b = tl.load(bucket + t * K + k, mask=here, other=0)[:, None]
            w = tl.load(weights + t * K + k, mask=here, other=0.0).to(WIDE)
            read = here[:, None] & inside
            value = tl.load(expert + b * stride_e + d[None, :], mask=read, other=0.0).to(WIDE)
            value -= a * tl.load(centroids + b * stride_c + d[None, :], mask=read, other=0.0).to(WIDE)
            total += w[:, None] * value
            weight_sum += w
            moving = tl.where(here, 1, moving)
        own = tl.load(x + t[:, None] * stride_x + d[None, :], mask=inside & (moving != 0)[:, None], other=0.0).to(WIDE)
        total += a * own * weight_sum[:, None]
        tl.store(out + t[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    left, expert, centroids, x, bucket, kept, factor, out, R, D, stride_l, stride_e, stride_c, stride_x, stride_factor,
    K: tl.constexpr, LEFT: tl.constexpr, HAS_EXPERT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_KEPT: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t, k] = <left, expert + a (x - centroid)>, 0 where not kept; a = 1 without experts.

    LEFT says what stands at the left: a row per "token", one per "bucket", or the "residual" x - centroid itself.
    """
    choice = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t = choice // K
    here = _kept(kept, choice, choice < R, HAS_KEPT)
    b = tl.load(bucket + choice, mask=here, other=0)
    product = tl.zeros((ROWS, COLUMNS), WIDE)
    for first in range(0, D, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        read = here[:, None] & (d < D)[None, :]
        value = tl.zeros((ROWS, COLUMNS), WIDE)
        if HAS_RESIDUAL:
            value = tl.load(x + t[:, None] * stride_x + d[None, :], mask=read, other=0.0).to(WIDE)
            value -= tl.load(centroids + b[:, None] * stride_c + d[None, :], mask=read, other=0.0).to(WIDE)
        if LEFT == "residual":
            other = value
        else:
            row = t if LEFT == "token" else b
            other = tl.load(left + row[:, None] * stride_l + d[None, :], mask=read, other=0.0).to(WIDE)
        if HAS_EXPERT:
            value *= tl.load(factor + d * stride_factor, mask=d < D, other=0.0).to(WIDE)[None, :]
            value += tl.load(expert + b[:, None] * stride_e + d[None, :], mask=read, other=0.0).to(WIDE)
        product += other * value
    tl.store(out + choice, tl.sum(product, 1), mask=choice < R)


@triton.jit
def residual_gradient_kernel(  # type: ignore[no-untyped-def]
    grad, centroids, x, weights, bucket, kept, factor, grad_x, partial,
    T, D, stride_g, stride_c, stride_x, stride_factor,
    K: tl.constexpr, HAS_KEPT: tl.constexpr, FOR_X: tl.constexpr, FOR_FACTOR: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x[t] = a grad[t] (sum of w), and this program's part of the gradient of a: sum of grad[t] w (x[t] - centroid)."""
    program = tl.program_id(0).to(tl.int64)
    t = program * ROWS + tl.arange(0, ROWS)
    for first in range(0, D, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        inside = (t < T)[:, None] & (d < D)[None, :]
        residual = tl.zeros((ROWS, COLUMNS), WIDE)
        weight_sum = tl.zeros((ROWS,), WIDE)
        moving = tl.zeros((ROWS,), tl.int32)
        own = tl.load(x + t[:, None] * stride_x + d[None, :], mask=inside, other=0.0).to(WIDE)
        for k in tl.static_range(K):
            here = _kept(kept, t * K + k, t < T, HAS_KEPT)
            w = tl.load(weights + t * K + k, mask=here, other=0.0).to(WIDE)
            if FOR_FACTOR:
                b = tl.load(bucket + t * K + k, mask=here, other=0)[:, None]
                read = here[:, None] & inside
                c = tl.load(centroids + b * stride_c + d[None, :], mask=read, other=0.0).to(WIDE)
                residual += tl.where(read, w[:, None] * (own - c), 0.0)
            weight_sum += w
            moving = tl.where(here, 1, moving)
        # a token of which nothing travels has no part in either, whatever it holds
        read = inside & (moving != 0)[:, None]
        upstream = tl.load(grad + t[:, None] * stride_g + d[None, :], mask=read, other=0.0).to(WIDE)
        if FOR_X:
            a = tl.load(factor + d * stride_factor, mask=d < D, other=0.0).to(WIDE)[None, :]
            grad_tile = (a * upstream * weight_sum[:, None]).to(grad_x.dtype.element_ty)
            tl.store(grad_x + t[:, None] * D + d[None, :], grad_tile, mask=inside)
        if FOR_FACTOR:
            tl.store(partial + program * D + d, tl.sum(upstream * residual, 0), mask=d < D)
