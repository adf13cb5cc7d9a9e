"""Matrices with rows and columns exchanged: what formats store whose projections are [columns in, rows out]."""

from __future__ import annotations

from dataclasses import dataclass, field

from .codec import Array
from .matrix_base import Matrix

BAND_BYTES = 32 << 20
"""About how much of a transposed matrix is held decoded at a time."""


class Band:
    """The columns that were read last, of whichever matrix shares this."""

    def __init__(self) -> None:
        self._key: tuple[Matrix, int, str] | None = None
        self._block: Array | None = None

    def columns(self, of: Matrix, first: int, stop: int, dtype: str) -> Array:
        """Columns first..stop of all rows; `stop` must be the same whenever `first` is."""
        key = (of, first, dtype)
        if self._block is None or self._key != key:
            self._key = self._block = None  # there is room for one
            self._block = of.block(0, of.num_rows, first, stop, dtype)
            self._key = key
        return self._block


@dataclass(frozen=True)
class Transposed(Matrix):
    """A matrix [rows, columns] as [columns, rows].

    band: rows here are asked for in small steps, and for each of these `of` would be read from its first row to its last, so
    that many are read together and those read last are kept. All that are read in turn share one.
    """

    of: Matrix
    band: Band = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.of.shape) != 2:
            raise ValueError(f"only matrices are transposed, not what has shape {list(self.of.shape)}")
        self._is(self.of.shape[::-1], self.of.dtype)

    def children(self) -> tuple[Matrix, ...]:
        return (self.of,)

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        width = max(1, BAND_BYTES // max(1, 4 * self.of.num_rows))
        first = start // width * width
        if stop > first + width:
            return self.of.block(left, right, start, stop, dtype).T
        held = self.band.columns(self.of, first, min(first + width, self.of.cols), dtype)
        return held[left:right, start - first : stop - first].T
