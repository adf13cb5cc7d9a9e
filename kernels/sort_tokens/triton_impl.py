"""sort_tokens as a counting sort of three kernels: no comparison sort, no host synchronisation.

1. Each tile of choices is counted per expert (integers, so the order of the shared-memory atomics does not matter).
2. Per expert, the tiles' counts become exclusive prefix sums; the last one is the expert's total.
3. Each choice's row = first row of its expert + choices of that expert in earlier tiles + in earlier places of its own tile.

Choices that are not kept are a further bin behind all experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import cdiv, check_devices, next_power_of_2

MAX_EXPERTS = 4095
"""Bins of a tile's histogram (experts, one for what is not kept, rounded up to 4096) that fit shared memory beside the sums."""


@triton.jit
def _count_tiles(  # type: ignore[no-untyped-def]
    indices, kept, bins, tile_counts, R, E, tiles, stride_t, stride_k, kept_stride_t, kept_stride_k,
    K: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """bins[i] = expert of choice i, E where it is not kept; tile_counts[e, tile] = choices of bin e in this tile."""
    tile = tl.program_id(0)
    places = tile * BLOCK + tl.arange(0, BLOCK)
    inside = places < R
    t, k = (places // K).to(tl.int64), places % K
    found = tl.load(indices + t * stride_t + k * stride_k, mask=inside, other=0).to(tl.int32)
    # an index that names no expert must not write outside of the buffers
    travels = (found >= 0) & (found < E)
    if HAS_KEPT:
        travels = travels & (tl.load(kept + t * kept_stride_t + k * kept_stride_k, mask=inside, other=0) != 0)
    found = tl.where(travels, found, E)
    tl.store(bins + places, found, mask=inside)
    counts = tl.histogram(found, BINS, mask=inside)
    e = tl.arange(0, BINS).to(tl.int64)
    tl.store(tile_counts + e * tiles + tile, counts, mask=e <= E)


@triton.jit
def _scan_tiles(tile_counts, totals, counts_E, E, tiles, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per bin: its tiles' counts become exclusive sums in place, its total goes to totals and counts_E."""
    e = tl.program_id(0).to(tl.int64)
    before = tl.zeros((), tl.int32)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        counts = tl.load(tile_counts + e * tiles + tile, mask=tile < tiles, other=0)
        inclusive = tl.cumsum(counts, 0)
        tl.store(tile_counts + e * tiles + tile, before + inclusive - counts, mask=tile < tiles)
        before += tl.sum(counts, 0)
    tl.store(totals + e, before)
    tl.store(counts_E + e, before.to(tl.int64), mask=e < E)


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    bins, tile_counts, totals, order, row, R, E, tiles, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr
):
    """The row of each choice of this tile, and the choice of each of these rows."""
    tile = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    places = tile * BLOCK + lane
    inside = places < R
    mine = tl.load(bins + places, mask=inside, other=0)
    rank = tl.zeros((BLOCK,), tl.int32)
    # equal bins at earlier places, by comparison with the tile's places in chunks: stable, and free of E in cost
    for first in range(0, BLOCK, CHUNK):
        other = first + tl.arange(0, CHUNK)
        theirs = tl.load(bins + tile * BLOCK + other, mask=tile * BLOCK + other < R, other=-1)
        rank += tl.sum(((mine[:, None] == theirs[None, :]) & (other[None, :] < lane[:, None])).to(tl.int32), 1)
    e = tl.arange(0, BINS)
    totals_e = tl.load(totals + e, mask=e <= E, other=0)
    start = tl.gather(tl.cumsum(totals_e, 0) - totals_e, mine, 0)
    earlier = tl.load(tile_counts + mine.to(tl.int64) * tiles + tile, mask=inside, other=0)
    to = (start + earlier + rank).to(tl.int64)
    tl.store(order + to, places.to(tl.int64), mask=inside)
    tl.store(row + places, to, mask=inside)


def _tile_rows(num_choices: int) -> int:
    """Choices per program: ranking costs its square, scanning the number of tiles; 256 keeps ~1000 tiles at 2^18 choices."""
    return 256 if num_choices <= 1 << 18 else 512


def _check(indices_TK: Tensor, num_experts: int, kept_TK: Tensor | None) -> None:
    if indices_TK.ndim != 2 or indices_TK.dtype != torch.int64:
        raise ValueError(f"sort_tokens: indices are {indices_TK.dtype} {tuple(indices_TK.shape)}; need int64 [T, K]")
    if kept_TK is not None and (kept_TK.dtype != torch.bool or kept_TK.shape != indices_TK.shape):
        raise ValueError(
            f"sort_tokens: the mask is {kept_TK.dtype} {tuple(kept_TK.shape)}; "
            f"need bool of the indices' shape {tuple(indices_TK.shape)}"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"sort_tokens: {num_experts} experts; the Triton kernels sort 1 to {MAX_EXPERTS}, use backend 'torch'")
    if indices_TK.numel() > 1 << 30:
        raise ValueError(f"sort_tokens: {indices_TK.numel()} choices; the Triton kernels number at most {1 << 30}")
    check_devices("sort_tokens", indices_TK=indices_TK, kept_TK=kept_TK)


def _sort(
    indices_TK: Tensor, num_experts: int, kept_TK: Tensor | None, block: int, scan: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_tokens` with `block` choices per program and `scan` tiles per step of the prefix sums (powers of two)."""
    (T, K), device = indices_TK.shape, indices_TK.device
    R, tiles = T * K, cdiv(T * K, block)
    order_R = torch.empty(R, dtype=torch.int64, device=device)
    row_TK = torch.empty(T, K, dtype=torch.int64, device=device)
    counts_E = torch.empty(num_experts, dtype=torch.int64, device=device)
    if R == 0:
        return order_R, row_TK, counts_E.zero_()
    bins_R, tile_counts, totals = (
        torch.empty(shape, dtype=torch.int32, device=device) for shape in (R, (num_experts + 1, tiles), num_experts + 1)
    )
    kept = indices_TK if kept_TK is None else kept_TK
    sizes = (R, num_experts, tiles)
    flags: dict[str, Any] = {"BLOCK": block, "BINS": next_power_of_2(num_experts + 1)}
    _count_tiles[(tiles,)](
        indices_TK, kept, bins_R, tile_counts, *sizes, *indices_TK.stride(), *kept.stride(),
        K=K, HAS_KEPT=kept_TK is not None, **flags,
    )  # fmt: skip
    _scan_tiles[(num_experts + 1,)](tile_counts, totals, counts_E, num_experts, tiles, BLOCK=min(scan, next_power_of_2(tiles)))
    # 32 comparisons per thread and step: more of them at once would take registers and win nothing
    chunk = min(block, 8192 // block)
    _place[(tiles,)](bins_R, tile_counts, totals, order_R, row_TK, *sizes, CHUNK=chunk, num_warps=8, **flags)
    return order_R, row_TK, counts_E


def sort_tokens(indices_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As the public function. An index outside [0, num_experts) is sorted like one that is not kept.

    Raises:
        ValueError: wrong shapes, dtypes or devices, more than MAX_EXPERTS experts.
    """
    _check(indices_TK, num_experts, kept_TK)
    return _sort(indices_TK, num_experts, kept_TK, _tile_rows(indices_TK.numel()))
