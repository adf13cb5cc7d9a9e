"""Checkpoints: any layout reads any other's bit by bit, writing survives crashes, and damage is found before anything changes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from helpers import GlooPool, RankError, run_ranks
from moefold.launch import checkpoint as module
from moefold.launch.checkpoint import Checkpointer
from moefold.launch.resume import find_checkpoint
from moefold.moe.config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from moefold.moe.errors import CheckpointError
from moefold.parallel.parity import ParityCase, Piece, RecordingEngine, assemble, build_engine, run_steps

META = {"model": {}, "data": {}, "layout": {}, "tokens": 96}
DP4 = {"hsdp": 1}
State = dict[str, Any]


def model(*, dim: int = 16, bias: bool = True) -> ModelConfig:
    """Dense prefix, shared expert, expert bias, odd vocabulary: every kind of parameter, and shards of unequal size."""
    moe = MoEConfig(
        num_experts=4,
        top_k=2,
        expert_dim=16,
        num_shared_experts=1,
        router=RouterConfig(score="sigmoid"),
        balance=BalanceConfig(expert_bias=bias, bias_update_rate=0.01),
    )
    return ModelConfig(
        dim=dim,
        num_layers=2,
        num_heads=4,
        vocab_size=44,
        max_seq_len=8,
        dense_prefix_layers=1,
        dense_ffn_dim=24,
        moe=moe,
    )


CASE = ParityCase(model(), global_batch=8, seq_len=8, num_micro=2, precision="fp32")


def state_of(engine: RecordingEngine) -> State:
    """Everything that training goes on from, as this rank holds it."""
    return {
        "pieces": {f"weight {p.placement.name}": engine.piece(p, p.local) for p in engine.parameters}
        | {f"{key} {p.placement.name}": engine.piece(p, local) for p, key, local in engine.optimizer.moments()},
        "bias": {name: buffer.numpy().copy() for name, buffer in engine.model.named_buffers()},
        "balance": None if engine.balancer.previous_LE is None else engine.balancer.previous_LE.numpy().copy(),
        "step": engine.step,
        "adam step": {float(s["step"]) for s in engine.optimizer.adamw.state.values()},
        "random": torch.get_rng_state().numpy().copy(),
    }


def whole(states: list[State]) -> dict[str, np.ndarray]:
    """The logical state of all ranks: tensors put together, and what must be the same everywhere taken once."""
    pieces: dict[str, list[Piece]] = {}
    for state in states:
        for name, piece in state["pieces"].items():
            pieces.setdefault(name, []).append(piece)
    result = {}
    for name, parts in pieces.items():
        result[name], disagreement = assemble(parts)
        assert disagreement == 0, f"ranks disagree about {name}"
    for state in states:
        for name, value in {**state["bias"], "balance": state["balance"], "random": state["random"]}.items():
            assert np.array_equal(value, result.setdefault(name, value)), f"ranks disagree about {name}"
        assert state["adam step"] == {float(state["step"])}
        assert state["step"] == states[0]["step"]
    return {**result, "step": np.array(states[0]["step"])}


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(got) == sorted(wanted)
    different = [name for name in wanted if not np.array_equal(got[name], wanted[name])]
    assert not different


def train_and_save(rank: int, world: int, layout: dict[str, int], folder: Path, steps: int) -> State:
    engine = build_engine(CASE, layout)
    run_steps(engine, CASE, range(steps))
    checkpointer = Checkpointer(folder, keep=2, background=False)
    torch.rand(3)  # a random state that no fresh process has
    checkpointer.save(engine, META)
    return state_of(engine)


def load(rank: int, world: int, layout: dict[str, int], path: Path) -> State:
    engine = build_engine(CASE, layout)
    Checkpointer(path.parent, keep=2, background=False).load(path, engine)
    return state_of(engine)


@pytest.fixture(scope="module")
def saved(gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint written by four data ranks, and the state that is in it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    state = whole(gloo_pool.run(train_and_save, 4, DP4, folder, 3))
    assert np.abs(state["layers.1.moe.router.expert_bias_E"]).max() > 0
    assert state["balance"].sum() > 0
    return folder / "step-00000003", state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(4, DP4, id="dp4"),
        pytest.param(1, {}, id="one-process"),
        pytest.param(2, {"ep": 2}, id="dp2-ep2"),
        pytest.param(4, {"ep": 2, "tp": 2}, id="dp2-tp2-ep2"),
        pytest.param(4, {"tp": 4}, id="tp4"),
        pytest.param(4, {"hsdp": 2, "ep": 2}, id="hsdp2-ep2"),
        pytest.param(4, {"hsdp": 4, "ep": 4}, id="replicated-ep4"),
        pytest.param(4, {"ep": 2, "etp": 2, "tp": 2}, id="tp2-ep2-etp2"),
        pytest.param(8, {"ep": 2, "tp": 2}, id="dp4-tp2-ep2"),
    ],
)
def test_any_layout_loads_what_four_data_ranks_saved(
    gloo_pool: GlooPool, saved: tuple[Path, dict[str, np.ndarray]], world: int, layout: dict[str, int]
) -> None:
    path, state = saved
    assert_same(whole(gloo_pool.run(load, world, layout, path)), state)


@pytest.mark.parametrize("layout", [{"ep": 2, "tp": 2}, {"hsdp": 2, "ep": 4}, {"tp": 2, "ep": 2, "etp": 2}], ids=str)
def test_four_data_ranks_load_what_any_layout_saved(gloo_pool: GlooPool, folder: Path, layout: dict[str, int]) -> None:
    state = whole(gloo_pool.run(train_and_save, 4, layout, folder, 2))
    assert_same(whole(gloo_pool.run(load, 4, DP4, folder / "step-00000002")), state)


def load_weights(rank: int, world: int, path: Path) -> tuple[State, State]:
    engine = build_engine(CASE, {})
    before = state_of(engine)
    assert Checkpointer(path.parent, keep=2, background=False).load(path, engine, weights_only=True).step == 0
    return before, state_of(engine)


def test_only_the_weights_are_loaded_when_only_they_are_asked_for(
    gloo_pool: GlooPool, saved: tuple[Path, dict[str, np.ndarray]]
) -> None:
    both = gloo_pool.run(load_weights, 2, saved[0])
    before, after = (whole([pair[i] for pair in both]) for i in (0, 1))
    wanted = {n: saved[1][n] if n.startswith("weight ") or "expert_bias" in n else v for n, v in before.items()}
    assert_same(after, wanted)


def test_a_checkpoint_before_the_first_step_has_no_counts_and_takes_away_those_of_the_engine(
    gloo_pool: GlooPool, folder: Path
) -> None:
    state = whole(gloo_pool.run(train_and_save, 2, {}, folder, 0))
    got = whole(gloo_pool.run(load_over_a_trained_engine, 2, folder / "step-00000000"))
    assert_same(got, state)


def load_over_a_trained_engine(rank: int, world: int, path: Path) -> State:
    engine = build_engine(CASE, {})
    run_steps(engine, CASE, range(2))
    Checkpointer(path.parent, keep=2, background=False).load(path, engine)
    return state_of(engine)


# --- writing in the background ---------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits for the event; a second write at the same time fails."""
    go, busy, real = threading.Event(), threading.Lock(), dcp.save

    def save(*args: Any, **kwargs: Any) -> Any:
        assert busy.acquire(blocking=False), "two saves at once"
        try:
            assert go.wait(20)
            return real(*args, **kwargs)
        finally:
            busy.release()

    monkeypatch.setattr(dcp, "save", save)
    yield go


