"""Which window of which source sample i is: pure integer functions of (seed, i), constant time, no state.

Windows are shuffled by a keyed permutation that is computed, not stored: a Feistel network over the smallest
even number of bits that covers n, walked until the value falls below n (cycle walking; Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...moe.errors import DataError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 6
MAX_PERIOD = 4096
Integers = int | np.ndarray


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014): a bijection of 64-bit words that spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(x: Integers) -> np.ndarray:
    if isinstance(x, int):
        return np.array([x & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64)
    return np.atleast_1d(x).astype(np.uint64)


def make_key(*parts: Integers) -> np.ndarray:
    """A 64-bit key from integers (or equally long arrays of them); order matters. uint64 [n or 1]."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix((key ^ _words(part)) + GOLDEN)
    return key


def permute_index(i: Integers, n: int, key: Integers) -> np.ndarray:
    """Where a pseudo-random permutation of [0, n), chosen by `key`, sends `i`. int64 [len(i)].

    i: one index or an array of them, each in [0, n); key: one key, or one per index.
    Bijective in i for every n and key. Raises ValueError for an index outside [0, n).
    """
    x = _words(i)
    if n <= 0 or (x >= np.uint64(n)).any():
        raise ValueError(f"indices must be in [0, {n})")
    keys = np.broadcast_to(_words(key), x.shape)
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = [_mix(keys + _words(r * int(GOLDEN))) for r in range(1, ROUNDS + 1)]
    out, pending = x.copy(), np.arange(len(x))
    while len(pending):
        left, right = out[pending] >> half, out[pending] & mask
        for k in round_keys:
            left, right = right, left ^ (_mix(right + k[pending]) & mask)
        out[pending] = (left << half) | right
        pending = pending[out[pending] >= np.uint64(n)]
    return out.astype(np.int64)


def period_counts(weights: Sequence[float], max_period: int = MAX_PERIOD) -> np.ndarray:
    """Samples of each source in one period: the shortest period that meets the weights exactly, else the longest.

    Largest-remainder rounding; every source gets at least 1. int64 [sources].
    Raises DataError if there are more sources than `max_period`.
    """
    if len(weights) > max_period:
        raise DataError(f"data.sources: {len(weights)} sources, but at most {max_period} can be blended; join some of them")
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    ideal = np.arange(1, max_period + 1)[:, None] * share
    whole = np.rint(ideal)
    exact = (np.abs(ideal - whole).max(axis=1) < 1e-9) & (whole.min(axis=1) >= 1)
    if exact.any():
        return whole[np.argmax(exact)].astype(np.int64)
    counts = np.floor(ideal[-1]).astype(np.int64)
    rest = np.argsort(counts - ideal[-1], kind="stable")[: max_period - counts.sum()]
    counts[rest] += 1
    while counts.min() == 0:
        counts[np.argmin(counts)] += 1
        counts[np.argmax(counts)] -= 1
    return counts


class Blend:
    """Sample i -> (source, window, epoch), for sources of `windows` windows each, drawn in proportion to `weights`.

    The source of sample i is a fixed pattern of one period, in which every source is spread evenly. The k-th sample
    of a source is window k of its shuffled order; each pass over the source has an order of its own.
    """

    def __init__(self, weights: Sequence[float], windows: Sequence[int], seed: int) -> None:
        self.counts = period_counts(weights)
        self.windows = tuple(int(n) for n in windows)
        self.seed = seed
        self.period = int(self.counts.sum())
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        rank = np.concatenate([np.arange(c) for c in self.counts])
        order = np.lexsort((source, (rank + 0.5) / self.counts[source]))
        self._source, self._rank = source[order], rank[order]

    def locate(self, samples: Integers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, window and epoch of each sample index, int64 [n] each."""
        quotient, remainder = np.divmod(np.atleast_1d(np.asarray(samples, dtype=np.int64)), self.period)
        source = self._source[remainder]
        running = quotient * self.counts[source] + self._rank[remainder]
        window, epoch = np.empty_like(running), np.empty_like(running)
        for s in np.unique(source):
            mine = source == s
            n = self.windows[s]
            epoch[mine] = running[mine] // n
            window[mine] = permute_index(running[mine] % n, n, make_key(self.seed, int(s), epoch[mine]))
        return source, window, epoch

    def epochs(self, samples: int) -> np.ndarray:
        """Passes over each source after the first `samples` samples, float64 [sources]."""
        quotient, remainder = divmod(samples, self.period)
        drawn = quotient * self.counts + np.bincount(self._source[:remainder], minlength=len(self.counts))
        return drawn / np.asarray(self.windows)
