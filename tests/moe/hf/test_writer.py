"""Writing checkpoints: the bytes, how they get to the disk, and everything that is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moefold.moe.errors import CheckpointError
from moefold.moe.hf.codec import Array
from moefold.moe.hf.files import INDEX, SINGLE, Checkpoint
from moefold.moe.hf.matrix import Matrix, Scaled
from moefold.moe.hf.shards import Tensors, lay_out
from moefold.moe.hf.writer import JOURNAL, LOCK, write_checkpoint
from written import CONFIG, MANIFEST, contents, mixture, stop_at, write


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
    (tmp_path / "full" / "journal.json").write_text("mine, of another kind")
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
