"""What a lazy matrix is: a shape, and blocks of values that are made when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .codec import Array, carrier, item_bytes, work_dtype

CHUNK_BYTES = 1 << 20
"""About how much of a matrix is held decoded at a time: little enough to stay in a core's cache while it is computed with."""


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file that can be copied as they are."""

    path: Path
    offset: int
    nbytes: int


Chunk = memoryview | FileRange


@dataclass(frozen=True)
class Matrix(ABC):
    """A tensor that is read or computed block by block, never held as a whole.

    Seen as two-dimensional, [num_rows, cols], with cols the last dimension; a vector is one row. Equal matrices have equal bytes:
    comparison is by what they are made of, not by identity.

    shape: of the tensor. dtype: what it is naturally stored as, by the names of safetensors (F32, BF16, ...).
    """

    shape: tuple[int, ...] = field(init=False, compare=False, repr=False)
    dtype: str = field(init=False, compare=False, repr=False)

    def _is(self, shape: tuple[int, ...], dtype: str) -> None:
        """Set what follows from the fields."""
        object.__setattr__(self, "shape", tuple(int(n) for n in shape))
        object.__setattr__(self, "dtype", dtype)

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    def nbytes(self, dtype: str | None = None) -> int:
        """Size when stored as `dtype` (default: the own)."""
        return prod(self.shape) * item_bytes(dtype or self.dtype)

    @abstractmethod
    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        """Rows start..stop, columns left..right as `dtype` -> [stop-start, right-left] in the carrier of `dtype` (see codec.py).

        The array may be read-only or shared: copy it before writing to it. Values that need no rounding keep their bits.
        """

    def children(self) -> tuple[Matrix, ...]:
        """The matrices that this one is made of."""
        return ()

    def sources(self) -> frozenset[Path]:
        """The files that are read."""
        return frozenset().union(*(child.sources() for child in self.children()))

    def rows(self, start: int = 0, stop: int | None = None) -> Array:
        """Values of rows start..stop -> [stop-start, cols] float32 (float64 for F64); for loops in small steps."""
        stop = self.num_rows if stop is None else stop
        return self.block(start, stop, 0, self.cols, work_dtype(self.dtype))

    def steps(self, start: int = 0, stop: int | None = None, nbytes: int | None = None) -> Iterator[tuple[int, int]]:
        """Consecutive (start, stop) of rows of about `nbytes` (default: 1 MiB) decoded, at least one row each."""
        stop = self.num_rows if stop is None else stop
        step = max(1, (CHUNK_BYTES if nbytes is None else nbytes) // max(1, 4 * self.cols))
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def chunks(self, dtype: str, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        """Rows start..stop (default: all) in storage order as `dtype`, in pieces: bytes, or ranges of files to copy."""
        item_bytes(dtype)
        for first, last in self.steps(start, stop):
            block = self.block(first, last, 0, self.cols, dtype)
            if block.size:
                yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data


@dataclass(frozen=True)
class Index:
    """Positions of rows or columns, comparable like any value."""

    positions: npt.NDArray[np.int64] = field(compare=False, repr=False)
    count: int
    digest: str

    @classmethod
    def of(cls, positions: npt.ArrayLike, bound: int, what: str) -> Index:
        """Raises ValueError for positions that are not whole numbers in [0, bound)."""
        array = np.array(positions)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"{what} must be a list of whole numbers, not {array.dtype} of shape {array.shape}")
        array = array.astype(np.int64)
        if array.size and (array.min() < 0 or array.max() >= bound):
            raise ValueError(f"{what} go from {array.min()} to {array.max()}, but there are {bound}")
        array.setflags(write=False)
        return cls(array, len(array), sha256(array.tobytes()).hexdigest()[:32])


def gather(matrix: Matrix, positions: npt.NDArray[np.int64], left: int, right: int, dtype: str) -> Array:
    """Rows at `positions` -> [len, right-left]; neighbouring rows are read together, in the order of the file."""
    out = np.empty((len(positions), right - left), carrier(dtype))
    if not len(positions):
        return out
    wanted, back = np.unique(positions, return_inverse=True)
    breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
    first = np.concatenate(([0], breaks))
    last = np.concatenate((breaks, [len(wanted)]))
    if len(wanted) == len(positions) and np.array_equal(back, np.arange(len(back))):
        found = out
    else:
        found = np.empty((len(wanted), right - left), out.dtype)
    for a, b in zip(first.tolist(), last.tolist(), strict=True):
        found[a:b] = matrix.block(int(wanted[a]), int(wanted[b - 1]) + 1, left, right, dtype)
    return found if found is out else found[back.reshape(-1)]
