"""Batches of token windows. What a step trains on is a function of (seed, step) alone, whatever the layout."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import torch

from ...moe.errors import DataError
from ..settings import DataConfig
from .blend import Blend, make_key, permute_index
from .corpus import PreparedSource, Progress, check, prepare
from .indexed import TokenSlice
from .tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")
ROW_ORDER = 1 << 32  # keeps the keys of the row order apart from those of any source


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch. B rows of S tokens."""

    tokens_BS: torch.Tensor
    """int64."""
    labels_BS: torch.Tensor
    """int64: the token after each of `tokens_BS`."""
    valid_BS: torch.Tensor
    """bool: False where no loss is taken (padding rows; with `document_mask` the first token of another document)."""
    document_BS: torch.Tensor | None
    """int32: number of the document inside the window, from 0; None without `document_mask`."""
    domain_B: torch.Tensor
    """int64: index into `Data.domains`."""
    sample_ids_B: torch.Tensor
    """int64: training: index of the sample since the start of the run; evaluation: index of the row; -1 for padding."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU overlap with work."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(v) for name, v in values.items() if v is not None})


@dataclass(frozen=True)
class Source:
    """Tokens of one domain, open for reading."""

    name: str
    weight: float
    tokens: TokenSlice


def loss_mask(documents: np.ndarray) -> np.ndarray:
    """Which labels of a window count, given the document of each of its S + 1 tokens: those of the same document. bool [S]."""
    return documents[1:] == documents[:-1]


def _assemble(
    windows: Sequence[tuple[np.ndarray, np.ndarray | None] | None],
    seq_len: int,
    domains: np.ndarray,
    ids: np.ndarray,
    masked: bool,
) -> Batch:
    """A batch from windows of S + 1 tokens and their documents; None is a padding row."""
    rows = len(windows)
    tokens = np.zeros((rows, seq_len + 1), dtype=np.int64)
    valid = np.zeros((rows, seq_len), dtype=bool)
    documents = np.zeros((rows, seq_len), dtype=np.int32) if masked else None
    for r, window in enumerate(windows):
        if window is None:
            continue
        tokens[r], document = window
        valid[r] = True if document is None else loss_mask(document)
        if documents is not None and document is not None:
            documents[r] = document[:-1]
    whole = torch.from_numpy(tokens)
    return Batch(
        tokens_BS=whole[:, :-1].contiguous(),
        labels_BS=whole[:, 1:].contiguous(),
        valid_BS=torch.from_numpy(valid),
        document_BS=None if documents is None else torch.from_numpy(documents),
        domain_B=torch.from_numpy(domains.astype(np.int64)),
        sample_ids_B=torch.from_numpy(ids.astype(np.int64)),
    )


class GlobalBatches:
    """The training batches. No state: any step can be asked for at any time, so resuming needs only its number.

    Step t holds samples [t * global_batch, (t + 1) * global_batch), in an order of its own, so that no data-parallel rank
    meets the same domains at every step. Which rows a rank reads is up to its caller.
    """

    def __init__(
        self, sources: Sequence[Source], *, seq_len: int, global_batch: int, seed: int, document_mask: bool = False
    ) -> None:
        self.sources = tuple(sources)
        self.seq_len, self.global_batch, self.seed, self.document_mask = seq_len, global_batch, seed, document_mask
        self.blend = Blend([s.weight for s in sources], [s.tokens.windows(seq_len) for s in sources], seed)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample `index` of the run: tokens int64 [S + 1], and each token's document in the window, int32 [S + 1]."""
        source, window, _ = (int(x[0]) for x in self.blend.locate(index))
        tokens, at = self.sources[source].tokens, window * self.seq_len
        return tokens.read(at, self.seq_len + 1), tokens.document_ids(at, self.seq_len + 1)

    def batch(self, step: int, rows: range | None = None) -> Batch:
        """Rows `rows` of step `step` (from 0); None = all. Raises IndexError for rows outside the global batch."""
        wanted = np.asarray(range(self.global_batch) if rows is None else rows, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.global_batch:
            raise IndexError(f"rows {rows} of a global batch of {self.global_batch}")
        order = permute_index(wanted, self.global_batch, make_key(self.seed, ROW_ORDER, step))
        ids = step * self.global_batch + order
        source, window, _ = self.blend.locate(ids)
        windows = [self._window(int(s), int(w)) for s, w in zip(source, window, strict=True)]
        return _assemble(windows, self.seq_len, source, ids, self.document_mask)

    def _window(self, source: int, window: int) -> tuple[np.ndarray, np.ndarray | None]:
        tokens, at = self.sources[source].tokens, window * self.seq_len
        documents = tokens.document_ids(at, self.seq_len + 1) if self.document_mask else None
        return tokens.read(at, self.seq_len + 1), documents

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each source before step `step`."""
        return dict(zip((s.name for s in self.sources), self.blend.epochs(step * self.global_batch).tolist(), strict=True))


def _quotas(available: Sequence[int], total: int) -> list[int]:
    """Split `total` rows evenly; a domain with too few windows leaves its rows to the others."""
    quotas, left = [0] * len(available), total
    open_domains = [d for d, n in enumerate(available) if n]
    while left and open_domains:
        share, extra = divmod(left, len(open_domains))
        for rank, d in enumerate(open_domains):
            take = min(available[d] - quotas[d], share + (rank < extra))
            quotas[d] += take
            left -= take
        open_domains = [d for d in open_domains if quotas[d] < available[d]]
    return quotas


class EvalBatches:
    """Held-out windows in a fixed order, the same at every evaluation and for every layout.

    At most `max_batches` batches of `batch_size` rows, shared evenly by the domains; the windows of a domain are spread
    evenly over its held-out tokens, never overlap, and a last partial one is left out. The last batch is filled up with
    padding rows (valid nowhere), so that any data-parallel degree that divides the training batch divides this one.
    """

    def __init__(
        self,
        sources: Sequence[Source | None],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        batch_size: int,
        max_batches: int,
        document_mask: bool,
    ) -> None:
        self.sources, self.tokenizer = tuple(sources), tokenizer
        self.seq_len, self.batch_size, self.document_mask = seq_len, batch_size, document_mask
        available = [s.tokens.windows(seq_len) if s else 0 for s in sources]
        self.windows_per_domain = tuple(_quotas(available, max_batches * batch_size))
        self._rows = [(d, j * available[d] // quota) for d, quota in enumerate(self.windows_per_domain) for j in range(quota)]
        self.num_batches = math.ceil(len(self._rows) / batch_size)

    def window(self, row: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Window of a row that is no padding: tokens int64 [S + 1], and with `document_mask` the document of each."""
        domain, index = self._rows[row]
        source = self.sources[domain]
        assert source is not None
        at = index * self.seq_len
        documents = source.tokens.document_ids(at, self.seq_len + 1) if self.document_mask else None
        return source.tokens.read(at, self.seq_len + 1), documents

    def windows(self, domain: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All windows of a domain: tokens int64 [S + 1], and which of its labels count, bool [S]."""
        for row, (d, _) in enumerate(self._rows):
            if d == domain:
                tokens, documents = self.window(row)
                yield tokens, np.ones(self.seq_len, bool) if documents is None else loss_mask(documents)

    def batch(self, index: int, rows: range | None = None) -> Batch:
        """Rows `rows` of batch `index`; None = all."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"evaluation batch {index} of {self.num_batches}")
        wanted = [index * self.batch_size + r for r in (range(self.batch_size) if rows is None else rows)]
        real = [w < len(self._rows) for w in wanted]
        windows = [self.window(w) if ok else None for w, ok in zip(wanted, real, strict=True)]
        domains = np.array([self._rows[w][0] if ok else 0 for w, ok in zip(wanted, real, strict=True)], dtype=np.int64)
        ids = np.where(real, wanted, -1)
        return _assemble(windows, self.seq_len, domains, ids, self.document_mask)

    @cached_property
    def bytes_per_domain(self) -> tuple[int, ...]:
        """UTF-8 bytes of the labels that count, per domain: what bits per byte is divided by.

        Exact for bytes. Else the difference of decoding a window with and without its first token, exact but for
        a character that is cut at the edge of a window.
        """
        totals = [0] * len(self.sources)
        for domain in range(len(self.sources)):
            for tokens, valid in self.windows(domain):
                count = self.tokenizer.count_bytes
                totals[domain] += count(tokens) - count(tokens[:1]) - sum(count(t) for t in tokens[1:][~valid, None])
        return tuple(totals)


class Prefetcher(Generic[T]):
    """Computes `produce(i)` for i = start, start + 1, … in a thread, at most `depth` results ahead.

    An iterator and a context manager. An exception of `produce` is raised by the `next` that would have had its result.
    """

    def __init__(self, produce: Callable[[int], T], start: int, stop: int, depth: int = 2) -> None:
        self._produce, self._span, self._depth = produce, range(start, stop), depth
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._done = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="moefold-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for i in self._span:
                result = self._produce(i)
                with self._changed:
                    self._ready.append(result)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
        except BaseException as e:  # handed to the consumer, whatever it is
            self._error = e
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._done or self._closed)
            if self._ready and not self._closed:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; may be called twice."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Data:
    """Everything a run reads. domains: names of the sources, in the order of `Batch.domain_B`."""

    train: GlobalBatches
    evaluation: EvalBatches | None
    tokenizer: Tokenizer
    domains: tuple[str, ...]
    prepared: tuple[PreparedSource, ...]


def _share_prepared(
    build: Callable[[], list[PreparedSource]], is_writer: bool, share: Callable[[object], object]
) -> list[PreparedSource]:
    """`build()` on the writer, its result on every rank; the writer's failure becomes every rank's DataError."""
    outcome: object = None
    failure: Exception | None = None
    if is_writer:
        try:
            outcome = build()
        except Exception as e:  # the other ranks wait in `share`: they must hear of any failure before it is raised
            failure = e
            outcome = str(e) if isinstance(e, DataError) else f"preparing the data failed on rank 0: {type(e).__name__}: {e}"
    outcome = share(outcome)
    if failure is not None:
        raise failure
    if isinstance(outcome, str):
        raise DataError(outcome)
    assert isinstance(outcome, list)
    return outcome


def open_data(
    config: DataConfig,
    *,
    vocab_size: int,
    global_batch: int,
    cache_dir: str | os.PathLike[str],
    eval_batches: int = 8,
    is_writer: bool = True,
    share: Callable[[object], object] = lambda value: value,
    progress: Progress | None = None,
) -> Data:
    """Open the data of a run, preparing it first where needed.

    Exactly one rank has `is_writer`; it tokenises into `cache_dir`, which every rank must see. `share` is called once on
    every rank and returns the writer's value everywhere (a broadcast of a small picklable object).
    evaluation is None with `eval_batches = 0`, `holdout = 0`, or held-out text shorter than one window (told to `progress`).

    Raises DataError, the same on every rank, for whatever is wrong with the data.
    """
    tell = progress or (lambda _: None)

    def build() -> list[PreparedSource]:
        found = prepare(config.sources, load_tokenizer(config.tokenizer), config, cache_dir, tell)
        check(found, vocab_size, config.seq_len, global_batch)
        return found

    prepared = _share_prepared(build, is_writer, share)
    tokenizer = load_tokenizer(config.tokenizer)
    train = GlobalBatches(
        [Source(p.name, p.weight, p.train.open()) for p in prepared],
        seq_len=config.seq_len,
        global_batch=global_batch,
        seed=config.seed,
        document_mask=config.document_mask,
    )
    heldout = [Source(p.name, p.weight, p.heldout.open()) if p.heldout else None for p in prepared]
    for p, source in zip(prepared, heldout, strict=True):
        if eval_batches and config.holdout and (source is None or not source.tokens.windows(config.seq_len)):
            tell(
                f"data: the held-out part of '{p.name}' is shorter than one window of {config.seq_len} tokens, "
                "so it is not evaluated"
            )
    evaluation = EvalBatches(
        heldout,
        tokenizer,
        seq_len=config.seq_len,
        batch_size=global_batch,
        max_batches=eval_batches,
        document_mask=config.document_mask,
    )
    return Data(
        train, evaluation if evaluation.num_batches else None, tokenizer, tuple(p.name for p in prepared), tuple(prepared)
    )
