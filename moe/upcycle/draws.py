"""Random choices and values that depend on seed and name only."""

from __future__ import annotations

import math
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from ..hf.matrix import Matrix

STATISTIC_ROWS = 256
"""Rows over which statistics are taken at a time: fixed, so that they do not depend on how the matrix is read later."""


def permutation(count: int, seed: int, name: str) -> npt.NDArray[np.int64]:
    """The numbers below `count` in random order.

    By sorting raw words of a counter-based generator (Philox): numpy keeps those the same in all versions, its own permutation
    not.
    """
    key = int.from_bytes(sha256(f"{seed}\0{name}".encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable").astype(np.int64)


def choose(count: int, start: int, stop: int, seed: int, name: str) -> npt.NDArray[np.int64]:
    """The numbers at start..stop of a random order of those below `count`, ascending."""
    return np.sort(permutation(count, seed, name)[start:stop])


def moments(matrix: Matrix) -> tuple[float, float]:
    """(mean, standard deviation) of all elements, in float64.

    In blocks of rows: mean and squared deviations from it of each block (two passes over the block), joined as in Chan, Golub and
    LeVeque, Algorithms for computing the sample variance (1983); every row is read once.
    """
    count, mean, squares = 0, 0.0, 0.0
    for start in range(0, matrix.num_rows, STATISTIC_ROWS):
        block = matrix.rows(start, min(start + STATISTIC_ROWS, matrix.num_rows)).astype(np.float64)
        if not block.size:
            continue
        here = float(block.mean())
        block -= here
        shift, total = here - mean, count + block.size
        squares += float(np.square(block, out=block).sum()) + shift * shift * count * block.size / total
        mean += shift * block.size / total
        count = total
    return mean, math.sqrt(squares / count) if count else 0.0
