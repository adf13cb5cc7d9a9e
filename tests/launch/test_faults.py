"""What ends a run before its last step: failing, killed and hanging ranks, full disks, losses that are not finite."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs import (
    Ended,
    at_step,
    command_ranks,
    complete_steps,
    last_attempt,
    losses,
    make_config,
    pretrain_ranks,
    run_command,
    toml_file,
    torchrun_command,
)
from moefold.launch.rundir import RunDir
from moefold.parallel.engine import Engine

pytestmark = [pytest.mark.ranks, pytest.mark.alone]

# --- a rank fails -----------------------------------------------------------------------------------------------------


def fail() -> None:
    raise ValueError("the disk has eaten my tokens")


def seconds_since_the_error(folder: Path, rank: int) -> float:
    """Time from the report of a rank's error to now."""
    return time.time() - json.loads((RunDir.open(folder).logs() / f"error-rank-{rank:05d}.json").read_text())["time_s"]


def told(ended: list[Ended]) -> list[str]:
    """Who said that the run failed, and how."""
    return [line for e in ended for line in e.err.splitlines() if line.startswith("run failed")]


def test_one_rank_that_raises_stops_all_and_is_named_once(tmp_path: Path) -> None:
    ended = command_ranks(4, ["pretrain", toml_file(tmp_path, checkpoint__every=2)], tmp_path, at_step(5, fail, (2,)))
    assert seconds_since_the_error(tmp_path / "run", 2) < 20
    assert [e.code for e in ended] == [1] * 4
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("failed", 1)
    assert attempt["error"].startswith("rank 2 on ")
    assert attempt["error"].endswith(": ValueError: the disk has eaten my tokens")
    assert told(ended) == [f"run failed (exit code 1): {attempt['error']}"]
    assert "in fail" in ended[2].err  # its traceback
    for rank in (0, 1, 3):
        assert "Traceback" not in ended[rank].err
    assert complete_steps(tmp_path / "run") == [2, 4]
    reports = sorted(p.name for p in RunDir.open(tmp_path / "run").logs().glob("error-rank-*.json"))
    assert reports == [f"error-rank-{r:05d}.json" for r in range(4)]


