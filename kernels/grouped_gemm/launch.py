"""Launches of the ragged products: tensors and flags in, kernels' arguments out. Used by grouped_gemm and moe_mlp."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..triton_support import cdiv, interpreting, next_power_of_2, row_major, wide_dtype
from .tiles import Tile, Tiles
from .triton_kernels import plan_kernel, rows_kernel, swiglu_grad_kernel, weight_grad_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP = 8
"""Row tiles that walk the columns together: with 128 rows and 2048 columns of 16 bits, 4 MiB of rows stay in L2."""


class Plan(NamedTuple):
    """Which expert and rows each tile of rows has, on the device; and, for gathered rows, the choices in expert order.

    tiles_3M: int32, expert (E: rows of no expert), first row and end row of each tile; starts_E1: int32, first row of each.
    order_R: flat (token, choice) index of each row, None for rows that already lie in expert order; choices: K.
    """

    tiles_3M: Tensor
    starts_E1: Tensor
    num_rows: int
    order_R: Tensor | None
    choices: int


class Weights(NamedTuple):
    """One [N, K] matrix per expert inside a tensor: strides in elements. `paired_*`: that axis is (F, gate or up)."""

    data: Tensor
    N: int
    K: int
    stride_n: int
    stride_k: int
    stride_half: int = 0
    paired_n: bool = False
    paired_k: bool = False


def make_plan(counts_E: Tensor, num_rows: int, tile_rows: int, order_R: Tensor | None = None, choices: int = 1) -> Plan:
    """One launch; the number of tiles is a bound, floor(R / tile) + E + 1, so nothing is read on the host."""
    E = counts_E.numel()
    bound = num_rows // tile_rows + E + 1
    tiles_3M = torch.empty(3, bound, dtype=torch.int32, device=counts_E.device)
    starts_E1 = torch.empty(E + 1, dtype=torch.int32, device=counts_E.device)
    padded = next_power_of_2(E + 1)
    block = max(8192 // padded, 16)
    flags = {"ROWS": tile_rows, "EXPERTS": padded, "BLOCK": block}
    plan_kernel[(cdiv(bound, block),)](counts_E.contiguous(), tiles_3M, starts_E1, num_rows, E, bound, **flags)
    return Plan(tiles_3M, starts_E1, num_rows, None if order_R is None else order_R.contiguous(), choices)


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def rows_times_weights(x: Tensor, w: Weights, plan: Plan, rows: int, tile: Tile, swiglu: bool = False) -> tuple[Tensor, Tensor]:
    """(y_RN, hidden): y[r] = w[e] x[source of r], and SwiGLU of its pairs where asked for (else y again)."""
    x = row_major(x)
    y = x.new_empty(plan.num_rows, w.N)
    hidden = x.new_empty(plan.num_rows, w.N // 2) if swiglu else y
    num_tiles = plan.tiles_3M.shape[1]
    rows_kernel[(num_tiles * cdiv(w.N, tile.cols),)](
        x,
        w.data,
        y,
        plan.tiles_3M,
        plan.tiles_3M if plan.order_R is None else plan.order_R,
        num_tiles,
        plan.starts_E1.numel() - 1,
        w.N,
        w.K,
        x.stride(0),
        w.N * w.K,
        w.stride_n,
        w.stride_k,
        w.stride_half,
        SWIGLU=swiglu,
        hidden_ptr=hidden,
        GATHER=plan.order_R is not None,
        CHOICES=plan.choices,
        PAIRED_N=w.paired_n,
        PAIRED_K=w.paired_k,
        EVEN_N=w.N % tile.cols == 0,
        EVEN_K=w.K % tile.depth == 0,
        ROWS=rows,
        COLS=tile.cols,
        DEPTH=tile.depth,
        GROUP=GROUP,
        UPCAST=interpreting(),
        ACC=_accumulator(x.dtype),
        **_options(tile),
    )
    return y, hidden


def swiglu_grad(
    grad: Tensor, w2_EDF: Tensor, pre_RG: Tensor, scale: Tensor | None, plan: Plan, rows: int, tile: Tile
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(grad_pre_RG, hidden_RF, grad_scale_R): see the kernel. With `scale` (flat, by choice) `grad` is by token."""
    grad = row_major(grad)
    _, D, F = w2_EDF.shape
    grad_pre, hidden = torch.empty_like(pre_RG), pre_RG.new_empty(plan.num_rows, F)
    cols = cdiv(F, tile.cols)
    parts = None if scale is None else pre_RG.new_empty(cols, plan.num_rows, dtype=wide_dtype(grad.dtype))
    num_tiles = plan.tiles_3M.shape[1]
    swiglu_grad_kernel[(num_tiles * cols,)](
        grad,
        w2_EDF,
        pre_RG,
        grad if scale is None else scale,
        grad_pre,
        hidden,
        hidden if parts is None else parts,
        plan.tiles_3M,
        plan.tiles_3M if plan.order_R is None else plan.order_R,
        num_tiles,
        plan.starts_E1.numel() - 1,
        plan.num_rows,
        F,
        D,
        grad.stride(0),
        D * F,
        F,
        SCALED=scale is not None,
        CHOICES=plan.choices,
        EVEN_N=F % tile.cols == 0,
        EVEN_K=D % tile.depth == 0,
        ROWS=rows,
        COLS=tile.cols,
        DEPTH=tile.depth,
        GROUP=GROUP,
        UPCAST=interpreting(),
        ACC=_accumulator(grad.dtype),
        **_options(tile),
    )
    # the tiles of columns in their order, whichever finished first
    return grad_pre, hidden, None if parts is None else parts.sum(0)


def weight_grad(a: Tensor, b: Tensor, out: Tensor, plan: Plan, tiles: Tiles, gather: str = "", paired: bool = False) -> Tensor:
    """out[e] = sum over its rows of a[r] outer b[r], written to `out` [E, M, N], or [E, 2, M / 2, N] where `a` is paired.

    gather: "a" or "b" is by token, and read through the plan's order.
    """
    a, b = row_major(a), row_major(b)
    M, N, tile, rows = a.shape[1], b.shape[1], tiles.weight_grad, tiles.weight_grad_rows
    if gather:
        # a step's rows are known only when its indices have arrived: of s steps in flight, every second one holds data
        tile = tile._replace(stages=2 * tile.stages - 1)
    weight_grad_kernel[(cdiv(M, rows) * cdiv(N, tile.cols), out.shape[0])](
        a,
        b,
        out,
        plan.starts_E1,
        plan.starts_E1 if plan.order_R is None else plan.order_R,
        M,
        N,
        a.stride(0),
        b.stride(0),
        M * N,
        N,
        M // 2 * N,
        GATHER_A=gather == "a",
        GATHER_B=gather == "b",
        CHOICES=plan.choices,
        PAIRED_M=paired,
        EVEN_M=M % rows == 0,
        EVEN_N=N % tile.cols == 0,
        ROWS=rows,
        COLS=tile.cols,
        DEPTH=tile.depth,
        GROUP=GROUP,
        UPCAST=interpreting(),
        ACC=_accumulator(a.dtype),
        **_options(tile),
    )
    return out
