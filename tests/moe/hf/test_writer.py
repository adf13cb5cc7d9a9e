"""Writing checkpoints: the bytes, going on after every kind of interruption to the same bytes, and everything that is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moefold.moe.errors import CheckpointError
from moefold.moe.hf import copying, writer
from moefold.moe.hf.codec import Array
from moefold.moe.hf.files import INDEX, SINGLE, Checkpoint
from moefold.moe.hf.journal import Journal
from moefold.moe.hf.matrix import Cols, Matrix, Normal, Rows, Scaled, Stacked
from moefold.moe.hf.shards import Tensors, lay_out, plan_hash
from moefold.moe.hf.writer import JOURNAL, LOCK, Written, write_checkpoint

CONFIG = {"model_type": "mixtral", "hidden_size": 24}
MANIFEST = {"method": "copy", "seed": 0}
SHARD_BYTES = 7000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    dense = {"up": torch.randn(40, 24), "down": torch.randn(24, 40), "norm": torch.randn(23)}
    save_file({name: value.bfloat16() for name, value in dense.items()}, folder / SINGLE)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


def mixture(source: Path) -> Tensors:
    """Copies, slices, scaled matrices that are repeated, a router in F32 behind an odd number of BF16 values."""
    dense = Checkpoint.open(source).tensors
    up, down = dense["up"], dense["down"]
    tensors: dict[str, tuple[Matrix, str]] = {"norm": (dense["norm"], "BF16"), "router": (Normal((4, 24), 0.02, 0, "r"), "F32")}
    for e in range(4):
        tensors[f"{e}.up"] = (Rows(up, 20 * (e % 2), 20 * (e % 2) + 20), "BF16")
        tensors[f"{e}.down"] = (Scaled(Cols(down, slice(20 * (e % 2), 20 * (e % 2) + 20)), 3.0), "BF16")
    tensors["both"] = (Stacked((up, Scaled(up, 0.5)), new_axis=True), "BF16")
    tensors["wide_router"] = (up, "F32")
    return tensors


def write(source: Path, out: Path, **options: Any) -> Written:
    settings = {"manifest": MANIFEST, "shard_bytes": SHARD_BYTES, "carry": [source / "tokenizer.json"]} | options
    return write_checkpoint(out, settings.pop("config", CONFIG), settings.pop("tensors", mixture(source)), **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    write(source, out)
    assert not out.with_name("out.partial").exists()
    return contents(out)


def test_tensors_are_read_by_safetensors(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    calls: list[tuple[int, int]] = []
    found = write(source, tmp_path / "a" / "out", progress=lambda done, total, seconds: calls.append((done, total)))
    assert contents(found.folder) == whole, "the same bytes on every run"
    shards = [name for name in whole if name.startswith("model-")]
    assert sorted(found.files) == sorted(shards) and len(shards) == 3 and found.resumed_bytes == 0 and not found.digests
    assert all(found.files[name] == len(whole[name]) for name in shards)
    assert calls == sorted(calls) and calls[-1] == (sum(found.files.values()),) * 2
    got: dict[str, torch.Tensor] = {}
    for name in shards:
        got |= load_file(found.folder / name)
        with safe_open(found.folder / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    index = json.loads(whole[INDEX])
    assert set(index["weight_map"]) == set(got) == set(mixture(source))
    assert index["metadata"]["total_size"] == found.tensor_bytes == sum(value.nbytes for value in got.values())
    dense = load_file(source / SINGLE)
    for e in range(4):
        part = slice(20 * (e % 2), 20 * (e % 2) + 20)
        assert torch.equal(got[f"{e}.up"], dense["up"][part])
        assert torch.equal(got[f"{e}.down"], (dense["down"][:, part].float() * 3).bfloat16())
    assert torch.equal(got["both"], torch.stack([dense["up"], dense["up"] * 0.5]))
    assert torch.equal(got["wide_router"], dense["up"].float()) and torch.equal(got["norm"], dense["norm"])
    assert got["router"].dtype == torch.float32 and got["router"].shape == (4, 24)
    assert json.loads(whole["config.json"]) == CONFIG and whole["tokenizer.json"] == b'{"a": 1}'
    sizes = {name: {"bytes": len(whole[name])} for name in sorted(shards)}
    assert json.loads(whole["moefold.json"]) == {**MANIFEST, "files": sizes}
    assert set(whole) == {*shards, INDEX, "config.json", "tokenizer.json", "moefold.json"}
    assert Checkpoint.open(found.folder).dtype == "BF16"


def test_one_shard_needs_no_index(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # empty, so it may be there
    found = write(source, tmp_path / "out", shard_bytes=1 << 20)
    assert list(found.files) == [SINGLE] and not (found.folder / INDEX).exists()
    for name, tensor in Checkpoint.open(found.folder).tensors.items():
        assert tensor.offset % (4 if tensor.dtype == "F32" else 2) == 0, f"{name} is not aligned"


def test_a_tensor_larger_than_a_shard_has_its_own(source: Path) -> None:
    shards = lay_out(mixture(source), 1000).shards
    assert all(len(shard.slots) == 1 or sum(slot.nbytes for slot in shard.slots) <= 1000 for shard in shards)
    assert [slot.name for shard in shards for slot in shard.slots if slot.name != "router"] == [
        name for name in mixture(source) if name != "router"
    ]


def test_goes_on_from_every_position(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All states that a kill or a power cut can leave: a journal that names a position, and anything behind it."""
    for name in ("fsync", "fdatasync"):  # no power will be cut here
        monkeypatch.setattr(os, name, lambda fd: None)
    tensors = mixture(source)
    layout = lay_out(tensors, SHARD_BYTES)
    carry = [source / "tokenizer.json"]
    stamps = {str(path): writer._stamp(path) for path in (source / SINGLE, *carry)}
    start = Journal(plan_hash(layout, CONFIG, MANIFEST, carry), stamps)
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


