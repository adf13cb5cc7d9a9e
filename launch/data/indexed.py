"""Token streams on disk in Megatron's `.bin/.idx` format, read through a memory map and written in one pass.

`.bin` holds the tokens of all sequences, one after the other. `.idx` holds, little-endian: the magic, the version
(u64, 1), a code of the token type (u8), the number of sequences and of document marks (u64 each), then the length of
every sequence (i32), its byte offset in `.bin` (i64), and the sequence at which each document starts, closed by the
number of sequences (i64).
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType

import numpy as np

from ...moe.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = MappingProxyType({1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"})
CHUNK = 1 << 20


def stem(path: str | os.PathLike[str]) -> str:
    """`path` without the `.bin` or `.idx` a user may have written."""
    text = os.fspath(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


class IndexedTokens:
    """The tokens of a `.bin/.idx` pair as one flat stream; documents follow each other without gaps.

    Opening checks the whole index against the `.bin`; raises DataError naming the file, what was expected and found.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = stem(path)
        self.idx_path, self.bin_path = self.path + ".idx", self.path + ".bin"
        for p in (self.idx_path, self.bin_path):
            if not os.path.isfile(p):
                raise DataError(f"{p}: there is no such file; an indexed source needs both {stem(p)}.bin and .idx")
        self._read_index()
        self._check_index()
        self._tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    def _read_index(self) -> None:
        path, size = self.idx_path, os.path.getsize(self.idx_path)
        with open(path, "rb") as f:
            head = f.read(HEADER.size)
        if head[: len(MAGIC)] != MAGIC:
            raise DataError(f"{path}: is not a Megatron index: expected the magic {MAGIC!r}, found {head[: len(MAGIC)]!r}")
        if len(head) < HEADER.size:
            raise DataError(f"{path}: is truncated: expected a header of {HEADER.size} bytes, found {len(head)}")
        _, version, code, sequences, marks = HEADER.unpack(head)
        if version != VERSION:
            raise DataError(f"{path}: expected format version {VERSION}, found {version}")
        if code not in DTYPES:
            raise DataError(f"{path}: expected a token type code of 1 to 8, found {code}")
        self.dtype = np.dtype(DTYPES[code])
        if self.dtype.kind == "f":
            raise DataError(f"{path}: expected an integer token type, found {self.dtype.name}; it holds no token ids")
        expected = HEADER.size + 12 * sequences + 8 * marks
        if size < expected:
            raise DataError(
                f"{path}: is truncated: expected {expected} bytes for {sequences} sequences and {marks} "
                f"document marks, found {size}"
            )
        if size == expected + sequences > expected:
            raise DataError(f"{path}: holds modes (a multimodal data set): expected text, {expected} bytes, found {size}")
        if size > expected:
            raise DataError(f"{path}: expected {expected} bytes, found {size}: what follows the document marks is unknown")
        if sequences == 0:
            raise DataError(f"{path}: is empty: expected at least one sequence, found none")
        at = HEADER.size
        self._sizes = np.memmap(path, "<i4", "r", at, (sequences,))
        self._pointers = np.memmap(path, "<i8", "r", at + 4 * sequences, (sequences,))
        if marks < 2:
            raise DataError(f"{path}: expected document marks 0 to {sequences}, found {marks} of them")
        self._marks = np.memmap(path, "<i8", "r", at + 12 * sequences, (marks,))

    def _check_index(self) -> None:
        """One pass over the index in chunks: an index that disagrees with itself would shift every token after the fault."""
        path, expected = self.idx_path, 0
        for at in range(0, len(self._sizes), CHUNK):
            sizes = self._sizes[at : at + CHUNK].astype(np.int64)
            if sizes.min() < 0:
                i = int(np.argmin(sizes >= 0))
                raise DataError(f"{path}: sequence {at + i}: expected a length of 0 or more, found {sizes[i]}")
            ends = expected + np.cumsum(sizes) * self.dtype.itemsize
            starts = ends - sizes * self.dtype.itemsize
            found = self._pointers[at : at + CHUNK]
            if (starts != found).any():
                i = int(np.argmax(starts != found))
                raise DataError(
                    f"{path}: sequence {at + i}: expected byte offset {starts[i]} from the lengths before it, found {found[i]}"
                )
            expected = int(ends[-1])
        size = os.path.getsize(self.bin_path)
        if size != expected:
            raise DataError(
                f"{self.bin_path}: expected {expected} bytes, the end of the last sequence in the .idx, found {size}; "
                "the pair does not belong together, or the copy is incomplete"
            )
        if expected == 0:
            raise DataError(f"{self.bin_path}: is empty: expected at least one token, found none")
        if self._marks[0] != 0 or self._marks[-1] != len(self._sizes):
            raise DataError(
                f"{path}: expected document marks from 0 to {len(self._sizes)}, found {self._marks[0]} to {self._marks[-1]}"
            )
        for at in range(0, len(self._marks), CHUNK):
            step = np.diff(self._marks[at : at + CHUNK + 1])
            if (step < 0).any():
                i = at + int(np.argmax(step < 0))
                raise DataError(f"{path}: document mark {i + 1}: expected {self._marks[i]} or more, found {self._marks[i + 1]}")

    def __len__(self) -> int:
        """Tokens in the stream."""
        return len(self._tokens)

    @property
    def documents(self) -> int:
        return len(self._marks) - 1

    def _start_of(self, document: int) -> int:
        sequence = int(self._marks[document])
        return int(self._pointers[sequence]) // self.dtype.itemsize if sequence < len(self._pointers) else len(self)

    @property
    def document_starts(self) -> np.ndarray:
        """Token offset at which each document starts, int64 [documents]. Reads the whole index."""
        ends = np.append(self._pointers // self.dtype.itemsize, len(self))
        return ends[self._marks[:-1]]

    def _first_from(self, offset: int) -> int:
        """The first document that starts at `offset` or later, by bisection in the memory map."""
        return bisect_left(range(self.documents), offset, key=self._start_of)

    def starts_between(self, start: int, stop: int) -> np.ndarray:
        """Offsets in [start, stop) at which a document starts, int64."""
        found = range(self._first_from(start), self._first_from(stop))
        return np.array([self._start_of(d) for d in found], dtype=np.int64)

    def documents_between(self, start: int, stop: int) -> int:
        """Documents that have a part of tokens [start, stop)."""
        return self._first_from(stop) - self._first_from(start + 1) + 1 if stop > start else 0

    def nearest_start(self, offset: int) -> int:
        """The document start closest to `offset`; the end of the stream counts as one."""
        after = self._first_from(offset)
        return min((self._start_of(d) for d in (max(0, after - 1), after)), key=lambda at: abs(at - offset))

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) as a fresh int64 array. Raises IndexError outside the stream."""
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {self.path}, which has {len(self)}")
        return self._tokens[start : start + length].astype(np.int64)


@dataclass(frozen=True)
class TokenSlice:
    """Tokens [start, stop) of a stream; offsets below count from `start`."""

    stream: IndexedTokens
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def windows(self, seq_len: int) -> int:
        """Windows of seq_len inputs and as many labels, one position later; neighbours share one token."""
        return max(0, len(self) - 1) // seq_len

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens as a fresh int64 array. Raises IndexError outside the slice."""
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of a slice of {len(self)}")
        return self.stream.read(self.start + start, length)

    def document_ids(self, start: int, length: int) -> np.ndarray:
        """Number of the document each token belongs to, counted from 0 at `start`, int32 [length]."""
        absolute = self.start + start
        marks = np.zeros(length, dtype=np.int32)
        marks[self.stream.starts_between(absolute + 1, absolute + length) - absolute] = 1
        return np.cumsum(marks, dtype=np.int32)


