"""Floating-point operations and bytes of a layer's parts: what must be computed and moved, whoever does it.

Bytes assume that each tensor crosses the memory bus once; `size` is bytes per element (2 for bf16). With SwiGLU the up
projection is twice F wide. The bounds of time are derived figures, max(operations / rate, bytes / rate), nothing overlapped.
"""

from __future__ import annotations

from .shapes import Pass, Shape

FLOPS_PER_RHF = (("fwd", 6), ("bwd", 12), ("fwd+bwd", 18))


def layer_flops(shape: Shape, part: Pass) -> float:
    """Of the experts of one layer: 6 R H F forward, 12 backward. The router and the sums over k are not counted."""
    return float(dict(FLOPS_PER_RHF)[part] * shape.R * shape.H * shape.F)


def up_flops(shape: Shape) -> float:
    """Rows times gate and up projections: 4 R H F; so much too for their weights' gradient."""
    return 4.0 * shape.R * shape.H * shape.F


def down_flops(shape: Shape) -> float:
    """Hidden rows times the down projection: 2 R H F; so much too for its weights' gradient."""
    return 2.0 * shape.R * shape.H * shape.F


def up_bytes(shape: Shape, size: int = 2) -> float:
    """Tokens and weights read; pre-activation (2 F wide, kept for backward) and hidden rows written."""
    T, R, H, F, E = shape.T, shape.R, shape.H, shape.F, shape.E
    return float(size * (T * H + 2 * E * H * F + 2 * R * F + R * F))


def down_bytes(shape: Shape, size: int = 2) -> float:
    """Hidden rows and weights read, outputs by row written."""
    R, H, F, E = shape.R, shape.H, shape.F, shape.E
    return float(size * (R * F + E * H * F + R * H))


def up_weight_grad_bytes(shape: Shape, size: int = 2) -> float:
    """Tokens and the pre-activation's gradient read, the gradient of the weights written."""
    T, R, H, F, E = shape.T, shape.R, shape.H, shape.F, shape.E
    return float(size * (T * H + 2 * R * F + 2 * E * H * F))


def permute_bytes(shape: Shape, size: int = 2) -> float:
    """Tokens read (once: their other reads hit the cache), rows written."""
    return float(size * (shape.T + shape.R) * shape.H)


def combine_bytes(shape: Shape, size: int = 2) -> float:
    """Rows read, tokens written, and 8 bytes of row number and weight for each row."""
    return float(size * (shape.T + shape.R) * shape.H + 8 * shape.R)


def saved_minimum_bytes(shape: Shape, size: int = 2) -> float:
    """Kept for backward at the least, without doing a product again: tokens and pre-activation."""
    return float(size * (shape.T * shape.H + 2 * shape.R * shape.F))


def saved_scatter_bytes(shape: Shape, size: int = 2) -> float:
    """Kept for backward in the manner of ScatterMoE (arXiv 2403.08245): also the rows in expert order and their outputs."""
    return saved_minimum_bytes(shape, size) + float(size * 2 * shape.R * shape.H)


def bound_ms(flops: float, bytes_: float, flops_per_s: float, bytes_per_s: float) -> float:
    """Milliseconds below which no kernel gets: the slower of computing and moving."""
    return 1e3 * max(flops / flops_per_s, bytes_ / bytes_per_s)


def padding_share(shape: Shape, tile_rows: int = 128) -> float:
    """Rows that fill up the last tile of each expert, half a tile on average, over all rows."""
    return shape.E * tile_rows / 2 / shape.R
