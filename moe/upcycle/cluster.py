"""Balanced k-means over the neurons of an FFN: clusters of given sizes, the same on every machine.

Features are rounded to whole numbers of 16 bits and centres are means of them, rounded too, so that all sums are exact in
float64: no order of summation, and so no BLAS and no number of threads, can move a neuron.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..hf.matrix import Matrix
from .choices import Choice
from .draws import permutation

UNIT = 32767
"""Length of a neuron's features, in whole numbers. Products of two are below 2^30, however they are summed."""
_BLOCK_BYTES = 8 << 20

Features = npt.NDArray[np.int16]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Clusters:
    """Which neurons of a layer come together; found when first asked for.

    gate: matrix [F, D] whose rows are compared, by direction. activations: or a file [tokens, F] whose columns are.
    first, sizes: the neurons from `first` on are dealt out to clusters of these sizes. steps: at most, of Lloyd's algorithm.
    seed, name: of the first centres.
    """

    gate: Matrix
    activations: Path | None
    first: int
    sizes: tuple[int, ...]
    steps: int
    seed: int
    name: str

    @cached_property
    def members(self) -> tuple[npt.NDArray[np.int32], ...]:
        """Neurons of each cluster, ascending. Holds the features of one layer, 2 bytes each. Raises DataError."""
        count = sum(self.sizes)
        if self.activations is None:
            features = matrix_features(self.gate, self.first, self.first + count)
        else:
            features = recorded_features(self.activations, self.gate.num_rows, self.first, self.first + count)
        labels = balanced_kmeans(features, self.sizes, self.steps, permutation(count, self.seed, self.name))
        return tuple((np.flatnonzero(labels == k) + self.first).astype(np.int32) for k in range(len(self.sizes)))


@dataclass(frozen=True)
class InCluster(Choice):
    """The neurons of one cluster."""

    clusters: Clusters
    number: int

    @property
    def size(self) -> int:
        return self.clusters.sizes[self.number]

    def sources(self) -> frozenset[Path]:
        recorded = self.clusters.activations
        return self.clusters.gate.sources() if recorded is None else frozenset({recorded})

    def positions(self) -> Ints:
        return self.clusters.members[self.number].astype(np.int64)


def matrix_features(matrix: Matrix, start: int, stop: int) -> Features:
    """Rows start..stop as directions, int16 [stop - start, cols]."""
    features = np.empty((stop - start, matrix.cols), np.int16)
    for first, last in matrix.steps(start, stop, _BLOCK_BYTES):
        block = matrix.rows(first, last).astype(np.float64)
        lengths = np.sqrt(np.square(block).sum(axis=1, keepdims=True))
        features[first - start : last - start] = np.rint(block * (UNIT / np.where(lengths == 0, 1, lengths)))
    return features


def recorded_features(path: Path, neurons: int, start: int, stop: int) -> Features:
    """Recorded activations of neurons start..stop as directions, int16 [stop - start, tokens]; read in blocks of tokens.

    Raises DataError for a file that is missing or of another form, and for values that are not finite.
    """
    try:
        with path.open("rb") as file:
            shape, dtype = _header(file, path)
            if len(shape) != 2 or shape[1] != neurons or not shape[0] or dtype.kind != "f":
                what = f"{dtype} of shape {list(shape)}, but must be floating-point of shape [tokens, {neurons}]"
                raise DataError(f"upcycle.activations: {path} is {what}")
            begin, step = file.tell(), max(1, _BLOCK_BYTES // (neurons * dtype.itemsize))
            blocks = range(0, shape[0], step)
            squares = np.zeros(stop - start)
            for first in blocks:
                values = _read(file, path, min(step, shape[0] - first), neurons, dtype)
                squares += np.square(values[:, start:stop]).sum(axis=0)
            if not np.isfinite(squares).all():
                raise DataError(f"upcycle.activations: {path} has values that are not finite")
            factors = UNIT / np.sqrt(np.where(squares == 0, 1, squares))
            features = np.empty((stop - start, shape[0]), np.int16)
            file.seek(begin)
            for first in blocks:
                values = _read(file, path, min(step, shape[0] - first), neurons, dtype)
                features[:, first : first + len(values)] = np.rint(values[:, start:stop] * factors).T
    except OSError as error:
        raise DataError(f"upcycle.activations: {path} cannot be read: {error.strerror}") from error
    return features


def _header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file)
    except ValueError as error:
        raise DataError(f"upcycle.activations: {path} is not a .npy file: {error}") from error
    if by_columns:
        raise DataError(f"upcycle.activations: {path} is in column order; save numpy.ascontiguousarray of it")
    return shape, dtype


