"""Sources of text as token streams on disk: tokenised once, split into training and held-out, checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...moe.errors import DataError
from ..settings import DataConfig, SourceConfig
from .documents import File, Problems, held_out, label, list_files, read_documents
from .indexed import IndexedTokens, IndexedWriter, TokenSlice, stem
from .tokenizer import Tokenizer

FORMAT = 1
SCAN_TOKENS = 1 << 24
Progress = Callable[[str], None]


@dataclass(frozen=True)
class TokenRange:
    """Tokens [start, stop) of the stream at `path`. bytes: UTF-8 bytes of their text; None where nobody counted them."""

    path: str
    start: int
    stop: int
    documents: int
    bytes: int | None

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    def open(self) -> TokenSlice:
        """Map the tokens. Raises DataError if the files are missing or damaged."""
        stream = IndexedTokens(self.path)
        if self.stop > len(stream):
            raise DataError(f"{stream.bin_path}: expected at least {self.stop} tokens, found {len(stream)}")
        return TokenSlice(stream, self.start, self.stop)


@dataclass(frozen=True)
class PreparedSource:
    """One source, ready to be read. Small and picklable: one rank prepares, all ranks open."""

    name: str
    weight: float
    train: TokenRange
    heldout: TokenRange | None
    min_id: int
    max_id: int


def _fingerprint(source: SourceConfig, files: Sequence[File], tokenizer: Tokenizer, holdout: float) -> str:
    """Everything the tokens depend on; the order of samples (seed, weights) does not change them."""
    seen = [FORMAT, source.type, source.field, tokenizer.fingerprint, holdout, [(f.name, f.size, f.mtime_ns) for f in files]]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _folder(source: SourceConfig, files: Sequence[File], tokenizer: Tokenizer, holdout: float, cache_dir: str) -> Path:
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", source.domain)
    return Path(cache_dir) / f"{safe}-{_fingerprint(source, files, tokenizer, holdout)}"


class _Split:
    """Writes documents into one stream (all for training) or two (some held out), counting text bytes."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, holdout: float) -> None:
        self.tokenizer, self.holdout = tokenizer, holdout
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        names = ("train", "heldout") if holdout else ("train",)
        self.writers = {n: IndexedWriter(folder / n, dtype) for n in names}
        self.bytes = dict.fromkeys(names, 0)
        self.empty = 0

    def write(self, source: SourceConfig, files: list[File], problems: Problems) -> None:
        eos = np.array([self.tokenizer.eos_id], dtype=np.int32)
        for document in read_documents(source, files, problems):
            side = "heldout" if held_out(document.key, self.holdout) else "train"
            writer, before = self.writers[side], self.writers[side].tokens
            for piece in document.pieces:
                writer.append(self.tokenizer.encode(piece))
                self.bytes[side] += len(piece.encode("utf-8"))
            if writer.tokens > before:  # an empty document is nothing to learn from, not even its end
                writer.append(eos)
                writer.end_document()
            else:
                self.empty += 1

    def close(self, error: bool) -> None:
        for w in self.writers.values():
            kind = DataError if error or not w.tokens else None
            w.__exit__(kind, None, None)


def _write_split(
    source: SourceConfig, files: list[File], tokenizer: Tokenizer, share: float, folder: Path, problems: Problems
) -> _Split:
    before = len(problems.found)
    split = _Split(folder, tokenizer, share)
    try:
        split.write(source, files, problems)
    except BaseException:
        split.close(error=True)
        raise
    split.close(error=len(problems.found) > before)
    return split


