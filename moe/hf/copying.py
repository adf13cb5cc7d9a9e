"""Copies of byte ranges between files, inside the kernel where it can: no byte then passes through this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from .matrix_base import FileRange

PIECE_BYTES = 32 << 20
"""At most so many bytes are copied by one call, so that progress is seen and Ctrl-C is heard."""

CANNOT = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.ETXTBSY})
"""What the kernel answers where two file systems, or two places of one file, do not support a way of copying."""


class RangeCopier:
    """Copies ranges of files; keeps the last source open, as ranges of one file come together."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._source = -1

    def copy(self, chunk: FileRange, target: int, offset: int, told: Callable[[int], None]) -> None:
        """Copy `chunk` to `offset` of the open file `target`. told: called with the bytes of every piece.

        Raises CheckpointError if the source cannot be read or ends too early, OSError if the target cannot be written.
        """
        self._open(chunk.path)
        ways = [_in_file_system, _in_kernel, _through_memory]
        done = 0
        while done < chunk.nbytes:
            want = min(PIECE_BYTES, chunk.nbytes - done)
            try:
                count = ways[0](self._source, target, chunk.offset + done, offset + done, want)
            except OSError as error:
                if len(ways) == 1 or error.errno not in CANNOT:
                    raise
                count = 0
            if count:
                told(count)
                done += count
            elif len(ways) > 1:
                # some file systems also answer "nothing copied" where they mean that they cannot
                ways.pop(0)
            else:
                raise CheckpointError(f"{chunk.path} ends at byte {chunk.offset + done}, inside a tensor: it is truncated")

    def _open(self, path: Path) -> None:
        if path == self._path:
            return
        self.close()
        try:
            self._source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        self._path = path

    def close(self) -> None:
        if self._path is not None:
            os.close(self._source)
            self._path = None


def write_all(target: int, piece: memoryview, offset: int) -> None:
    """Write all of `piece` to `offset` of an open file."""
    while piece:
        count = os.pwrite(target, piece, offset)
        piece, offset = piece[count:], offset + count


def _in_file_system(source: int, target: int, from_byte: int, to_byte: int, count: int) -> int:
    """Shares extents where the file system can."""
    return os.copy_file_range(source, target, count, from_byte, to_byte)


def _in_kernel(source: int, target: int, from_byte: int, to_byte: int, count: int) -> int:
    """Also between file systems."""
    os.lseek(target, to_byte, os.SEEK_SET)
    return os.sendfile(target, source, from_byte, count)


def _through_memory(source: int, target: int, from_byte: int, to_byte: int, count: int) -> int:
    piece = os.pread(source, min(count, 1 << 20), from_byte)
    write_all(target, memoryview(piece), to_byte)
    return len(piece)
