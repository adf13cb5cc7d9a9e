"""Some neurons of an FFN, and matrices of these. Which ones is found when it is needed and not kept: in a large model with many
experts, lists of neurons alone would take more memory than all else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..hf.codec import Array, carrier
from ..hf.matrix import Matrix, Normal
from ..hf.matrix_base import gather
from .draws import choose, moments

Positions = npt.NDArray[np.int64]


class Choice(ABC):
    """Which neurons."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many."""

    def sources(self) -> frozenset[Path]:
        """Files that are read to find out."""
        return frozenset()

    @abstractmethod
    def positions(self) -> Positions:
        """The neurons, ascending: their order in an expert does not matter, and so they are read in the order of the file."""


class Recent:
    """The lists of neurons used last: those in turn of one expert, before and after it is cut."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Hashable, npt.NDArray[np.int32]] = OrderedDict()


@dataclass(frozen=True)
class ByChance(Choice):
    """Neurons by chance.

    total, first: of the neurons first .. first + total. start, stop: the part of their random order that is chosen, so that
    parts of one order have no neuron in common. seed, name: of the order.
    """

    total: int
    first: int
    start: int
    stop: int
    seed: int
    name: str
    recent: Recent = field(compare=False, repr=False)

    @property
    def size(self) -> int:
        return self.stop - self.start

    def positions(self) -> Positions:
        kept = self.recent.kept
        if self not in kept:
            kept[self] = (choose(self.total, self.start, self.stop, self.seed, self.name) + self.first).astype(np.int32)
        kept.move_to_end(self)
        while len(kept) > 2:
            kept.popitem(last=False)
        return kept[self].astype(np.int64)


@dataclass(frozen=True)
class Picked(Matrix):
    """The rows (axis 0) or columns (axis 1; of a vector, its elements) of some neurons."""

    of: Matrix
    choice: Choice
    axis: int

    def __post_init__(self) -> None:
        n = self.choice.size
        self._is((n, self.of.cols) if self.axis == 0 else (*self.of.shape[:-1], n), self.of.dtype)

    def children(self) -> tuple[Matrix, ...]:
        return (self.of,)

    def sources(self) -> frozenset[Path]:
        return self.of.sources() | self.choice.sources()

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        wanted = self.choice.positions()[slice(start, stop) if self.axis == 0 else slice(left, right)]
        if self.axis == 0:
            return gather(self.of, wanted, left, right, dtype)
        out = np.empty((stop - start, right - left), carrier(dtype))
        if not out.size:
            return out
        lowest = int(wanted.min())
        # to have few columns, whole rows are read: as many at a time as fit at their width, not at that of the result
        for first, last in self.of.steps(start, stop):
            rows = self.of.block(first, last, lowest, int(wanted.max()) + 1, dtype)
            out[first - start : last - start] = rows[:, wanted - lowest]
        return out


@dataclass(frozen=True)
class Renewed(Matrix):
    """A matrix in which the rows (axis 0) or columns (axis 1) of some neurons are drawn anew: N(mean, std) of all elements that
    are replaced, found when first read.

    seed, name: which draw.
    """

    of: Matrix
    choice: Choice
    axis: int
    seed: int
    name: str

    def __post_init__(self) -> None:
        self._is(self.of.shape, self.of.dtype)

    def children(self) -> tuple[Matrix, ...]:
        return (self.of,)

    @cached_property
    def drawn(self) -> Normal:
        """What takes the place of the chosen rows or columns."""
        replaced = Picked(self.of, self.choice, self.axis)
        mean, std = moments(replaced)
        return Normal(replaced.shape, std, self.seed, self.name, mean=mean, of_dtype=self.dtype)

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        out = np.array(self.of.block(start, stop, left, right, dtype))
        positions = self.choice.positions()
        low, high = (start, stop) if self.axis == 0 else (left, right)
        # ascending, so those inside are neighbours in the draw
        first, last = np.searchsorted(positions, (low, high)).tolist()
        if first == last:
            return out
        inside = positions[first:last] - low
        if self.axis == 0:
            out[inside] = self.drawn.block(first, last, left, right, dtype)
        else:
            out[:, inside] = self.drawn.block(start, stop, first, last, dtype)
        return out
