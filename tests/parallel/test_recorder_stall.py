"""A rank that does not come is named while the others wait for it, once, with what every rank finished last."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import GlooPool
from moefold.parallel.collectives import all_reduce
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.recorder_stall import Place, StallWatch, State, account, awaited

WORLD = (0, 1, 2, 3)


def place(axis: str, members: tuple[int, ...], call: int, since_s: float = 5.0) -> Place:
    return Place(axis, members, call, "all_reduce", "norm", None, "update", step=3, since_s=since_s)


def state(rank: int, open_: Place | None, **calls: int) -> State:
    """calls: begun on the world, tp 0-1 and tp 2-3."""
    keys = {"world": "world:0,1,2,3", "low": "tp:0,1", "high": "tp:2,3"}
    return State(rank, open_, None, {keys[name]: n for name, n in calls.items()})


def test_who_has_not_come_is_awaited() -> None:
    waiting = {r: state(r, place("world", WORLD, 4), world=5) for r in (0, 1, 3)}
    assert awaited(waiting | {2: state(2, None, world=4)}) == (2,)
    assert awaited(waiting) == (2,), "a rank that does not answer has not come"


def test_the_chain_is_followed_to_its_end() -> None:
    """0 and 1 wait for 2 in the world; 2 waits for 3 in tp; 3 computes."""
    states = {r: state(r, place("world", WORLD, 4), world=5) for r in (0, 1)}
    states[2] = state(2, place("tp", (2, 3), 7), world=4, high=8)
    states[3] = state(3, None, world=4, high=7)
    assert awaited(states) == (3,)
    text = account(states, 4)
    assert "waiting for rank 3" in text.splitlines()[0] and "waiting for rank 2" not in text
    assert "rank 2: for 5.0 s in norm (update, all_reduce over tp ranks [2, 3], step 3)" in text
    assert "rank 3: in no collective; last completed: none" in text


def test_if_all_have_come_the_wire_is_stuck() -> None:
    states = {r: state(r, place("world", WORLD, 4), world=5) for r in WORLD}
    assert awaited(states) == ()
    assert "all ranks have come" in account(states, 4)


def test_states_survive_the_store() -> None:
    one = State(1, place("tp", (0, 1), 2), place("world", WORLD, 1, 0.0), {"tp:0,1": 3})
    assert State.from_json(one.to_json()) == one


def test_a_watch_needs_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit_s = 0"):
        StallWatch(CommRecorder(0, torch.device("cpu")), dist.HashStore(), 1, 0)


def sleeps(rank: int, world: int, folder: str, slow: int, sleep_s: float) -> list[str]:
    """A few sums, in the midst of which one rank sleeps; what this rank's watch told."""
    recorder = CommRecorder(rank, torch.device("cpu"))
    assert dist.group.WORLD is not None
    probe = recorder.probe("world", dist.group.WORLD, "norm", layer=5)
    told: list[str] = []
    with StallWatch(recorder, dist.FileStore(f"{folder}/watch", world), world, 0.3, told.append) as watch:
        for step in range(4):
            recorder.start_step(step)
            if rank == slow and step in (1, 3):
                time.sleep(sleep_s)
            all_reduce(torch.ones(1), dist.group.WORLD, probe)
            time.sleep(0.2)  # the watch sees that it goes on
        dist.barrier()
    assert watch.error is None
    return told


@pytest.mark.ranks
@pytest.mark.parametrize("slow", [0, 2])
def test_the_sleeping_rank_is_named_once_for_each_stall(slow: int, gloo_pool: GlooPool, tmp_path: Path) -> None:
    told = gloo_pool.run(sleeps, 3, str(tmp_path), slow, 1.0)
    teller = 1 if slow == 0 else 0
    assert [len(lines) for lines in told] == [2 if rank == teller else 0 for rank in range(3)], told
    first, second = told[teller]
    for text, step in ((first, 1), (second, 3)):
        head, *lines = text.splitlines()
        assert head.startswith("stall: 2 of 3 ranks") and head.endswith(f"waiting for rank {slow}")
        before = rf"norm of layer 5 \(forward, all_reduce over world ranks \[0, 1, 2\], step {step - 1}\)"
        assert all(re.search(before, line) for line in lines)
        assert "in no collective; last completed: norm of layer 5" in lines[slow]
        assert f"step {step})" in lines[teller].split("; last completed")[0]


def no_stall(rank: int, world: int, folder: str) -> list[str]:
    recorder = CommRecorder(rank, torch.device("cpu"))
    assert dist.group.WORLD is not None
    probe = recorder.probe("world", dist.group.WORLD, "norm")
    told: list[str] = []
    with StallWatch(recorder, dist.FileStore(f"{folder}/watch", world), world, 0.6, told.append):
        for _ in range(10):
            time.sleep(0.05 * (rank + 1))
            all_reduce(torch.ones(1), dist.group.WORLD, probe)
    return told


@pytest.mark.ranks
def test_waiting_that_ends_in_time_is_no_stall(gloo_pool: GlooPool, tmp_path: Path) -> None:
    assert gloo_pool.run(no_stall, 2, str(tmp_path)) == [[], []]
