"""Checkpoints: writing survives crashes and full disks, and damage is found before anything changes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp

from checkpoints import CASE, META, model, names, save_steps, state_of, train_and_save, whole
from helpers import GlooPool, RankError, run_ranks
from moefold.launch import checkpoint as module
from moefold.launch.checkpoint import Checkpointer
from moefold.launch.resume import find_checkpoint
from moefold.moe.config import ModelConfig
from moefold.moe.errors import CheckpointError
from moefold.parallel.parity import ParityCase, build_engine, run_steps

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def saved(gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint written by two ranks, and the state that is in it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    state = whole(gloo_pool.run(train_and_save, 2, {}, folder, 3))
    return folder / "step-00000003", state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


# --- crashes while writing -------------------------------------------------------------------------------------------


def disk_full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def die(*args: Any, **kwargs: Any) -> Any:
    os._exit(9)


def _tensors(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    patch.setattr(dcp.FileSystemWriter, "write_data", fail)


def _metadata(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    patch.setattr(dcp.FileSystemWriter, "finish", fail)


def _complete(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    patch.setattr(module, "write_json", fail)


def _rename(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        return fail() if Path(target).name.startswith("step-") else real(self, target)

    patch.setattr(Path, "rename", rename)


def _latest(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    patch.setattr(module, "write_atomic", fail)


def _retention(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    real = shutil.rmtree

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.endswith(".old"):
            next(p for p in Path(path).iterdir() if p.suffix == ".distcp").unlink()  # it gets half way
            fail()
        real(path, *args, **kwargs)

    patch.setattr(shutil, "rmtree", rmtree)


STAGES = [_tensors, _metadata, _complete, _rename, _latest, _retention]


@pytest.mark.parametrize("stage", STAGES, ids=lambda f: f.__name__.strip("_"))
def test_a_full_disk_is_told_on_every_rank_and_leaves_the_previous_checkpoint(folder: Path, stage: Callable[..., None]) -> None:
    failing = 1 if stage is _tensors else 0

    def train(rank: int, world: int) -> tuple[str, list[str]]:
        engine = build_engine(CASE, {})
        checkpointer = Checkpointer(folder, keep=1, background=True)
        run_steps(engine, CASE, range(1))
        checkpointer.save(engine, META)
        checkpointer.wait()
        run_steps(engine, CASE, range(1, 2))
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing:
                stage(patch, disk_full)
            checkpointer.save(engine, META)
            with pytest.raises(CheckpointError) as caught:
                checkpointer.wait()
        survivors = usable(folder)
        run_steps(engine, CASE, range(2, 3))
        checkpointer.save(engine, META)
        checkpointer.wait()
        return str(caught.value), survivors

    for message, survivors in run_ranks(train, 2):
        assert f"rank {failing}: OSError: [Errno 28] No space left on device" in message
        assert "earlier checkpoints are kept" in message
        assert survivors
    assert names(folder) == ["latest", "step-00000003"]


@pytest.mark.parametrize("stage", STAGES, ids=lambda f: f.__name__.strip("_"))
def test_a_crash_while_writing_leaves_a_checkpoint_that_can_be_used(
    gloo_pool: GlooPool, folder: Path, stage: Callable[..., None]
) -> None:
    def train(rank: int, world: int) -> None:
        engine = build_engine(CASE, {})
        checkpointer = Checkpointer(folder, keep=1, background=False)
        run_steps(engine, CASE, range(1))
        checkpointer.save(engine, META)
        run_steps(engine, CASE, range(1, 2))
        with pytest.MonkeyPatch.context() as patch:
            stage(patch, die)
            checkpointer.save(engine, META)

    with pytest.raises(RankError, match="process died"):
        run_ranks(train, 2)
    gloo_pool.run(go_on, 2, folder)
    assert [n for n in names(folder) if n.startswith(".")] == []


def go_on(rank: int, world: int, folder: Path) -> None:
    usable(folder)
    save_steps(rank, world, folder, range(2, 3), 1, find_checkpoint(folder))


def usable(folder: Path) -> list[str]:
    """Load what a resumed run would take, and everything else that looks complete; returns their names."""
    start = find_checkpoint(folder)
    assert start is not None
    complete = sorted(p.parent for p in folder.glob("step-*/complete.json"))
    assert start in complete
    for path in complete:
        engine = build_engine(CASE, {})
        step = Checkpointer(folder, keep=1, background=False).load(path, engine).step
        assert path.name == f"step-{step:08d}"
    return [p.name for p in complete]


# --- damage ----------------------------------------------------------------------------------------------------------


def _data_file(path: Path) -> Path:
    return max(path.glob("*.distcp"), key=lambda p: p.stat().st_size)


def _truncate(path: Path) -> None:
    os.truncate(_data_file(path), _data_file(path).stat().st_size // 2)


def _flip(file: Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 1
    file.write_bytes(data)


def _edit(path: Path, **changes: Any) -> None:
    """Change complete.json as its writer would have written it."""
    meta = json.loads((path / "complete.json").read_text()) | changes
    (path / "complete.json").write_text(json.dumps(meta | {"crc32": module._crc_of(meta)}))


def _foreign(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "pytorch_model.bin").write_bytes(b"weights")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated-file": (_truncate, "it is truncated or was changed"),
    "flipped-byte-in-tensors": (lambda p: _flip(_data_file(p)), "does not hold what was written"),
    "flipped-byte-in-every-file": (lambda p: [_flip(f) for f in p.glob("*.distcp")], "does not hold what was written"),
    "flipped-byte-in-metadata": (lambda p: _flip(p / ".metadata"), ".metadata does not hold what was written"),
    "flipped-byte-in-complete": (lambda p: _flip(p / "complete.json"), "not a complete moefold checkpoint"),
    "missing-file": (lambda p: _data_file(p).unlink(), "is missing"),
    "no-complete": (lambda p: (p / "complete.json").unlink(), "complete.json cannot be read"),
    "foreign-folder": (_foreign, "not a complete moefold checkpoint"),
    "no-folder": (shutil.rmtree, "not a complete moefold checkpoint"),
    "complete-is-torn": (lambda p: os.truncate(p / "complete.json", 100), "complete.json cannot be read"),
    "complete-is-a-list": (lambda p: (p / "complete.json").write_text("[]"), "complete.json cannot be read"),
    "complete-is-empty": (lambda p: (p / "complete.json").write_text("{}"), "complete.json cannot be read"),
    "complete-is-binary": (lambda p: (p / "complete.json").write_bytes(b"\xff\xfe\x00"), "complete.json cannot be read"),
    "later-schema": (lambda p: _edit(p, schema=99), "it has schema 99, this version reads 1"),
    "file-list-is-nonsense": (lambda p: _edit(p, files={"a": 3}), "complete.json cannot be read"),
}


def refused(rank: int, world: int, path: Path, case: ParityCase, weights_only: bool) -> str:
    """Message of the error; the engine must be what it was."""
    engine = build_engine(case, {})
    run_steps(engine, case, range(1))
    before = state_of(engine)
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(path.parent, keep=1, background=False).load(path, engine, weights_only=weights_only)
    after = state_of(engine)
    for name, piece in before["pieces"].items():
        assert np.array_equal(piece.values, after["pieces"][name].values), name
    for key in ("bias", "balance", "random", "step", "adam step"):
        np.testing.assert_equal(after[key], before[key], key)
    return str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_on_every_rank_before_anything_changes(
    gloo_pool: GlooPool, saved: tuple[Path, Any], tmp_path: Path, damage: str
) -> None:
    spoil, wanted = DAMAGE[damage]
    path = tmp_path / "step-00000003"
    shutil.copytree(saved[0], path)
    spoil(path)
    messages = gloo_pool.run(refused, 2, path, CASE, False)
    assert len(set(messages)) == 1
    assert f"{path} cannot be used: " in messages[0]
    assert wanted in messages[0]


@pytest.mark.parametrize("weights_only", [False, True], ids=["resume", "init"])
@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        pytest.param(model(dim=32), "embed.weight_VD is [44, 16] there and [44, 32] here", id="other-width"),
        pytest.param(model(bias=False), "expert_bias_E is only in the checkpoint", id="no-expert-bias-here"),
    ],
)
def test_another_model_is_refused(
    gloo_pool: GlooPool, saved: tuple[Path, Any], config: ModelConfig, wanted: str, weights_only: bool
) -> None:
    case = ParityCase(config, global_batch=8, seq_len=8, num_micro=2, precision="fp32")
    messages = gloo_pool.run(refused, 2, saved[0], case, weights_only)
    assert len(set(messages)) == 1
    assert "it holds another model: " in messages[0]
    assert wanted in messages[0]
    assert "use the [model] section it was trained with" in messages[0]


def test_a_missing_expert_bias_is_not_left_at_zero_silently(gloo_pool: GlooPool, folder: Path) -> None:
    gloo_pool.run(save_without_bias, 2, folder)
    messages = gloo_pool.run(refused, 2, folder / "step-00000000", CASE, False)
    assert "expert_bias_E is only in the model" in messages[0]


def save_without_bias(rank: int, world: int, folder: Path) -> None:
    case = ParityCase(model(bias=False), global_batch=8, seq_len=8, precision="fp32")
    Checkpointer(folder, keep=1, background=False).save(build_engine(case, {}), META)