def _read(file: IO[bytes], path: Path, rows: int, cols: int, dtype: np.dtype[np.generic]) -> npt.NDArray[np.float64]:
    raw = file.read(rows * cols * dtype.itemsize)
    if len(raw) < rows * cols * dtype.itemsize:
        raise DataError(f"upcycle.activations: {path} is truncated")
    return np.frombuffer(raw, dtype).reshape(rows, cols).astype(np.float64)


def balanced_kmeans(features: Features, sizes: tuple[int, ...], steps: int, order: Ints) -> Ints:
    """Labels [n] of a k-means with sizes[k] members in cluster k.

    With sizes fixed, the sum of squared distances falls exactly as the sum of products with the own centre rises, so that is what
    members are exchanged for. Lloyd's algorithm, with the assignment of `assign`; it never gets worse, and ends where it
    repeats or after `steps`. order: permutation of the n neurons; the first are the first centres.
    """
    centres = features[order[: len(sizes)]].astype(np.float64)
    labels: Ints | None = None
    for _ in range(steps):
        closeness = _products(features, centres)
        before, labels = labels, assign(closeness, sizes, labels)
        if before is not None and np.array_equal(before, labels):
            break
        centres = np.stack([_mean(features, np.flatnonzero(labels == k)) for k in range(len(sizes))])
    assert labels is not None
    return labels


def _mean(features: Features, members: Ints) -> npt.NDArray[np.float64]:
    """Mean of some rows, rounded to whole numbers."""
    total = np.zeros(features.shape[1], np.int64)
    for first in range(0, len(members), 256):
        total += features[members[first : first + 256]].sum(axis=0, dtype=np.int64)
    return np.rint(total / max(1, len(members)))


def _products(features: Features, centres: npt.NDArray[np.float64]) -> Ints:
    """Products [n, k] of every row with every centre, exact."""
    out = np.empty((len(features), len(centres)), np.int64)
    step = max(1, _BLOCK_BYTES // (8 * features.shape[1]))
    for first in range(0, len(features), step):
        out[first : first + step] = features[first : first + step].astype(np.float64) @ centres.T
    return out


def assign(closeness: Ints, sizes: tuple[int, ...], labels: Ints | None = None) -> Ints:
    """Labels [n] with sizes[k] members in cluster k and a large sum of closeness [n, k].

    From `labels`, or those that lose most by their second choice first; then pairs are exchanged between two clusters as long
    as that gains. No exchange of two neurons can improve the result.
    """
    labels = _first_come(closeness, sizes) if labels is None else labels.copy()
    changed = True
    while changed:
        changed = False
        for a in range(len(sizes)):
            for b in range(a + 1, len(sizes)):
                changed |= _exchange(closeness, labels, a, b)
    return labels


def _first_come(closeness: Ints, sizes: tuple[int, ...]) -> Ints:
    ranked = np.sort(closeness, axis=1)
    regret = ranked[:, -1] - ranked[:, -2] if len(sizes) > 1 else ranked[:, -1]
    choices = np.argsort(-closeness, axis=1, kind="stable")
    labels, room = np.empty(len(closeness), np.int64), list(sizes)
    for i in np.argsort(-regret, kind="stable").tolist():
        labels[i] = next(k for k in choices[i].tolist() if room[k])
        room[labels[i]] -= 1
    return labels


def _exchange(closeness: Ints, labels: Ints, a: int, b: int) -> bool:
    """Exchange members of clusters a and b for as long as a pair gains; says whether any did."""
    in_a, in_b = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
    gain_a = closeness[in_a, b] - closeness[in_a, a]
    gain_b = closeness[in_b, a] - closeness[in_b, b]
    in_a, in_b = in_a[np.argsort(-gain_a, kind="stable")], in_b[np.argsort(-gain_b, kind="stable")]
    pairs = min(len(in_a), len(in_b))
    # both fall, so the pairs that gain come first
    gains = -np.sort(-gain_a)[:pairs] - np.sort(-gain_b)[:pairs]
    count = int((gains > 0).sum())
    labels[in_a[:count]], labels[in_b[:count]] = b, a
    return count > 0
