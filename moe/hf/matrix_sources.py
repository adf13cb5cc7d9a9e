"""Matrices that are made of nothing else: stored in a file, given, constant, or drawn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from .codec import Array, carrier, convert, item_bytes, work_dtype
from .matrix_base import Chunk, FileRange, Matrix

SEGMENT_BYTES = 2048
"""Parts of rows that are at least this long are read one by one; shorter ones with all that lies between them."""
WIDE_BYTES = 1 << 20
"""About how much is read at a time of rows that only a part of is wanted of: it may be wanted of all the rows of a matrix."""


@dataclass(frozen=True, kw_only=True)
class Stored(Matrix):
    """A tensor in a file.

    path, offset: where its bytes begin. shape, dtype: how they are to be read.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def sources(self) -> frozenset[Path]:
        return frozenset({self.path})

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        item, cols, rows = item_bytes(self.dtype), self.cols, stop - start
        segment, row = (right - left) * item, cols * item
        raw = np.empty((rows, segment), np.uint8)
        if segment == row:
            self._read(raw.reshape(-1), [self.offset + start * row], rows * row)
        elif segment >= SEGMENT_BYTES:
            self._read(raw.reshape(-1), [self.offset + (start + i) * row + left * item for i in range(rows)], segment)
        elif segment:
            step = max(1, WIDE_BYTES // row)
            for first in range(start, stop, step):
                wide = np.empty((min(step, stop - first), row), np.uint8)
                self._read(wide.reshape(-1), [self.offset + first * row], wide.size)
                # copied: a view would keep all that was read for as long as somebody has the block
                raw[first - start : first - start + len(wide)] = wide[:, left * item : right * item]
        return convert(raw.reshape(-1).view(carrier(self.dtype)).reshape(rows, right - left), self.dtype, dtype)

    def _read(self, into: npt.NDArray[np.uint8], places: list[int], nbytes: int) -> None:
        """Read `nbytes` from each place. Never mapped into memory: mapped pages would count as memory of this process."""
        view = into.data
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        try:
            for i, place in enumerate(places):
                done = 0
                while done < nbytes:
                    part = os.preadv(file, [view[i * nbytes + done : (i + 1) * nbytes]], place + done)
                    if not part:
                        raise CheckpointError(f"{self.path} ends at byte {place + done}, inside a tensor: it is truncated")
                    done += part
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        finally:
            os.close(file)

    def chunks(self, dtype: str, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        if dtype != self.dtype:
            yield from super().chunks(dtype, start, stop)
            return
        row = self.cols * item_bytes(dtype)
        stop = self.num_rows if stop is None else stop
        if stop > start and row:
            yield FileRange(self.path, self.offset + start * row, (stop - start) * row)


@dataclass(frozen=True)
class Given(Matrix):
    """An array that is at hand, a router from a file of centroids for instance. Only for small ones: it stays in memory.

    values: float32 or float64 (or float16); kept as a copy.
    """

    values: Array = field(compare=False, repr=False)
    of_shape: tuple[int, ...] = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        values = np.array(self.values, order="C")
        names = {np.dtype("f2"): "F16", np.dtype("f4"): "F32", np.dtype("f8"): "F64"}
        if values.dtype not in names:
            raise ValueError(f"values are {values.dtype}, but must be float16, float32 or float64")
        values.setflags(write=False)
        self._is(values.shape, names[values.dtype])
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "of_shape", self.shape)
        object.__setattr__(self, "digest", f"{self.dtype} {sha256(values.tobytes()).hexdigest()[:32]}")

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        return convert(self.values.reshape(self.num_rows, self.cols)[start:stop, left:right], self.dtype, dtype)


@dataclass(frozen=True)
class Constant(Matrix):
    """The same value everywhere.

    of_shape, value: what and how large. of_dtype: the own dtype.
    """

    of_shape: tuple[int, ...]
    value: float = 0.0
    of_dtype: str = "F32"

    def __post_init__(self) -> None:
        work_dtype(self.of_dtype)
        self._is(self.of_shape, self.of_dtype)

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        one = convert(np.full((1, 1), self.value, "<f8"), "F64", dtype)
        return np.broadcast_to(one, (stop - start, right - left))


@dataclass(frozen=True)
class Normal(Matrix):
    """Normally distributed values that depend on seed, name and position only: the same in whatever steps they are read.

    Rows are drawn in groups, each by a counter-based generator (Philox, Salmon et al., SC 2011) with a key of its own, so
    that any row can be had without those before it.

    of_shape: of the tensor. std, mean: of the values. seed, name: which draw. share: probability with which an element is drawn
    at all; the others are 0 (noise on a part of the elements). of_dtype: the own dtype; values are float32 before rounding.
    """

    of_shape: tuple[int, ...]
    std: float
    seed: int
    name: str
    mean: float = 0.0
    share: float = 1.0
    of_dtype: str = "F32"

    def __post_init__(self) -> None:
        work_dtype(self.of_dtype)
        if not self.std >= 0:
            raise ValueError(f"std is {self.std}, but must not be negative")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}, but must be between 0 and 1")
        self._is(self.of_shape, self.of_dtype)

    @property
    def group(self) -> int:
        """Rows that are drawn together: a property of the shape, or reading in other steps would change values."""
        return max(1, (1 << 15) // max(1, self.cols))

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        work = work_dtype(dtype)
        out = np.empty((stop - start, right - left), carrier(work))
        group = self.group
        for g in range(start // group, -(-stop // group)):
            first, last = max(start, g * group), min(stop, (g + 1) * group)
            drawn = self._group(g)[first - g * group : last - g * group, left:right]
            out[first - start : last - start] = drawn
        return convert(out, work, dtype)

    def _group(self, number: int) -> Array:
        """Group `number` of rows, float32."""
        key = sha256(f"{self.seed}\0{self.name}\0{number}".encode()).digest()[:16]
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        rows = min(self.group, self.num_rows - number * self.group)
        values = draw.standard_normal((rows, self.cols), np.float32)
        values *= np.float32(self.std)
        values += np.float32(self.mean)
        if self.share < 1:
            values[draw.random((rows, self.cols), np.float32) >= np.float32(self.share)] = 0
        return values
