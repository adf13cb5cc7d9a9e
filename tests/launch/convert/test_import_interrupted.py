"""An import that is killed goes on from its whole files, and makes the same checkpoint, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import in_child
from moefold.launch.convert import native_write, run, unfinished
from moefold.launch.convert.results import Imported
from moefold.launch.convert.run import import_checkpoint
from moefold.moe.errors import CheckpointError
from moefold.moe.hf.journal import JOURNAL
from tiny_models import tiny_model

SHARD_BYTES = 2048
Progress = Callable[[str, int, int, float], None]


def run_import(source: Path, out: Path, progress: Progress | None = None) -> Imported:
    return import_checkpoint(source, out, shard_bytes=SHARD_BYTES, progress=progress)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """A model, where its import goes, and what an import that nobody interrupts writes there."""
    root = tmp_path_factory.mktemp("import")
    tiny_model("qwen2_moe").to(torch.bfloat16).save_pretrained(root / "hf")
    (root / "hf" / "tokenizer.json").write_text("{}")
    run_import(root / "hf", root / "out")
    whole = contents(root / "out")
    assert not {JOURNAL, native_write.LOCK} & set(whole) and not any(name.endswith(unfinished.NOTE) for name in whole)
    return root / "hf", root / "out", whole


@pytest.fixture(autouse=True)
def nothing_there(place: tuple[Path, Path, dict[str, bytes]]) -> None:
    for folder in (place[1], place[1].with_name("out.partial")):
        shutil.rmtree(folder, ignore_errors=True)


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killer(share: float) -> Progress:
    """Kills the process when so much is written."""

    def progress(stage: str, done: int, total: int, seconds: float) -> None:
        if done >= share * total:
            die()

    return progress


def test_killed_anywhere_it_goes_on(place: tuple[Path, Path, dict[str, bytes]]) -> None:
    source, out, whole = place
    shares = np.random.default_rng(0).random(5)
    for share in map(float, shares):
        assert in_child(lambda share=share: run_import(source, out, killer(share))) == -signal.SIGKILL  # type: ignore[misc]
        assert not out.exists() and not (out.with_name("out.partial") / "complete.json").exists()
        made = run_import(source, out)
        # all but the file that was being written
        assert share * made.nbytes - 3 * SHARD_BYTES < made.resumed < made.nbytes
        assert made.to_dict()["resumed_bytes"] == made.resumed and ("by interrupted runs" in made.render()) == (made.resumed > 0)
        assert contents(out) == whole, f"killed after {share:.0%}"
        assert sorted(path.name for path in out.parent.iterdir()) == ["hf", "out"]
        shutil.rmtree(out)
    # killed again and again
    for share in sorted(map(float, shares)):
        assert in_child(lambda share=share: run_import(source, out, killer(share))) == -signal.SIGKILL  # type: ignore[misc]
    assert run_import(source, out).resumed > 0 and contents(out) == whole


@pytest.mark.parametrize("step", ["_save", "write_atomic", "write_complete", "tidy", "sync_folder"])
def test_killed_after_the_tensors(step: str, place: tuple[Path, Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before metadata, texts, complete.json, removal of notes, and with the renaming done."""
    source, out, whole = place
    with monkeypatch.context() as patched:
        patched.setattr(native_write, step, die)
        assert in_child(lambda: run_import(source, out)) == -signal.SIGKILL
    if step == "sync_folder":
        assert contents(out) == whole
        return
    assert not out.exists()
    made = run_import(source, out)
    assert made.resumed == (0 if step == "_save" else made.nbytes) and contents(out) == whole


def test_files_that_are_not_what_was_noted_are_written_again(place: tuple[Path, Path, dict[str, bytes]]) -> None:
    source, out, whole = place
    partial = out.with_name("out.partial")
    assert in_child(lambda: run_import(source, out, killer(0.9))) == -signal.SIGKILL
    files = sorted(path for path in partial.iterdir() if path.name + unfinished.NOTE in {p.name for p in partial.iterdir()})
    assert len(files) > 6
    changed = bytearray(files[0].read_bytes())
    changed[len(changed) // 2] ^= 1
    files[0].write_bytes(changed)
    files[1].write_bytes(files[1].read_bytes()[:-1])
    files[2].unlink()
    files[3].with_name(files[3].name + unfinished.NOTE).write_text("{")
    for file, change in ((files[4], lambda places: places[:-1]), (files[5], lambda places: [["0", "1"] for _ in places])):
        note = file.with_name(file.name + unfinished.NOTE)
        value = json.loads(note.read_text())
        note.write_text(json.dumps(value | {"places": change(value["places"])}))
    (partial / "complete.json").write_text("{}")
    made = run_import(source, out)
    assert 0 < made.resumed < made.nbytes and contents(out) == whole


def test_another_import_does_not_go_on(
    place: tuple[Path, Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, whole = place
    assert in_child(lambda: run_import(source, out, killer(0.5))) == -signal.SIGKILL
    before = contents(out.with_name("out.partial"))
    shutil.copytree(source, tmp_path / "other")
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: run_import(tmp_path / "other", out), "was begun with other options, sources or another version"),
        (lambda: import_checkpoint(source, out, shard_bytes=4096), "was begun with other options, sources or another version"),
    ]
    for work, says in refusals:
        with pytest.raises(CheckpointError, match=says):
            work()
    monkeypatch.setattr(run, "MODEL_TOML", "other.toml")
    with pytest.raises(CheckpointError, match="was begun with other options"):
        run_import(source, out)
    monkeypatch.undo()
    assert contents(out.with_name("out.partial")) == before
    stat = (source / "model.safetensors").stat()
    os.utime(source / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(
        CheckpointError, match=r"model.safetensors has changed since .*out.partial was begun: remove .* to start again"
    ):
        run_import(source, out)
    os.utime(source / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run_import(source, out).resumed > 0 and contents(out) == whole
    # what an older version has left is begun anew
    shutil.rmtree(out)
    partial = out.with_name("out.partial")
    partial.mkdir()
    for name in (native_write.LOCK, "__0_0_0.distcp"):
        (partial / name).write_bytes(b"half")
    assert run_import(source, out).resumed == 0 and contents(out) == whole


@pytest.mark.parametrize("name", ["notes", "__0_0_0.distcp", f"__0_0_0.distcp{unfinished.NOTE}"])
def test_a_folder_inside_is_named_and_nothing_removed(name: str, place: tuple[Path, Path, dict[str, bytes]]) -> None:
    source, out, whole = place
    partial = out.with_name("out.partial")
    assert in_child(lambda: run_import(source, out, killer(0.5))) == -signal.SIGKILL
    (partial / name).unlink(missing_ok=True)
    (partial / name).mkdir()
    before = {path.name for path in partial.iterdir()}
    with pytest.raises(CheckpointError, match=rf"out\.partial/{name} is a folder, .*move it away"):
        run_import(source, out)
    assert {path.name for path in partial.iterdir()} == before
    (partial / name).rmdir()
    assert run_import(source, out).resumed > 0 and contents(out) == whole


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
def test_a_file_that_goes_along_and_has_changed_is_named(
    name: str, place: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, out = shutil.copytree(place[0], tmp_path / "hf"), tmp_path / "out"
    assert in_child(lambda: run_import(source, out, killer(0.5))) == -signal.SIGKILL
    (source / name).write_text((source / name).read_text() + "\n")
    with pytest.raises(CheckpointError, match=rf"{name} has changed since .*out\.partial was begun: remove .* to start again"):
        run_import(source, out)
    assert not out.exists()