def test_a_save_in_the_background_does_not_see_later_updates(folder: Path, slow_disk: threading.Event) -> None:
    def train(rank: int, world: int) -> tuple[State, State]:
        engine = build_engine(CASE, {"ep": 2})
        run_steps(engine, CASE, range(2))
        checkpointer = Checkpointer(folder, keep=2, background=True)
        checkpointer.save(engine, META)
        then = state_of(engine)
        run_steps(engine, CASE, range(2, 4))
        assert find_checkpoint(folder) is None
        slow_disk.set()
        checkpointer.wait()
        return then, load(rank, world, {}, folder / "step-00000002")

    both = run_ranks(train, 2)
    assert_same(whole([b[1] for b in both]), whole([b[0] for b in both]))


def test_a_second_save_waits_for_the_first(folder: Path, slow_disk: threading.Event) -> None:
    def train(rank: int, world: int) -> list[str]:
        engine = build_engine(CASE, {})
        checkpointer = Checkpointer(folder, keep=5, background=True)
        threading.Timer(0.3, slow_disk.set).start()
        for step in range(3):
            run_steps(engine, CASE, range(step, step + 1))
            checkpointer.save(engine, META)
        checkpointer.wait()
        return sorted(p.name for p in folder.glob("step-*"))

    assert run_ranks(train, 2)[0] == ["step-00000001", "step-00000002", "step-00000003"]


def save_steps(rank: int, world: int, folder: Path, steps: range, keep: int, start: Path | None = None) -> None:
    engine = build_engine(CASE, {})
    checkpointer = Checkpointer(folder, keep=keep, background=True)
    if start is not None:
        checkpointer.load(start, engine)
    for step in steps:
        run_steps(engine, CASE, range(step, step + 1))
        checkpointer.save(engine, META)
    checkpointer.wait()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_are_kept_and_latest_names_the_newest(gloo_pool: GlooPool, folder: Path) -> None:
    gloo_pool.run(save_steps, 2, folder, range(5), 2)
    assert names(folder) == ["latest", "step-00000004", "step-00000005"]
    assert (folder / "latest").read_text() == "step-00000005"


def test_going_back_to_an_earlier_step_neither_removes_nor_prefers_the_abandoned_future(
    gloo_pool: GlooPool, folder: Path
) -> None:
    gloo_pool.run(save_steps, 2, folder, range(5), 3)
    gloo_pool.run(save_steps, 2, folder, range(3, 4), 1, folder / "step-00000003")
    assert find_checkpoint(folder) == folder / "step-00000004"
    assert names(folder) == ["latest", "step-00000004", "step-00000005"]


def test_a_step_that_is_on_disk_is_not_written_again(gloo_pool: GlooPool, folder: Path) -> None:
    gloo_pool.run(save_steps, 2, folder, range(1), 1)
    before = (folder / "step-00000001" / "complete.json").stat().st_mtime_ns
    gloo_pool.run(resave, 2, folder)
    assert (folder / "step-00000001" / "complete.json").stat().st_mtime_ns == before


def resave(rank: int, world: int, folder: Path) -> None:
    engine = build_engine(CASE, {})
    checkpointer = Checkpointer(folder, keep=1, background=False)
    checkpointer.load(folder / "step-00000001", engine)
    checkpointer.save(engine, META)


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
