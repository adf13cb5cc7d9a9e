"""Lazy matrices: tensors that are read or computed block by block, so that a checkpoint never has to fit into memory.

matrix_base.py has what all of them can do, matrix_sources.py those that are made of nothing else, matrix_ops.py those that are
made of others.
"""

from __future__ import annotations

from .matrix_base import CHUNK_BYTES, Chunk, FileRange, Matrix
from .matrix_ops import Cols, Joined, Mean, Padded, RepeatRows, Replaced, Reshaped, Rows, Scaled, Stacked, WeightedSum
from .matrix_sources import Constant, Given, Normal, Stored

__all__ = [
    "CHUNK_BYTES",
    "Chunk",
    "Cols",
    "Constant",
    "FileRange",
    "Given",
    "Joined",
    "Matrix",
    "Mean",
    "Normal",
    "Padded",
    "RepeatRows",
    "Replaced",
    "Reshaped",
    "Rows",
    "Scaled",
    "Stacked",
    "Stored",
    "WeightedSum",
]
