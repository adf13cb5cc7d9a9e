"""A bigram model of bytes, fitted on the training text: the baseline that a model's bits per byte stands beside.

Interpolated with the unigram and uniform distributions by Witten and Bell's rule (method C; IEEE Trans. Inf. Theory 37(4),
1991): the more different bytes follow a byte, the less its counts are trusted. A multiplier of that rule is fitted on
training text, so that the baseline is as good as its kind gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .indexed import TokenSlice
from .tokenizer import ByteTokenizer, Tokenizer

if TYPE_CHECKING:  # the loader needs torch, a bigram does not
    from .loader import Data

SYMBOLS = 257
END = 256
CHUNK_TOKENS = 1 << 20
MAX_TOKENS = 32 << 20
STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def _to_bytes(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of the text that ids stand for, with 256 for the end of a document. int64."""
    if isinstance(tokenizer, ByteTokenizer):
        return ids
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    parts: list[np.ndarray] = []
    for i, part in enumerate(np.split(ids, ends)):
        if i:
            parts.append(np.array([END]))
        parts.append(np.frombuffer(tokenizer.decode(part).encode("utf-8", errors="replace"), dtype=np.uint8))
    return np.concatenate(parts).astype(np.int64)


def _chunks(tokens: TokenSlice, tokenizer: Tokenizer, budget: int) -> Iterator[np.ndarray]:
    """Byte symbols of the text, or of chunks spread evenly over it where it has more than `budget` tokens."""
    starts = range(0, len(tokens), CHUNK_TOKENS)
    keep = max(1, min(len(starts), budget // CHUNK_TOKENS))
    for j in range(keep):
        at = starts[j * len(starts) // keep]
        yield _to_bytes(tokens.read(at, min(CHUNK_TOKENS, len(tokens) - at)), tokenizer)


def pair_counts(symbols: np.ndarray) -> np.ndarray:
    """How often each symbol follows each other: int64 [previous, next]."""
    pairs = symbols[:-1] * SYMBOLS + symbols[1:]
    return np.bincount(pairs, minlength=SYMBOLS * SYMBOLS).reshape(SYMBOLS, SYMBOLS)


def probabilities(counts: np.ndarray, strength: float) -> np.ndarray:
    """P(next | previous), float64 [previous, next], positive, each row summing to 1.

    P(b | a) = (c(a, b) + strength * T(a) * P(b)) / (c(a) + strength * T(a)) with T(a) the number of different symbols
    after a; P(b) likewise from all counts and the uniform distribution. What was never seen has the distribution one level below.
    """

    def smooth(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
        backoff = np.maximum(strength * np.count_nonzero(counts, axis=-1, keepdims=True), 1e-3)
        return (counts + backoff * lower) / (counts.sum(axis=-1, keepdims=True) + backoff)

    return smooth(counts, smooth(counts.sum(axis=0), np.full(SYMBOLS, 1 / SYMBOLS)))


def _bits(counts: np.ndarray, p: np.ndarray) -> float:
    return float(-(counts * np.log2(p)).sum())


def fit_bigram(train: Sequence[TokenSlice], tokenizer: Tokenizer, max_tokens: int = MAX_TOKENS) -> np.ndarray:
    """P(next | previous) from training tokens; at most `max_tokens` of them, spread evenly over the text, are read.

    The multiplier is the one that codes the last tenth of every chunk best after fitting on the rest. float64 [257, 257].
    """
    fitted, tuning = np.zeros((SYMBOLS, SYMBOLS), np.int64), np.zeros((SYMBOLS, SYMBOLS), np.int64)
    total = sum(len(t) for t in train)
    for tokens in train:
        for symbols in _chunks(tokens, tokenizer, max_tokens * len(tokens) // max(1, total)):
            cut = len(symbols) * 9 // 10
            fitted += pair_counts(symbols[:cut])
            tuning += pair_counts(symbols[cut:])
    best = min(STRENGTHS, key=lambda s: _bits(tuning, probabilities(fitted, s)))
    return probabilities(fitted + tuning, best)


def bits_per_byte(
    train_streams: Sequence[TokenSlice], heldout_stream: TokenSlice, tokenizer: Tokenizer, max_tokens: int = MAX_TOKENS
) -> float:
    """Bits per byte of a held-out stream under the bigram model of the training streams; NaN if it has no bytes."""
    p, bits, size = fit_bigram(train_streams, tokenizer, max_tokens), 0.0, 0
    for symbols in _chunks(heldout_stream, tokenizer, max_tokens):
        bits += _bits(pair_counts(symbols), p)
        size += int(np.count_nonzero(symbols[1:] != END))
    return bits / size if size else math.nan


@dataclass(frozen=True)
class Baseline:
    """Bits per byte of the bigram model. by_domain has only domains that are evaluated."""

    bits_per_byte: float
    by_domain: dict[str, float]


def baseline(data: Data, max_tokens: int = MAX_TOKENS) -> Baseline:
    """The bigram model on exactly the labels that the model is evaluated on, each domain with counts of its own training text.

    The end of a document costs bits and has no bytes, as it does for the model. Raises ValueError without held-out data.
    """
    if data.evaluation is None:
        raise ValueError("there is no held-out text to measure on")
    bits, sizes = {}, {}
    for d, source in enumerate(data.train.sources):
        if not data.evaluation.windows_per_domain[d]:
            continue
        log_p = -np.log2(fit_bigram([source.tokens], data.tokenizer, max_tokens))
        cost, size = 0.0, 0
        for tokens, valid in data.evaluation.windows(d):
            symbols, counted = tokens, valid
            if not isinstance(data.tokenizer, ByteTokenizer):
                before = max(1, len(_to_bytes(tokens[:1], data.tokenizer)))
                symbols = _to_bytes(tokens, data.tokenizer)[before - 1 :]
                counted = np.ones(len(symbols) - 1, dtype=bool)
            previous, following = symbols[:-1][counted], symbols[1:][counted]
            cost += float(log_p[previous, following].sum())
            size += int(np.count_nonzero(following != END))
        bits[source.name], sizes[source.name] = cost, size
    by_domain = {name: bits[name] / sizes[name] if sizes[name] else math.nan for name in bits}
    return Baseline(sum(bits.values()) / max(1, sum(sizes.values())), by_domain)