def in_child(work: Callable[[], object]) -> int:
    """Exit status of a forked process that does `work`; negative: the signal that ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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


@pytest.mark.parametrize("refuse", [(), ("copy_file_range",), ("copy_file_range", "sendfile")])
def test_every_way_of_copying(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, refuse: tuple[str, ...]
) -> None:
    def cannot(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    for name in refuse:
        monkeypatch.setattr(os, name, cannot)
    write(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    truncated = replace(Checkpoint.open(source).tensors["up"], offset=10**6)
    with pytest.raises(CheckpointError, match=rf"{SINGLE} ends at byte 1000000, inside a tensor: it is truncated"):
        write(source, tmp_path / "other", tensors={"a": (truncated, "BF16")})


@dataclass(frozen=True)
class Counted(Matrix):
    """Ones; counts how often they are asked for."""

    of_shape: tuple[int, ...]
    calls: list[int] = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        self._is(self.of_shape, "F32")

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        self.calls.append(start)
        return np.ones((stop - start, right - left), "f4")


def test_equal_tensors_are_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []
    tensors: Tensors = {f"{i}": (Counted((2, 300), calls), "F32") for i in range(6)} | {
        "other": (Counted((300, 2), calls), "F32")
    }
    found = write_checkpoint(tmp_path / "out", CONFIG, tensors, manifest={}, shard_bytes=5000)
    assert calls == [0, 0] and len(found.files) == 4
    assert all((tensor.rows() == 1).all() for tensor in Checkpoint.open(found.folder).tensors.values())


def test_matrices_that_hide_what_they_are_made_of_are_refused(tmp_path: Path) -> None:
    class Hidden(Matrix):
        def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
            raise NotImplementedError

    hidden = Hidden()
    hidden._is((2, 2), "F32")
    with pytest.raises(TypeError, match="Hidden must be a dataclass"):
        write_checkpoint(tmp_path / "out", CONFIG, {"a": (Scaled(hidden, 2), "F32")}, manifest={})


def test_digests_are_those_of_the_files(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    want = {name: sha256(data).hexdigest() for name, data in whole.items() if name.startswith("model-")}
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(source, out, digests=True, progress=stop_at(11000))
    found = write(source, out, digests=True)
    assert found.digests == want and found.resumed_bytes > 6000
    files = json.loads((out / "moefold.json").read_text())["files"]
    assert {name: value["sha256"] for name, value in files.items()} == want
    assert contents(out).items() >= {name: whole[name] for name in want}.items()


def stop_at(nbytes: int) -> Callable[[int, int, float], None]:
    def progress(done: int, total: int, seconds: float) -> None:
        if done >= nbytes:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def interrupted(source: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder of an interrupted writing of `out`."""
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "out", progress=stop_at(11000))
    yield tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()


def test_other_work_does_not_go_on(source: Path, interrupted: Path) -> None:
    out = interrupted.with_name("out")
    tensors = dict(mixture(source))
    others: list[dict[str, Any]] = [
        {"manifest": {"method": "copy", "seed": 1}},
        {"config": {}},
        {"shard_bytes": 8000},
        {"carry": []},
        {"tensors": tensors | {"wide_router": (Scaled(tensors["wide_router"][0], 2), "F32")}},
    ]
    for options in others:
        with pytest.raises(CheckpointError, match=r"out\.partial was begun with other options.*, or remove .* to start again"):
            write(source, out, **options)


def test_a_changed_source_is_seen(source: Path, interrupted: Path) -> None:
    before = (source / SINGLE).stat()
    os.utime(source / SINGLE, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    try:
        with pytest.raises(CheckpointError, match=rf"{SINGLE} has changed since .*out\.partial was begun: remove"):
            write(source, interrupted.with_name("out"))
    finally:
        os.utime(source / SINGLE, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_damage_is_seen(source: Path, interrupted: Path) -> None:
    out = interrupted.with_name("out")
    second = interrupted / "model-00002-of-00003.safetensors"
    kept = second.read_bytes()
    second.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors has 0 bytes, the journal says \d+: remove"):
        write(source, out)
    second.write_bytes(kept)
    (interrupted / JOURNAL).write_text("{}")
    with pytest.raises(CheckpointError, match=r"journal\.json cannot be read"):
        write(source, out)
    (interrupted / JOURNAL).unlink()
    with pytest.raises(CheckpointError, match=r"out\.partial has model-0000.* but no journal\.json"):
        write(source, out)


def test_one_writer_at_a_time(source: Path, interrupted: Path) -> None:
    with (interrupted / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="being written by another process"):
            write(source, interrupted.with_name("out"))


def test_nothing_is_written_before_the_refusal(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match=f"{name} exists and is not an empty folder: choose another, or remove it"):
            write(source, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json cannot be carried along"):
        write(source, tmp_path / "out", carry=[tmp_path / "config.json"])
    with pytest.raises(ValueError, match="a manifest cannot have 'files'"):
        write(source, tmp_path / "out", manifest={"files": 1})
    with pytest.raises(CheckpointError, match=r"nothing\.json cannot be read"):
        write(source, tmp_path / "out", carry=[tmp_path / "nothing.json"])
    with pytest.raises(ValueError, match="without tensors"):
        write(source, tmp_path / "out", tensors={})
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "config.json"}
    real = os.statvfs

    def small(path: Path) -> Any:
        found = real(path)
        return os.statvfs_result((*found[:3], 1, 1, *found[5:]))

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(CheckpointError, match=r"MiB are to be written to .*, but its disk has 0\.0 MiB free"):
        write(source, tmp_path / "out")
    assert not list((tmp_path / "out.partial").glob("model*"))