class IndexedWriter:
    """Writes a `.bin/.idx` pair, one sequence per document, in one pass; memory grows by 4 bytes per document.

    A context manager: the pair appears under its name when the block ends, the `.idx` last, and not at all if it fails.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: np.dtype | type) -> None:
        self.path = stem(path)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {np.dtype(name): code for code, name in DTYPES.items()}
        if self.dtype.kind not in "iu" or self.dtype not in codes:
            raise DataError(f"{self.path}: {self.dtype.name} is no token type of the indexed format; use uint16, int32 or int64")
        self._code = codes[self.dtype]
        self._range = np.iinfo(self.dtype)
        self._sizes = array("i")
        self._open = 0
        self.tokens = 0
        self.max_id = -1
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        self._temporary = f"{self.path}.tmp-{os.getpid()}"
        self._file = open(self._temporary + ".bin", "wb", buffering=1 << 20)  # noqa: SIM115 - closed by __exit__

    @property
    def documents(self) -> int:
        return len(self._sizes)

    def append(self, ids: np.ndarray) -> None:
        """Add ids to the current document. Raises DataError for an id the token type cannot hold."""
        if len(ids) == 0:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < self._range.min or high > self._range.max:
            bad = low if low < self._range.min else high
            raise DataError(f"{self.path}: token id {bad} does not fit into {self.dtype.name}")
        self._file.write(np.ascontiguousarray(ids, dtype=self.dtype).tobytes())
        self._open += len(ids)
        self.tokens += len(ids)
        self.max_id = max(self.max_id, high)

    def end_document(self) -> None:
        """Close the current document."""
        if self._open > np.iinfo(np.int32).max:
            raise DataError(f"{self.path}: document {self.documents} has {self._open} tokens, more than the format can count")
        self._sizes.append(self._open)
        self._open = 0

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        else:
            self._discard()

    def _discard(self) -> None:
        self._file.close()
        for suffix in (".bin", ".idx"):
            Path(self._temporary + suffix).unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._open:
            self.end_document()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sizes = np.frombuffer(self._sizes, dtype=np.int32) if self._sizes else np.zeros(0, np.int32)
        with open(self._temporary + ".idx", "wb") as f:
            f.write(HEADER.pack(MAGIC, VERSION, self._code, len(sizes), len(sizes) + 1))
            f.write(sizes.astype("<i4").tobytes())
            ends = np.cumsum(sizes, dtype=np.int64)
            f.write(((ends - sizes) * self.dtype.itemsize).astype("<i8").tobytes())
            f.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
            f.flush()
            os.fsync(f.fileno())
        # Without its old index a pair is incomplete, never a new .bin under an old .idx.
        Path(self.path + ".idx").unlink(missing_ok=True)
        os.replace(self._temporary + ".bin", self.path + ".bin")
        os.replace(self._temporary + ".idx", self.path + ".idx")
