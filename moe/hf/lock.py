"""A folder that one process at a time writes."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Make the folder and hold the lock file `name` in it. The kernel frees it when the process ends, however it ends.

    Raises CheckpointError where the folder cannot be made, or another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("w")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{folder} is being written by another process") from error
        yield