RAISES = """
import sys
from moefold.launch.cli import main
from moefold.parallel.engine import Engine

real = Engine._forward_backward
def forward_backward(self, *args):
    if self.step == 5 and self.mesh.rank == 2:
        raise ValueError("the disk has eaten my tokens")
    return real(self, *args)
Engine._forward_backward = forward_backward
sys.exit(main(["pretrain", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_one_rank_that_raises_ends_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(RAISES)
    ended = run_command(torchrun_command(4, toml_file(tmp_path), script=script), tmp_path)
    assert seconds_since_the_error(tmp_path / "run", 2) < 20
    assert ended.code == 1
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("failed", 1)
    assert attempt["error"].startswith("rank 2 on ")
    assert ended.err.count("run failed (exit code 1): ") == 1
    assert "the disk has eaten my tokens" in ended.err.partition("run failed")[2]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_is_killed_stops_all_and_is_named(tmp_path: Path, rank: int) -> None:
    args = ["pretrain", toml_file(tmp_path, checkpoint__every=2)]
    ended = command_ranks(4, args, tmp_path, at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL), (rank,)))
    assert [e.code for e in ended] == [-9 if r == rank else 1 for r in range(4)]
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("failed", 1)
    assert attempt["error"].startswith(f"rank {rank} on ")
    assert "it was killed" in attempt["error"]
    assert told(ended) == [f"run failed (exit code 1): {attempt['error']}"]


def test_out_of_memory_on_one_rank_has_its_own_code_on_all(tmp_path: Path) -> None:
    def exhaust() -> None:
        raise MemoryError("cannot allocate 3 GiB")

    ended = command_ranks(2, ["pretrain", toml_file(tmp_path)], tmp_path, at_step(3, exhaust, (1,)))
    assert [e.code for e in ended] == [6, 6]
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("oom", 6)
    assert "MemoryError: cannot allocate 3 GiB" in attempt["error"]
    assert len(told(ended)) == 1


def test_a_rank_that_hangs_is_a_communication_error(tmp_path: Path) -> None:
    args = ["pretrain", toml_file(tmp_path, parallel__timeout_s=3)]
    ended = command_ranks(2, args, tmp_path, at_step(3, lambda: time.sleep(7), (1,)))
    assert [e.code for e in ended] == [5, 5]
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("timeout", 5)
    assert attempt["error"].startswith("rank 0 on ")
    assert "CommError: a collective did not complete within parallel.timeout_s" in attempt["error"]
    assert len(told(ended)) == 1


def test_work_of_rank_0_alone_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    """Preparing data and what follows the last step are not collectives that hang."""

    def slow(rank: int) -> None:
        if rank == 0:
            from moefold.launch import pretrain
            from moefold.launch.data import loader

            for where, name in ((loader, "prepare"), (pretrain, "baseline")):
                real = getattr(where, name)
                setattr(where, name, lambda *args, real=real: (time.sleep(2.5), real(*args))[1])

    config = make_config(tmp_path, train__steps=2, parallel__timeout_s=2.0)
    assert pretrain_ranks(2, config, slow) == [0, 0]


# --- numbers ----------------------------------------------------------------------------------------------------------


def poison(weight: str, step: int) -> Callable[[int], None]:
    """Rank 1 alone puts a NaN into its part of a weight before a step."""

    def before(rank: int) -> None:
        real = Engine.train_step

        def train_step(self: Engine, *args, **kwargs):  # type: ignore[no-untyped-def]
            if self.step == step and self.mesh.rank == 1:
                next(p for p in self.parameters if p.placement.name.endswith(weight)).local.view(-1)[0] = float("nan")
            self.before = [p.local.clone() for p in self.parameters]  # type: ignore[attr-defined]
            try:
                return real(self, *args, **kwargs)
            except BaseException:
                same = all(torch.equal(p.local, b) or b.isnan().any() for p, b in zip(self.parameters, self.before, strict=True))
                print(f"weights are as they were: {same}", file=sys.stderr)
                raise

        Engine.train_step = train_step  # type: ignore[method-assign]

    return before


def test_a_loss_that_is_not_finite_stops_before_the_update_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    args = ["pretrain", toml_file(tmp_path, parallel__hsdp=2, parallel__ep=2, checkpoint__every=5)]
    ended = command_ranks(2, args, tmp_path, poison("attention.wo_DQ", 5))
    assert [e.code for e in ended] == [4, 4]
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("nan", 4)
    message = attempt["error"]
    assert "NumericsError: step 5: loss nan" in message
    assert "the weights were not updated" in message
    assert "rank 1: loss sum nan" in message
    assert "rank 0: loss sum" not in message
    samples = message.partition("samples [")[2].partition("]")[0]
    assert len(samples.split(", ")) == 4
    assert all(40 <= int(i) < 48 for i in samples.split(", "))
    assert told(ended) == [f"run failed (exit code 4): {message.splitlines()[0]}"]
    for e in ended:
        assert "weights are as they were: True" in e.err
        assert "Traceback" not in e.err
    assert complete_steps(tmp_path / "run") == [5]
    assert max(losses(tmp_path / "run")) == 5
    # the poison is not in the checkpoint: the run can go on
    assert [e.code for e in command_ranks(2, args, tmp_path)] == [0, 0]


def test_a_save_that_fails_in_the_background_ends_the_run_and_keeps_the_one_before(tmp_path: Path) -> None:
    def full_disk(rank: int) -> None:
        import torch.distributed.checkpoint as dcp

        real = dcp.FileSystemWriter.write_data

        def write_data(self, plan, planner):  # type: ignore[no-untyped-def]
            if rank == 1 and "step-00000004" in str(self.path):
                raise OSError(28, "No space left on device")
            return real(self, plan, planner)

        dcp.FileSystemWriter.write_data = write_data

    ended = command_ranks(2, ["pretrain", toml_file(tmp_path, checkpoint__every=2)], tmp_path, full_disk)
    assert [e.code for e in ended] == [3, 3]
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("failed", 3)
    assert "rank 1: OSError: [Errno 28] No space left on device" in attempt["error"]
    assert complete_steps(tmp_path / "run") == [2]
    assert len(told(ended)) == 1
