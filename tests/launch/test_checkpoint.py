"""Checkpoints: any layout reads any other's bit by bit; saves in the background; what is kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp

from checkpoints import CASE, DP4, META, State, assert_same, load, names, save_steps, state_of, train_and_save, whole
from helpers import GlooPool, run_ranks
from moefold.launch.checkpoint import Checkpointer
from moefold.launch.resume import find_checkpoint
from moefold.parallel.parity import build_engine, run_steps

pytestmark = pytest.mark.ranks


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
