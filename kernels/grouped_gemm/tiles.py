"""Sizes of the tiles that the ragged products are cut into: a fixed table, so that no launch measures or guesses.

Every kernel below was compiled ahead of time for sm_90 (tests/aot/resources.json lists registers and shared memory); what
decides:

* A 128x128 tile reads as many bytes of shared memory per multiplication as the tensor cores can be fed with; 128x256 tiles
  halve that. They take one block per multiprocessor, 128x128 ones two, of which one stores while the other multiplies.
* Plain products and weight gradients have a light epilogue: wide tiles. The SwiGLU stores as much again as it multiplies:
  128 columns, 128 registers, two blocks. Its gradient holds gate, up projection and their gradients beside the product:
  128 columns walked in eighths, 122 registers; with router weights about 140 and one block, since a cap of 128 spills.
* Tiles of 64 rows where an expert has few rows on average: half of a larger tile would be padding.
* fp32 multiplies without tensor cores (exact products, for tests and comparisons): small tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One kernel's launch: columns of the output, depth of a step along the summed axis, warps, and steps in flight."""

    cols: int
    depth: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles of all kernels of one call; they share `rows`, so that one tile plan serves them all.

    plain: rows times weights. swiglu: the same with SwiGLU behind it, `cols` counts gate and up. swiglu_grad: rows times
    weights with the gradient of SwiGLU behind it, `cols` counts hidden columns. weight_grad: sum over an expert's rows;
    its output tile has `weight_grad_rows` rows, `depth` is rows of an expert.
    """

    rows: int
    plain: Tile
    swiglu: Tile
    swiglu_grad: Tile
    weight_grad: Tile
    weight_grad_rows: int


FP32 = Tiles(64, Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), 64)
LARGE = Tiles(128, Tile(256, 64, 8, 4), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(256, 64, 8, 4), 128)
SMALL = Tiles(64, Tile(128, 64, 4, 4), Tile(128, 64, 4, 4), Tile(64, 64, 4, 4), Tile(128, 64, 8, 3), 128)


def choose_tiles(dtype: torch.dtype, rows: int, experts: int) -> Tiles:
    """The table: by dtype, and by the mean rows of an expert, which needs no look at the counts."""
    if dtype in (torch.float32, torch.float64):
        return FP32
    return LARGE if rows >= 128 * experts else SMALL
