"""Interrupted writing of checkpoints: after every kind of interruption it goes on to the same bytes."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import in_child
from moefold.moe.errors import CheckpointError
from moefold.moe.hf import copying, writer
from moefold.moe.hf.codec import Array
from moefold.moe.hf.files import SINGLE
from moefold.moe.hf.journal import Journal
from moefold.moe.hf.matrix import Matrix
from moefold.moe.hf.shards import lay_out, plan_hash
from moefold.moe.hf.writer import JOURNAL, LOCK
from written import CONFIG, MANIFEST, SHARD_BYTES, contents, mixture, write


def test_goes_on_from_every_position(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All states that a kill or a power cut can leave: a journal that names a position, and anything behind it."""
    for name in ("fsync", "fdatasync"):  # no power will be cut here
        monkeypatch.setattr(os, name, lambda fd: None)
    tensors = mixture(source)
    layout = lay_out(tensors, SHARD_BYTES)
    carry = [source / "tokenizer.json"]
    start = Journal.begun(plan_hash(layout, CONFIG, MANIFEST, carry), (source / SINGLE, *carry))
    places = [(n, p) for n, shard in enumerate(layout.shards) for p in range(shard.nbytes + 1)]
    rng = np.random.default_rng(1)
    chosen = [(0, 0), (0, 1), (1, 8), *(places[i] for i in rng.integers(0, len(places), 24)), (len(layout.shards), 0)]
    for case, (number, position) in enumerate(chosen):
        out = tmp_path / f"out{case}"
        partial = tmp_path / f"out{case}.partial"
        partial.mkdir()
        for i, shard in enumerate(layout.shards):
            kept = len(whole[shard.name]) if i < number else position if i == number else 0
            (partial / shard.name).write_bytes(
                whole[shard.name][:kept] + rng.bytes(int(rng.integers(0, 200)) if i >= number else 0)
            )
        replace(start, shard=number, position=position).write(partial)
        (partial / LOCK).touch()
        (partial / (JOURNAL + ".new")).write_text("half a jour")
        found = write(source, out)
        assert contents(out) == whole, f"going on from byte {position} of file {number}"
        assert found.resumed_bytes == sum(shard.nbytes for shard in layout.shards[:number]) + position


def test_killed_again_and_again(source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", 700)
    out, total = tmp_path / "out", sum(len(data) for name, data in whole.items() if name.startswith("model-"))

    def run(until: float) -> None:
        def progress(done: int, of: int, seconds: float) -> None:
            if done >= until:
                os.kill(os.getpid(), signal.SIGKILL)

        write(source, out, journal_bytes=1, progress=progress)

    for share in (0.0, 0.1, 0.3, 0.55, 0.8, 1.0):
        assert in_child(lambda share=share: run(share * total)) == -signal.SIGKILL  # type: ignore[misc]
        assert not out.exists() and out.with_name("out.partial").is_dir()
    assert in_child(lambda: run(float("inf"))) == 0
    assert contents(out) == whole


def test_killed_after_the_renaming(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_tidy", die)
        assert in_child(lambda: write(source, out)) == -signal.SIGKILL
    assert set(contents(out)) == {*whole, JOURNAL, LOCK}
    assert write(source, out).files.keys() == {name for name in whole if name.startswith("model-")}
    assert contents(out) == whole
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        write(source, out)


@dataclass(frozen=True)
class Stopping(Matrix):
    """Zeros, until it is asked for a row that it has not."""

    of_shape: tuple[int, ...]
    error: type[BaseException] = field(default=KeyboardInterrupt)

    def __post_init__(self) -> None:
        self._is(self.of_shape, "F32")

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        raise self.error("stop")


def test_an_error_keeps_what_was_written(source: Path, tmp_path: Path) -> None:
    tensors = dict(mixture(source))
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write(source, out, tensors=tensors | {"last": (Stopping((2, 3)), "F32")})
    journal = Journal.read(tmp_path / "out.partial")
    layout = lay_out(tensors | {"last": (Stopping((2, 3)), "F32")}, SHARD_BYTES)
    at = next((n, slot.offset) for n, shard in enumerate(layout.shards) for slot in shard.slots if slot.name == "last")
    assert journal is not None and (journal.shard, journal.position) == at


def fill_up(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A disk that has no space left after so many bytes of shards, not even for a journal, until a file becomes shorter."""
    left, full = [after], [False]

    def limited(real: Callable[..., int], size: Callable[..., int]) -> Callable[..., int]:
        def call(*args: Any) -> int:
            if size(*args) > left[0]:
                full[0] = True
            if full[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= size(*args)
            return real(*args)

        return call

    def shorten(fd: int, length: int, truncate: Callable[[int, int], None] = os.ftruncate) -> None:
        full[0] = full[0] and os.fstat(fd).st_size <= length
        truncate(fd, length)

    def write_journal(journal: Journal, folder: Path, real: Callable[[Journal, Path], None] = Journal.write) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(journal, folder)

    monkeypatch.setattr(os, "copy_file_range", limited(os.copy_file_range, lambda i, o, count, *_: count))
    monkeypatch.setattr(os, "pwrite", limited(os.pwrite, lambda fd, piece, at: len(piece)))
    monkeypatch.setattr(os, "ftruncate", shorten)
    monkeypatch.setattr(Journal, "write", write_journal)


@pytest.mark.parametrize("after", [100, 3000, 9000, 12000])
def test_a_full_disk_says_what_is_kept(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(writer, "ROOM_BYTES", 64)
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        fill_up(patched, after)
        with pytest.raises(
            CheckpointError, match=r"no space is left on the disk of .*out\.partial\. .* MiB are kept there"
        ) as caught:
            write(source, out)
    assert "free and run it again to go on from them, or remove" in str(caught.value)
    found = write(source, out)
    assert contents(out) == whole
    largest = 3840  # tensor that is not copied in pieces
    assert max(0, after - largest - 400) <= found.resumed_bytes <= after, "all but the piece that did not fit, and some room"


def test_nothing_is_journalled_that_the_disk_has_lost(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of bytes that it could not write once only: asked again, it says that all is well."""
    answers = iter([OSError(errno.EIO, "Input/output error")])

    def sync(fd: int) -> None:
        for error in answers:
            raise error

    monkeypatch.setattr(os, "fdatasync", sync)
    with pytest.raises(CheckpointError, match=r"out\.partial cannot be written: .*Input/output error.*0\.0 MiB of"):
        write(source, tmp_path / "out", journal_bytes=1)
    journal = Journal.read(tmp_path / "out.partial")
    assert journal is not None and (journal.shard, journal.position) == (0, 0)
