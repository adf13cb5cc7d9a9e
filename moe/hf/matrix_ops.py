"""Matrices that are made of other matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from .codec import Array, carrier, common_dtype, convert, work_dtype
from .matrix_base import Chunk, Index, Matrix, gather

Positions = slice | npt.ArrayLike
"""A slice without step, or a list or array of positions."""


@dataclass(frozen=True)
class _Part(Matrix):
    """Rows or columns of a matrix. A range is kept as its bounds, anything else as positions."""

    of: Matrix
    first: int = field(init=False, default=0)
    count: int = field(init=False, default=0)
    index: Index | None = field(init=False, default=None)

    def children(self) -> tuple[Matrix, ...]:
        return (self.of,)

    def _choose(self, positions: Positions, stop: int | None, bound: int, what: str) -> int:
        """Set first, count or index; returns how many there are."""
        if isinstance(positions, int | np.integer) and stop is not None:
            positions = slice(int(positions), int(stop))
        if isinstance(positions, slice):
            first = 0 if positions.start is None else int(positions.start)
            last = bound if positions.stop is None else int(positions.stop)
            if positions.step not in (None, 1) or not 0 <= first <= last <= bound:
                raise ValueError(f"{what} {first}..{last} (step {positions.step}) are not a range inside 0..{bound}")
            object.__setattr__(self, "first", first)
            object.__setattr__(self, "count", last - first)
            return last - first
        index = Index.of(positions, bound, what)
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "count", index.count)
        return index.count


@dataclass(frozen=True, init=False)
class Rows(_Part):
    """Rows of a matrix: `Rows(m, start, stop)`, `Rows(m, slice)` or `Rows(m, positions)`, which may repeat, in any order.

    Rows are those of the two-dimensional view, so the result has shape [n, cols] (a vector has one row).
    """

    def __init__(self, of: Matrix, start: Positions, stop: int | None = None):
        object.__setattr__(self, "of", of)
        object.__setattr__(self, "first", 0)
        object.__setattr__(self, "index", None)
        n = self._choose(start, stop, of.num_rows, "rows")
        self._is((n, of.cols), of.dtype)

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        if self.index is None:
            return self.of.block(self.first + start, self.first + stop, left, right, dtype)
        return gather(self.of, self.index.positions[start:stop], left, right, dtype)

    def chunks(self, dtype: str, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        if self.index is not None:
            return super().chunks(dtype, start, stop)
        stop = self.num_rows if stop is None else stop
        return self.of.chunks(dtype, self.first + start, self.first + stop)


@dataclass(frozen=True, init=False)
class Cols(_Part):
    """Columns of a matrix: `Cols(m, slice)`, `Cols(m, start, stop)` or `Cols(m, positions)`. The other dimensions stay."""

    def __init__(self, of: Matrix, start: Positions, stop: int | None = None):
        object.__setattr__(self, "of", of)
        object.__setattr__(self, "first", 0)
        object.__setattr__(self, "index", None)
        n = self._choose(start, stop, of.cols, "columns")
        self._is((*of.shape[:-1], n), of.dtype)

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        if self.index is None:
            return self.of.block(start, stop, self.first + left, self.first + right, dtype)
        wanted = self.index.positions[left:right]
        if not len(wanted):
            return np.empty((stop - start, 0), carrier(dtype))
        lowest = int(wanted.min())
        return self.of.block(start, stop, lowest, int(wanted.max()) + 1, dtype)[:, wanted - lowest]


@dataclass(frozen=True)
class Scaled(Matrix):
    """A matrix times a factor, multiplied in float32 (float64 for F64)."""

    of: Matrix
    factor: float

    def __post_init__(self) -> None:
        work_dtype(self.of.dtype)
        object.__setattr__(self, "factor", float(self.factor))
        self._is(self.of.shape, self.of.dtype)

    def children(self) -> tuple[Matrix, ...]:
        return (self.of,)

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        work = work_dtype(self.dtype)
        values = self.of.block(start, stop, left, right, work)
        try:
            with np.errstate(over="raise", invalid="ignore"):
                scaled = values * carrier(work).type(self.factor)
        except FloatingPointError as error:
            raise CheckpointError(f"a value of {np.abs(values).max():g} times {self.factor:g} is too large for {work}") from error
        return convert(scaled, work, dtype)

    def chunks(self, dtype: str, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        # times one is a copy
        return self.of.chunks(dtype, start, stop) if self.factor == 1 else super().chunks(dtype, start, stop)


@dataclass(frozen=True)
class WeightedSum(Matrix):
    """Sum of weight times matrix, all of one shape; summed in float64, so that the mean of equal matrices has their bits."""

    parts: tuple[Matrix, ...]
    weights: tuple[float, ...]
    divisor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        if not self.parts or len(self.parts) != len(self.weights):
            raise ValueError(f"{len(self.parts)} matrices with {len(self.weights)} weights cannot be summed")
        _same_shape(self.parts)
        dtype = common_dtype([part.dtype for part in self.parts])
        work_dtype(dtype)
        self._is(self.parts[0].shape, dtype)

    def children(self) -> tuple[Matrix, ...]:
        return self.parts

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        total = np.zeros((stop - start, right - left))
        for part, weight in zip(self.parts, self.weights, strict=True):
            total += weight * part.block(start, stop, left, right, work_dtype(part.dtype)).astype("<f8", copy=False)
        return convert(total / self.divisor, "F64", dtype)


class Mean(WeightedSum):
    """The mean of matrices of one shape: `Mean([a, b])`."""

    def __init__(self, parts: Sequence[Matrix]):
        super().__init__(tuple(parts), (1.0,) * len(parts), float(len(parts)))


@dataclass(frozen=True)
class RepeatRows(Matrix):
    """Each row `times` in succession: [a, b] -> [a, a, b, b]. For [a, b, a, b] use `Stacked([m, m])`."""

    of: Matrix
    times: int

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"rows cannot be repeated {self.times} times")
        self._is((self.of.num_rows * self.times, self.of.cols), self.of.dtype)

    def children(self) -> tuple[Matrix, ...]:
        return (self.of,)

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        first, last = start // self.times, -(-stop // self.times)
        found = self.of.block(first, last, left, right, dtype).repeat(self.times, axis=0)
        return found[start - first * self.times : stop - first * self.times]


@dataclass(frozen=True)
class Replaced(Matrix):
    """A matrix in which some rows (axis 0) or columns (axis 1) come from another.

    positions: which rows of `of`; row i of `other` replaces row positions[i]. Given without repetition, in any order.
    Rows are those of the two-dimensional view. dtype is that of `of`.
    """

    of: Matrix
    positions: Index
    other: Matrix
    axis: int

    def __init__(self, of: Matrix, positions: npt.ArrayLike, other: Matrix, axis: int = 0):
        if axis not in (0, 1):
            raise ValueError(f"axis is {axis}, but must be 0 (rows) or 1 (columns)")
        bound, what = (of.num_rows, "rows") if axis == 0 else (of.cols, "columns")
        index = Index.of(positions, bound, what)
        if len(np.unique(index.positions)) != index.count:
            raise ValueError(f"{what} to replace are named more than once")
        want = (index.count, of.cols) if axis == 0 else (of.num_rows, index.count)
        if (other.num_rows, other.cols) != want:
            raise ValueError(
                f"{index.count} {what} of {list(of.shape)} cannot come from {list(other.shape)}, it must be {list(want)}"
            )
        for name, value in (("of", of), ("positions", index), ("other", other), ("axis", axis)):
            object.__setattr__(self, name, value)
        self._is(of.shape, of.dtype)

    def children(self) -> tuple[Matrix, ...]:
        return (self.of, self.other)

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        out = np.array(self.of.block(start, stop, left, right, dtype))
        low, high = (start, stop) if self.axis == 0 else (left, right)
        positions = self.positions.positions
        here = np.flatnonzero((positions >= low) & (positions < high))
        if not len(here):
            return out
        if self.axis == 0:
            out[positions[here] - low] = gather(self.other, here, left, right, dtype)
        else:
            lowest = int(here.min())
            found = self.other.block(start, stop, lowest, int(here.max()) + 1, dtype)
            out[:, positions[here] - low] = found[:, here - lowest]
        return out


@dataclass(frozen=True)
class Padded(Matrix):
    """A matrix with zeros below and to the right, up to [rows, cols] of the two-dimensional view."""

    of: Matrix
    to_rows: int
    to_cols: int

    def __post_init__(self) -> None:
        if self.to_rows < self.of.num_rows or self.to_cols < self.of.cols:
            raise ValueError(
                f"{list(self.of.shape)} is larger than [{self.to_rows}, {self.to_cols}], so it cannot be padded to that"
            )
        self._is((self.to_rows, self.to_cols), self.of.dtype)

    def children(self) -> tuple[Matrix, ...]:
        return (self.of,)

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        out = np.zeros((stop - start, right - left), carrier(dtype))
        last, end = min(stop, self.of.num_rows), min(right, self.of.cols)
        if last > start and end > left:
            out[: last - start, : end - left] = self.of.block(start, last, left, end, dtype)
        return out


@dataclass(frozen=True)
class Stacked(Matrix):
    """Tensors one after another along the first dimension (as numpy.concatenate), or along a new one (as numpy.stack).

    Vectors without a new dimension become one longer vector. What can be copied from a file stays so.
    """

    parts: tuple[Matrix, ...]
    new_axis: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise ValueError("nothing to stack")
        shapes, dtype = [part.shape for part in self.parts], common_dtype([part.dtype for part in self.parts])
        if self.new_axis:
            _same_shape(self.parts)
            self._is((len(shapes), *shapes[0]), dtype)
            return
        if any(len(s) != len(shapes[0]) or not s or s[1:] != shapes[0][1:] for s in shapes):
            raise ValueError(f"shapes {_listed(self.parts)} differ in more than the first dimension, so they cannot be stacked")
        self._is((sum(s[0] for s in shapes), *shapes[0][1:]), dtype)

    def children(self) -> tuple[Matrix, ...]:
        return self.parts

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        if len(self.shape) == 1:
            return _beside(self.parts, start, stop, left, right, dtype)
        out = np.empty((stop - start, right - left), carrier(dtype))
        for part, first, last, at in self._overlaps(start, stop):
            out[at - start : at - start + last - first] = part.block(first, last, left, right, dtype)
        return out

    def chunks(self, dtype: str, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        stop = self.num_rows if stop is None else stop
        if len(self.shape) == 1:
            for part in self.parts:
                yield from part.chunks(dtype, start, stop)
            return
        for part, first, last, _ in self._overlaps(start, stop):
            yield from part.chunks(dtype, first, last)

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[Matrix, int, int, int]]:
        """(part, first and last row in it, first row here) of the parts that rows start..stop come from."""
        at = 0
        for part in self.parts:
            first, last = max(start, at), min(stop, at + part.num_rows)
            if first < last:
                yield part, first - at, last - at, first
            at += part.num_rows


@dataclass(frozen=True)
class Joined(Matrix):
    """Matrices of equally many rows side by side: along the last dimension."""

    parts: tuple[Matrix, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise ValueError("nothing to join")
        lead = self.parts[0].shape[:-1]
        if any(part.shape[:-1] != lead for part in self.parts):
            raise ValueError(f"shapes {_listed(self.parts)} differ in more than the last dimension, so they cannot be joined")
        self._is((*lead, sum(part.cols for part in self.parts)), common_dtype([part.dtype for part in self.parts]))

    def children(self) -> tuple[Matrix, ...]:
        return self.parts

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        return _beside(self.parts, start, stop, left, right, dtype)


@dataclass(frozen=True)
class Reshaped(Matrix):
    """The same elements in the same order under another shape."""

    of: Matrix
    to_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "to_shape", tuple(self.to_shape))
        if prod(self.to_shape) != prod(self.of.shape):
            raise ValueError(f"{list(self.of.shape)} cannot become {list(self.to_shape)}: it has another number of elements")
        self._is(self.to_shape, self.of.dtype)

    def children(self) -> tuple[Matrix, ...]:
        return (self.of,)

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        if self.cols == self.of.cols:
            return self.of.block(start, stop, left, right, dtype)
        cols, theirs = self.cols, max(1, self.of.cols)
        first, last = start * cols // theirs, -(-stop * cols // theirs)
        flat = self.of.block(first, last, 0, self.of.cols, dtype).reshape(-1)
        skip = start * cols - first * theirs
        return flat[skip : skip + (stop - start) * cols].reshape(stop - start, cols)[:, left:right]

    def chunks(self, dtype: str, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        stop, theirs = self.num_rows if stop is None else stop, max(1, self.of.cols)
        first, last = start * self.cols, stop * self.cols
        if first % theirs or last % theirs:
            return super().chunks(dtype, start, stop)
        return self.of.chunks(dtype, first // theirs, last // theirs)


def _beside(parts: tuple[Matrix, ...], start: int, stop: int, left: int, right: int, dtype: str) -> Array:
    out = np.empty((stop - start, right - left), carrier(dtype))
    at = 0
    for part in parts:
        first, last = max(left, at), min(right, at + part.cols)
        if first < last:
            out[:, first - left : last - left] = part.block(start, stop, first - at, last - at, dtype)
        at += part.cols
    return out


def _same_shape(parts: tuple[Matrix, ...]) -> None:
    if any(part.shape != parts[0].shape for part in parts):
        raise ValueError(f"shapes {_listed(parts)} differ")


def _listed(parts: tuple[Matrix, ...]) -> str:
    return ", ".join(str(list(shape)) for shape in dict.fromkeys(part.shape for part in parts))
