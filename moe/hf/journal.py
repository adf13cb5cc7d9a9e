"""How far the writing of a checkpoint has come, in a file beside its shards: what a killed run goes on from."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ..errors import CheckpointError

JOURNAL = "journal.json"
SCHEMA = 1


@dataclass(frozen=True)
class Journal:
    """plan: hash of what is being written. sources: size and time of change of every file that is read, by path.

    shard, position: everything in earlier shards, and the bytes of this one before the position, are on the disk.
    digests: SHA-256 of shards, by name, as far as known.
    """

    plan: str
    sources: Mapping[str, tuple[int, int]]
    shard: int = 0
    position: int = 0
    digests: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def begun(cls, plan: str, sources: Iterable[Path]) -> Journal:
        """That of a writing of which nothing is done. Raises CheckpointError for a source that cannot be read."""
        return cls(plan, {str(path): _stamp(path) for path in sorted(sources)})

    def check(self, wanted: Journal, folder: Path) -> None:
        """Raise CheckpointError unless what a folder has the journal of can be gone on with as what is `wanted`."""
        again = f"remove {folder} to start again"
        if self.plan != wanted.plan:
            raise CheckpointError(
                f"{folder} was begun with other options, sources or another version: use those to go on, or {again}"
            )
        changed = [path for path, stamp in wanted.sources.items() if self.sources.get(path) != stamp]
        if changed:
            raise CheckpointError(f"{changed[0]} has changed since {folder} was begun: {again}")

    def write(self, folder: Path) -> None:
        """Replace the journal; after a power cut there is the old one or the new one."""
        value = {
            "schema": SCHEMA,
            "plan": self.plan,
            "sources": dict(self.sources),
            "shard": self.shard,
            "position": self.position,
        }
        value["digests"] = dict(self.digests)
        sync_folder(folder)  # first the names of the files that it speaks of
        write_durably(folder / JOURNAL, json.dumps(value, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal of a folder, None if it has none. Raises CheckpointError for one that is not ours."""
        try:
            value = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
            if value.pop("schema") != SCHEMA:
                raise ValueError("it has another schema")
            value["sources"] = {path: (int(size), int(time_ns)) for path, (size, time_ns) in value["sources"].items()}
            return cls(**value)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / JOURNAL} cannot be read ({type(error).__name__}: {error}), so nobody knows how far this "
                f"checkpoint has come; remove {folder} to start again"
            ) from error


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def write_durably(path: Path, text: str) -> None:
    """Write a file so that after a power cut it is there as a whole, or what was there before. `sync_folder` makes it certain."""
    aside = path.with_name(path.name + ".new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Background:
    """One thread that does pieces of work one after another, so that writing does not wait for the disk to have written."""

    def __init__(self, name: str):
        self._wake = threading.Condition()
        self._work: list[Callable[[], None]] = []
        self._busy = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def idle(self) -> bool:
        """Whether all that was asked for is done. Raises what has failed."""
        with self._wake:
            self._raise()
            return not self._busy and not self._work

    def add(self, work: Callable[[], None]) -> None:
        with self._wake:
            self._raise()
            self._work.append(work)
            self._wake.notify_all()

    def wait(self) -> None:
        """Wait until all is done. Raises what has failed."""
        with self._wake:
            self._wake.wait_for(lambda: self._error is not None or (not self._busy and not self._work))
            self._raise()

    def close(self, drop: bool) -> None:
        """End the thread, after all that it was asked for (unless something has failed), or, with drop, what it has begun."""
        with self._wake:
            self._closed = True
            if drop:
                self._work.clear()
            self._wake.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._work)
                if not self._work or self._error is not None:
                    return
                work, self._busy = self._work.pop(0), True
            try:
                work()
            except BaseException as error:  # whoever adds or waits is told
                self._error = error
            with self._wake:
                self._busy = False
                self._wake.notify_all()