def _tokenise(
    source: SourceConfig, files: list[File], tokenizer: Tokenizer, holdout: float, folder: Path, problems: Problems
) -> int:
    """Fill `folder` with the streams of a source and `meta.json`; adds to `problems` what keeps it from doing so.

    Returns the number of documents left out because they are empty.
    """
    before = len(problems.found)
    split = _write_split(source, files, tokenizer, holdout, folder, problems)
    if len(problems.found) > before:
        return 0
    full = {name: w for name, w in split.writers.items() if w.tokens}
    if not full:
        problems.add(label(source), f"path = '{source.path}': no text in any of its documents")
        return 0
    if len(full) < len(split.writers):  # too few documents to draw from: the end of the text is held out instead
        (name,) = full
        stream = IndexedTokens(folder / name)
        cut = _tail(stream, holdout)
        ranges = {
            side: _counted(stream, name, start, stop, tokenizer)
            for side, start, stop in (("train", 0, cut), ("heldout", cut, len(stream)))
            if stop > start
        }
    else:
        ranges = {n: TokenRange(n, 0, w.tokens, w.documents, split.bytes[n]) for n, w in full.items()}
    meta = {
        "ranges": {n: asdict(r) for n, r in ranges.items()},
        "max_id": max(w.max_id for w in full.values()),
        "source": source.domain,
        "tokenizer": tokenizer.name,
    }
    _write_json(folder / "meta.json", meta)
    return split.empty


def _write_json(path: Path, value: object) -> None:
    """Under its name only when complete, also after a power cut."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _tail(stream: IndexedTokens, holdout: float) -> int:
    """Where the held-out end of a stream begins: at a document's start if that changes neither side by more than half."""
    cut = round(len(stream) * (1 - holdout))
    near = stream.nearest_start(cut)
    if abs(near - cut) <= min(cut, len(stream) - cut) / 2:
        cut = near
    return min(max(cut, 1), len(stream))


def _counted(stream: IndexedTokens, path: str, start: int, stop: int, tokenizer: Tokenizer) -> TokenRange:
    chunks = ((at, min(SCAN_TOKENS, stop - at)) for at in range(start, stop, SCAN_TOKENS))
    size = sum(tokenizer.count_bytes(stream.read(*chunk)) for chunk in chunks)
    return TokenRange(path, start, stop, stream.documents_between(start, stop), size)


