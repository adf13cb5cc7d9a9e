"""Writes checkpoints of any size: everything is laid out first, then streamed, and a killed run goes on where it was.

While it is written, a checkpoint OUT is in the folder OUT.partial:

    lock                        held by the process that writes
    journal.json                what is being written, and how far it has come; replaced every `journal_bytes`
    model-00001-of-000NN...     headers first, then tensors, from the first byte to the last

Every shard's bytes follow from the layout alone, so going on means cutting the shard under way at the journalled byte. The disk
is asked to keep what was written in a thread beside, and the journal names only what it has kept: writing goes on meanwhile.
Last of all the folder is renamed. Bytes never pass through this process where the kernel can copy them from a source, or, for
what had to be computed, from the first place where it was written.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError
from .codec import item_bytes
from .copying import RangeCopier, write_all
from .files import CONFIG, INDEX, Progress, file_sha256
from .journal import JOURNAL, Background, Journal, sync_folder, write_durably
from .lock import locked
from .matrix_base import Chunk, FileRange
from .shards import Layout, Shard, Slot, Tensors, as_text, lay_out, plan_hash

MANIFEST, LOCK = "moefold.json", "lock"
SHARD_BYTES = 5 << 30
JOURNAL_BYTES = 256 << 20
ROOM_BYTES = 1 << 20
"""What is given up of a shard on a full disk, so that the journal can be written."""


@dataclass(frozen=True)
class Written:
    """A checkpoint that was written.

    folder: where. files: the files with tensors, and their sizes in bytes. digests: their SHA-256, if asked for.
    tensor_bytes: without headers. resumed_bytes: what earlier, interrupted runs had written. seconds: of this run.
    """

    folder: Path
    files: Mapping[str, int]
    digests: Mapping[str, str]
    tensor_bytes: int
    resumed_bytes: int
    seconds: float


def write_checkpoint(
    out: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    manifest: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    carry: Sequence[Path] = (),
    progress: Progress | None = None,
    digests: bool = False,
    journal_bytes: int = JOURNAL_BYTES,
) -> Written:
    """Write a Hugging Face checkpoint: config.json, safetensors files, their index if there are several, and moefold.json.

    Files are the same, byte for byte, on every run and whatever interrupts it. Called again with the same arguments after an
    interruption, it goes on; what the interrupted run had written is kept in OUT.partial.

    Args:
        out: the folder to make; must not exist, or be empty.
        config: config.json.
        tensors: matrix and dtype of every tensor, in the order of the files.
        manifest: where the checkpoint comes from; becomes moefold.json, with the sizes of files. Nothing in it may depend on when
            it is written, or a killed run cannot go on.
        shard_bytes: most bytes of tensors in a file.
        carry: files to copy into the folder.
        progress: called with bytes written (interrupted runs' included), in total, and the seconds of this run.
        digests: also hash every file with SHA-256, in a thread beside. About 1 GB/s of one core, so slower than a fast disk.
        journal_bytes: how much of the work is at stake when the process is killed.

    Raises:
        CheckpointError: the folder is not empty, or another process writes it; OUT.partial belongs to something else, or a source
            has changed since; the disk is too small, or is full now; a source cannot be read.
    """
    out = Path(out).absolute()
    layout = lay_out(tensors, shard_bytes)
    _check_names(layout, carry, manifest)
    plan = plan_hash(layout, config, manifest, carry)
    begin_s = time.monotonic()
    before = _journal_left(out)
    if before is not None and before.plan == plan:
        # killed after the renaming: only the journal is left to remove
        return _tidy(out, layout, before.digests, layout.nbytes, begin_s)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder: choose another, or remove it")
    sources = frozenset(carry).union(*(matrix.sources() for matrix, _ in tensors.values()))
    wanted = Journal.begun(plan, sources)
    partial = out.with_name(out.name + ".partial")
    with locked(partial, LOCK):
        journal = _begin(partial, wanted)
        stream = _Stream(partial, layout, journal, journal_bytes, progress if progress is not None else _nobody, digests)
        resumed = stream.done
        with _kept(partial, stream):
            _check_space(partial, layout)
            stream.run()
            _write_small(partial, config, layout, carry, manifest, stream.digests)
        partial.rename(out)
        sync_folder(out.parent)
    return _tidy(out, layout, stream.digests, resumed, begin_s)


class _Stream:
    """Writes the shards of a layout into a folder, from where a journal says."""

    def __init__(self, folder: Path, layout: Layout, journal: Journal, every: int, progress: Progress, digests: bool):
        self.folder, self.layout, self.journal, self.every, self.progress = folder, layout, journal, every, progress
        self.digests: dict[str, str] = dict(journal.digests)
        self.done = self.kept = self._before(journal.shard, journal.position)
        self._copier, self._written = RangeCopier(), dict[str, FileRange]()
        self._begin_s, self._fd, self._number, self._position, self._asked = time.monotonic(), -1, journal.shard, 0, 0
        self._keeper, self._lost = Background("moefold-keep"), False
        self._hasher = Background("moefold-hash") if digests else None

    def run(self) -> None:
        for number, shard in enumerate(self.layout.shards):
            if number >= self.journal.shard:
                self._shard(number, shard, self.journal.position if number == self.journal.shard else 0)
            else:
                self._remember(shard.name, shard.slots)
            if self._hasher is not None and shard.name not in self.digests:
                self._hasher.add(lambda name=shard.name: self._hash(name))  # type: ignore[misc]
        self._keeper.wait()
        if self._hasher is not None:
            self._hasher.wait()

    def close(self, keep: bool, full: bool = False) -> None:
        """Stop the threads. keep: the run does not go on, so journal what was written up to now. full: make room for that."""
        self._keeper.close(drop=False)
        if self._hasher is not None:
            self._hasher.close(drop=True)
        self._copier.close()
        if self._fd < 0:
            return
        # whatever stopped the run is being told; the last journal still holds if this fails as well
        with suppress(OSError):
            if keep and not self._lost:
                end = max(0, self._position - (ROOM_BYTES if full else 0))
                if self._before(self._number, end) > self.kept:
                    os.ftruncate(self._fd, end)
                    self._keep(self._fd, self._number, end)
        os.close(self._fd)
        self._fd = -1

    def _shard(self, number: int, shard: Shard, start: int) -> None:
        path = self.folder / shard.name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._fd, self._number, self._position, self._asked = fd, number, start, start
        there = os.fstat(fd).st_size
        if there < start:
            raise CheckpointError(f"{path} has {there} bytes, the journal says {start}: remove {self.folder} to start again")
        os.ftruncate(fd, start)  # what lies behind it the disk may or may not have kept
        self._put(memoryview(shard.header)[start:])
        for slot in shard.slots:
            if slot.end > self._position:
                for chunk in self._chunks(slot, self._position - slot.offset):
                    self._put(chunk)
            if slot.end > start and self._position != slot.end:
                raise AssertionError(f"{slot.name} ends at byte {self._position} of {shard.name}, {slot.end} was laid out")
            self._remember(shard.name, (slot,))
        self._keeper.wait()
        self._keeper.add(lambda: self._end(fd, number))
        self._fd = -1

    def _remember(self, file: str, slots: Sequence[Slot]) -> None:
        """Tensors that are written now: equal ones are copied from them."""
        for slot in slots:
            self._written.setdefault(slot.key, FileRange(self.folder / file, slot.offset, slot.nbytes))

    def _chunks(self, slot: Slot, skip: int) -> Iterator[Chunk]:
        """The bytes of a tensor but the first `skip`."""
        earlier = self._written.get(slot.key)
        if earlier is not None:
            yield FileRange(earlier.path, earlier.offset + skip, earlier.nbytes - skip)
            return
        row, skip = divmod(skip, max(1, slot.matrix.cols * item_bytes(slot.dtype)))
        for chunk in slot.matrix.chunks(slot.dtype, row):
            size = chunk.nbytes
            if skip >= size:
                skip -= size
            elif isinstance(chunk, FileRange):
                yield FileRange(chunk.path, chunk.offset + skip, size - skip)
                skip = 0
            else:
                yield chunk[skip:]
                skip = 0

    def _put(self, chunk: Chunk) -> None:
        if isinstance(chunk, FileRange):
            self._copier.copy(chunk, self._fd, self._position, self._went)
        elif chunk.nbytes:
            write_all(self._fd, chunk, self._position)
            self._went(chunk.nbytes)

    def _went(self, nbytes: int) -> None:
        self._position += nbytes
        self.done += nbytes
        if self._position - self._asked >= self.every and self._keeper.idle():
            self._asked = self._position
            fd, number, position = self._fd, self._number, self._position
            self._keeper.add(lambda: self._keep(fd, number, position))
        self.progress(self.done, self.layout.nbytes, time.monotonic() - self._begin_s)

    def _keep(self, fd: int, number: int, position: int) -> None:
        """Have the disk keep a shard's bytes, then say so in the journal."""
        self._sync(fd)
        self._note(number, position)

    def _end(self, fd: int, number: int) -> None:
        try:
            self._sync(fd)
        finally:
            os.close(fd)
        self._note(number + 1, 0)

    def _sync(self, fd: int) -> None:
        try:
            os.fdatasync(fd)
        except OSError:
            # a disk that did not keep something says so once only: after that no journal may be written any more
            self._lost = True
            raise

    def _note(self, number: int, position: int) -> None:
        Journal(self.journal.plan, self.journal.sources, number, position, dict(self.digests)).write(self.folder)
        self.kept = self._before(number, position)

    def _before(self, number: int, position: int) -> int:
        """Bytes of all files up to a position."""
        return sum(shard.nbytes for shard in self.layout.shards[:number]) + position

    def _hash(self, name: str) -> None:
        self.digests[name] = file_sha256(self.folder / name)


@contextmanager
def _kept(folder: Path, stream: _Stream) -> Iterator[None]:
    """Ends the stream, and says of a failed one what has been kept."""
    try:
        yield
    except BaseException as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        stream.close(keep=True, full=full)
        if not isinstance(error, OSError):
            raise
        total = stream.layout.nbytes
        reason = f"no space is left on the disk of {folder}" if full else f"{folder} cannot be written: {error}"
        way = f"make {_size(total - stream.kept)} free and run it again" if full else "run it again"
        raise CheckpointError(
            f"{reason}. {_size(stream.kept)} of {_size(total)} are kept there: {way} to go on from them, or remove {folder}"
        ) from error
    stream.close(keep=False)


def _begin(folder: Path, wanted: Journal) -> Journal:
    """The journal to go on from, after writing it where there is none."""
    found = Journal.read(folder)
    (folder / (JOURNAL + ".new")).unlink(missing_ok=True)
    if found is None:
        others = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
        if others:
            raise CheckpointError(f"{folder} has {others[0]} but no {JOURNAL}, so it is not an interrupted writing: move it away")
        wanted.write(folder)
        return wanted
    found.check(wanted, folder)
    return found


def _journal_left(out: Path) -> Journal | None:
    """The journal of a finished checkpoint, if it was not removed. Any other file of that name belongs to somebody else."""
    try:
        return Journal.read(out) if out.is_dir() else None
    except CheckpointError:
        return None


def _tidy(out: Path, layout: Layout, digests: Mapping[str, str], resumed: int, begin_s: float) -> Written:
    """Remove what only an unfinished checkpoint has, the journal last: with it, a run that is killed here can be called again."""
    for name in (LOCK, JOURNAL):
        (out / name).unlink(missing_ok=True)
    files = MappingProxyType({shard.name: shard.nbytes for shard in layout.shards})
    return Written(out, files, MappingProxyType(dict(digests)), layout.tensor_bytes, resumed, time.monotonic() - begin_s)


def _check_names(layout: Layout, carry: Sequence[Path], manifest: Mapping[str, Any]) -> None:
    ours = {CONFIG, INDEX, MANIFEST, LOCK, JOURNAL, *(shard.name for shard in layout.shards)}
    for path in carry:
        if path.name in ours:
            raise ValueError(
                f"{path} cannot be carried along: the checkpoint has a {path.name} of its own, or another is carried"
            )
        ours.add(path.name)
    if "files" in manifest:
        raise ValueError("a manifest cannot have 'files': the files' sizes are put there")


def _check_space(folder: Path, layout: Layout) -> None:
    there = sum((folder / shard.name).stat().st_size for shard in layout.shards if (folder / shard.name).is_file())
    disk = os.statvfs(folder)
    free, need = disk.f_bavail * disk.f_frsize, layout.nbytes - there
    if free < need:
        raise CheckpointError(
            f"{_size(need)} are to be written to {folder}, but its disk has {_size(free)} free: make room, or choose another disk"
        )


def _write_small(
    folder: Path,
    config: Mapping[str, Any],
    layout: Layout,
    carry: Sequence[Path],
    manifest: Mapping[str, Any],
    digests: dict[str, str],
) -> None:
    write_durably(folder / CONFIG, as_text(config))
    if layout.index is not None:
        write_durably(folder / INDEX, layout.index)
    for path in carry:
        shutil.copyfile(path, folder / path.name)
        with (folder / path.name).open("rb") as file:
            os.fsync(file.fileno())
    files = {
        shard.name: {"bytes": shard.nbytes, **({"sha256": digests[shard.name]} if shard.name in digests else {})}
        for shard in layout.shards
    }
    write_durably(folder / MANIFEST, as_text({**manifest, "files": files}))
    sync_folder(folder)


def _nobody(done: int, total: int, seconds: float) -> None:
    """Progress that nobody asked for."""


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 28 else f"{nbytes / 2**20:.1f} MiB"