def _load(folder: Path, source: SourceConfig) -> PreparedSource | None:
    """A finished folder of the cache; None if there is none. Raises DataError if it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    ranges = {n: TokenRange(**fields | {"path": str(folder / fields["path"])}) for n, fields in meta["ranges"].items()}
    for r in ranges.values():
        r.open()
    return PreparedSource(source.domain, source.weight, ranges["train"], ranges.get("heldout"), 0, meta["max_id"])


def _prepare_text(
    source: SourceConfig, tokenizer: Tokenizer, holdout: float, cache_dir: str, problems: Problems, progress: Progress
) -> PreparedSource | None:
    before = len(problems.found)
    files = list_files(source, problems)
    if len(problems.found) > before:
        return None
    folder = _folder(source, files, tokenizer, holdout, cache_dir)
    try:
        found = _load(folder, source)
    except DataError as e:
        progress(f"data: the token cache is damaged, so '{source.domain}' is tokenised again: {e}")
        shutil.rmtree(folder)
        found = None
    if found:
        return found
    size = sum(f.size for f in files)
    progress(f"data: tokenising '{source.domain}': {len(files)} file{'s' if len(files) != 1 else ''}, {size / 1e6:.1f} MB")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        empty = _tokenise(source, files, tokenizer, holdout, temporary, problems)
        if len(problems.found) > before:
            return None
        if empty and source.path:
            progress(f"data: '{source.domain}': left out {empty} empty document{'s' if empty != 1 else ''}")
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "meta.json").exists():
                raise
            # another run finished the same folder first; both hold the same tokens
        return _load(folder, source)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _scan_ids(stream: IndexedTokens, note: Path, progress: Progress) -> tuple[int, int]:
    """Smallest and largest id of a stream; the answer is kept in `note`, whose name identifies the files."""
    if note.exists():
        low, high = json.loads(note.read_text(encoding="utf-8"))
        return int(low), int(high)
    low, high = np.iinfo(np.int64).max, -1
    for i, at in enumerate(range(0, len(stream), SCAN_TOKENS)):
        if i % 64 == 63:
            progress(f"data: checking token ids of {stream.bin_path}: {100 * at // len(stream)} %")
        ids = stream.read(at, min(SCAN_TOKENS, len(stream) - at))
        low, high = min(low, int(ids.min())), max(high, int(ids.max()))
    note.parent.mkdir(parents=True, exist_ok=True)
    _write_json(note, [low, high])
    return low, high


def _prepare_indexed(
    source: SourceConfig, tokenizer: Tokenizer, holdout: float, cache_dir: str, problems: Problems, progress: Progress
) -> PreparedSource | None:
    assert source.path is not None
    path = os.path.abspath(stem(os.path.expanduser(source.path)))
    try:
        stream = IndexedTokens(path)
    except DataError as e:
        problems.add(label(source), str(e))
        return None
    files = [File(p, p, os.path.getsize(p), os.stat(p).st_mtime_ns) for p in (stream.bin_path, stream.idx_path)]
    low, high = _scan_ids(stream, _folder(source, files, tokenizer, 0.0, cache_dir).with_suffix(".json"), progress)
    if low < 0 or high >= tokenizer.vocab_size:
        problems.add(
            label(source),
            f"holds token id {low if low < 0 else high}, but data.tokenizer = '{tokenizer.name}' has ids 0 to "
            f"{tokenizer.vocab_size - 1}; set data.tokenizer to the one the files were made with",
        )
        return None
    cut = _tail(stream, holdout)
    train, heldout = (
        TokenRange(path, start, stop, stream.documents_between(start, stop), None)
        for start, stop in ((0, cut), (cut, len(stream)))
    )
    return PreparedSource(source.domain, source.weight, train, heldout if heldout.tokens else None, low, high)


def prepare(
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    config: DataConfig,
    cache_dir: str | os.PathLike[str],
    progress: Progress | None = None,
) -> list[PreparedSource]:
    """Turn sources into token streams, each split into training and held-out tokens.

    Text is tokenised once into `cache_dir`, in a folder named by a hash of the source's settings, tokenizer and files
    (name, size, modification time), and reused from there; a document is followed by the end-of-document token.
    `config.holdout` of the documents, chosen by a hash of their relative name (jsonl: of their text), are held out; where
    that leaves nothing on one side, as with a single file, the end of the text is. Indexed files are used in
    place; their last documents are held out.

    progress: called with one line of text now and then. Raises DataError with all problems of all sources (at most 20).
    """
    tell, problems, prepared = progress or (lambda _: None), Problems(), []
    for source in sources:
        if problems.full:
            break
        work = _prepare_indexed if source.type == "indexed" else _prepare_text
        try:
            found = work(source, tokenizer, config.holdout, os.fspath(cache_dir), problems, tell)
        except OSError as e:
            problems.add(label(source), f"{e.filename or cache_dir}: {e.strerror or e}")
            continue
        if found:
            prepared.append(found)
    problems.raise_if()
    return prepared


def check(prepared: Sequence[PreparedSource], vocab_size: int, seq_len: int, global_batch: int) -> None:
    """Raise DataError if the streams cannot train this model: ids outside the vocabulary, or too little text."""
    problems, total = Problems(), 0
    for p in prepared:
        if p.max_id >= vocab_size:
            problems.add(
                f"data.sources '{p.name}'",
                f"holds token id {p.max_id}, but model.vocab_size = {vocab_size}; set model.vocab_size to {p.max_id + 1} or more",
            )
        windows = max(0, p.train.tokens - 1) // seq_len
        total += windows
        if windows == 0:
            problems.add(
                f"data.sources '{p.name}'",
                f"has {p.train.tokens} training tokens, fewer than one window of data.seq_len + 1 = {seq_len + 1}; "
                "give more text, or a smaller data.seq_len",
            )
    if total < global_batch:
        problems.add(
            "data.sources",
            f"hold {total} windows of {seq_len} tokens for training, but one global batch needs "
            f"train.global_batch = {global_batch}; give more text, or a smaller train.global_batch or data.seq_len",
        )
    problems.raise_if()
