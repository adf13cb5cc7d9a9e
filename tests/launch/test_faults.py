"""What ends a run before its last step, and how it goes on: kills, stop requests, failing ranks, hangs, losses that are NaN."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import RankError
from jobs import (
    command_ranks,
    complete_steps,
    environment,
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

STEPS = 12


def at_step(step: int, act: Callable[[], None], ranks: tuple[int, ...]) -> Callable[[int], None]:
    """A patch for `before`: the ranks act in place of training step `step` (from 0)."""

    def before(rank: int) -> None:
        real = Engine.train_step

        def train_step(self: Engine, *args, **kwargs):  # type: ignore[no-untyped-def]
            if self.step == step and rank in ranks:
                act()
            return real(self, *args, **kwargs)

        Engine.train_step = train_step  # type: ignore[method-assign]

    return before


def killed_at(step: int, delay_s: float) -> Callable[[int], None]:
    """Every rank is killed by the system `delay_s` after it began step `step`, wherever it is then."""

    def kill() -> None:
        threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return at_step(step, kill, (0, 1, 2, 3))


# --- killed and resumed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kills", "changes"),
    [
        pytest.param(3, {"parallel__ep": 2}, id="three-times-dp2-ep2"),
        pytest.param(
            1,
            {"parallel__micro_batch": 1, "model__moe__balance__aux_loss_coeff": 1.0, "model__moe__balance__carry": 1.0},
            id="global-balance-with-prior-over-4-micro-batches",
        ),
        pytest.param(
            1,
            {"parallel__tp": 2, "model__moe__balance__expert_bias": True, "model__moe__balance__bias_update_rate": 0.05},
            id="tp2-expert-bias",
        ),
    ],
)
def test_a_run_that_is_killed_has_bitwise_the_curve_of_one_that_is_not(
    tmp_path: Path, kills: int, changes: dict[str, object]
) -> None:
    same = {"train__steps": STEPS, "checkpoint__every": 2, **changes}
    assert pretrain_ranks(2, make_config(tmp_path, "whole", **same)) == [0, 0]
    config = make_config(tmp_path, "killed", **same)
    draw = random.Random(5)
    for low, high in ((1, 4), (5, 8), (9, 11))[-kills:]:
        with pytest.raises(RankError, match="process died"):
            pretrain_ranks(2, config, killed_at(draw.randint(low, high), draw.uniform(0, 0.03)))
    assert pretrain_ranks(2, config) == [0, 0]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "killed")) == STEPS
    history = RunDir.open(tmp_path / "killed").status()["attempts"]
    assert [a["state"] for a in history] == ["failed"] * kills + ["completed"]
    assert "killed" in history[0]["error"]


def test_state_that_is_not_restored_would_show_in_the_curve(tmp_path: Path) -> None:
    """The three cases above depend on balance state and moments: without them the curve is another one."""
    same = {"train__steps": 6, "parallel__micro_batch": 2, "model__moe__balance__aux_loss_coeff": 1.0}
    assert pretrain_ranks(1, make_config(tmp_path, "whole", **same)) == [0]

    def forget(rank: int) -> None:
        real = Engine.train_step

        def train_step(self: Engine, *args, **kwargs):  # type: ignore[no-untyped-def]
            if self.step == 3:
                self.balancer.previous_LE = None
            return real(self, *args, **kwargs)

        Engine.train_step = train_step  # type: ignore[method-assign]

    assert pretrain_ranks(1, make_config(tmp_path, "forgetful", **same), forget) == [0]
    whole, forgetful = losses(tmp_path / "whole"), losses(tmp_path / "forgetful")
    assert whole[4] == forgetful[4]
    assert whole[6] != forgetful[6]


def test_a_run_goes_on_in_another_layout_along_the_same_curve(tmp_path: Path) -> None:
    same = {"train__steps": STEPS, "checkpoint__every": 3}
    assert pretrain_ranks(4, make_config(tmp_path, "whole", **same)) == [0] * 4
    with pytest.raises(RankError, match="process died"):
        pretrain_ranks(4, make_config(tmp_path, "moved", **same), killed_at(7, 0.0))
    assert pretrain_ranks(4, make_config(tmp_path, "moved", parallel__ep=2, parallel__tp=2, **same)) == [0] * 4
    whole, moved = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert list(moved) == list(whole)
    assert list(moved.values()) == pytest.approx(list(whole.values()), rel=1e-5)
    assert [moved[s] for s in (1, 2, 3)] == [whole[s] for s in (1, 2, 3)]


KILLS_ITSELF = """
import os, signal
from moefold.launch.cli import main
from moefold.parallel.engine import Engine

real = Engine.train_step
def train_step(self, *args, **kwargs):
    if self.step == 7 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)
Engine.train_step = train_step
raise SystemExit(main(["pretrain", *__import__("sys").argv[1:]]))
"""


def test_torchrun_restarts_a_killed_job_and_it_goes_on(tmp_path: Path) -> None:
    same = {"train__steps": STEPS, "checkpoint__every": 3, "parallel__ep": 2}
    script = tmp_path / "job.py"
    script.write_text(KILLS_ITSELF)
    command = torchrun_command(2, toml_file(tmp_path, "killed", **same), script=script)
    command.insert(command.index("--standalone"), "--max-restarts=1")
    ended = run_command(command, tmp_path)
    assert ended.code == 0, ended.err
    assert [a["state"] for a in RunDir.open(tmp_path / "killed").status()["attempts"]] == ["failed", "completed"]
    assert "resuming from step " in ended.out
    assert pretrain_ranks(2, make_config(tmp_path, "whole", **same)) == [0, 0]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


# --- asked to stop ----------------------------------------------------------------------------------------------------


def signalled(number: int, step: int, rank: int) -> Callable[[int], None]:
    return at_step(step, lambda: os.kill(os.getpid(), number), (rank,))


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_run_goes_on(tmp_path: Path) -> None:
    same = {"train__steps": 8, "parallel__ep": 2}
    config = make_config(tmp_path, "stopped", **same)
    # the vote is taken before the step in which the signal arrives, so the step after it is the last
    assert pretrain_ranks(2, config, signalled(signal.SIGUSR1, 4, rank=1)) == [75, 75]
    attempt = last_attempt(tmp_path / "stopped")
    assert (attempt["state"], attempt["exit_code"]) == ("preempted", 75)
    assert complete_steps(tmp_path / "stopped") == [6]
    assert pretrain_ranks(2, config) == [0, 0]
    assert pretrain_ranks(2, make_config(tmp_path, "whole", **same)) == [0, 0]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_ctrl_c_saves_and_a_second_one_ends_at_once(tmp_path: Path) -> None:
    args = ["pretrain", toml_file(tmp_path, train__steps=8, parallel__ep=2)]
    for ended in command_ranks(2, args, tmp_path, at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT), (0, 1))):
        assert ended.code == 130
    assert last_attempt(tmp_path / "run")["state"] == "interrupted"
    assert complete_steps(tmp_path / "run") == [4]

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    for ended in command_ranks(2, args, tmp_path, at_step(5, twice, (0, 1))):
        assert ended.code == 130
    assert last_attempt(tmp_path / "run")["state"] == "interrupted"
    assert complete_steps(tmp_path / "run") == [4]


def test_a_request_in_the_last_step_does_not_keep_the_run_from_completing(tmp_path: Path) -> None:
    config = make_config(tmp_path, train__steps=4)
    assert pretrain_ranks(2, config, signalled(signal.SIGTERM, 2, rank=0)) == [0, 0]
    assert last_attempt(tmp_path / "run")["state"] == "completed"


def test_term_to_torchrun_saves_and_says_so(tmp_path: Path) -> None:
    same = {"train__steps": 500, "parallel__ep": 2, "train__eval_batches": 0}
    process = subprocess.Popen(
        torchrun_command(2, toml_file(tmp_path, **same)),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        end_s = time.monotonic() + 40
        while not losses(tmp_path / "run"):
            assert process.poll() is None and time.monotonic() < end_s
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"], attempt["error"]) == ("preempted", 75, None), out
    assert RunDir.open(tmp_path / "run").exit_code() == 75
    (step,) = complete_steps(tmp_path / "run")
    assert step == max(losses(tmp_path / "run"))


# --- a rank fails -----------------------------------------------------------------------------------------------------


def fail() -> None:
    raise ValueError("the disk has eaten my tokens")


def told(ended: list) -> list[str]:
    """Who said that the run failed, and how."""
    return [line for e in ended for line in e.err.splitlines() if line.startswith("run failed")]


def test_one_rank_that_raises_stops_all_and_is_named_once(tmp_path: Path) -> None:
    ended = command_ranks(4, ["pretrain", toml_file(tmp_path, checkpoint__every=2)], tmp_path, at_step(5, fail, (2,)), 20)
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
    assert ended.code == 1
    assert ended.seconds < 20
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("failed", 1)
    assert attempt["error"].startswith("rank 2 on ")
    assert ended.err.count("run failed (exit code 1): ") == 1
    assert "the disk has eaten my tokens" in ended.err.partition("run failed")[2]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_is_killed_stops_all_and_is_named(tmp_path: Path, rank: int) -> None:
    args = ["pretrain", toml_file(tmp_path, checkpoint__every=2)]
    ended = command_ranks(4, args, tmp_path, at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL), (rank,)), 20)
    assert [e.code for e in ended] == [-9 if r == rank else 1 for r in range(4)]
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("failed", 1)
    assert attempt["error"].startswith(f"rank {rank} on ")
    assert "it was killed" in attempt["error"]
    assert told(ended) == [f"run failed (exit code 1): {attempt['error']}"]


def test_out_of_memory_on_one_rank_has_its_own_code_on_all(tmp_path: Path) -> None:
    def exhaust() -> None:
        raise MemoryError("cannot allocate 3 GiB")

    ended = command_ranks(2, ["pretrain", toml_file(tmp_path)], tmp_path, at_step(3, exhaust, (1,)), 20)
    assert [e.code for e in ended] == [6, 6]
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("oom", 6)
    assert "MemoryError: cannot allocate 3 GiB" in attempt["error"]
    assert len(told(ended)) == 1


def test_a_rank_that_hangs_is_a_communication_error(tmp_path: Path) -> None:
    args = ["pretrain", toml_file(tmp_path, parallel__timeout_s=3)]
    ended = command_ranks(2, args, tmp_path, at_step(3, lambda: time.sleep(7), (1,)), 30)
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
    ended = command_ranks(2, args, tmp_path, poison("attention.wo_DQ", 5), 30)
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

    ended = command_ranks(2, ["pretrain", toml_file(tmp_path, checkpoint__every=2)], tmp_path, full_disk, 30)
    assert [e.code for e in ended] == [3, 3]
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"]) == ("failed", 3)
    assert "rank 1: OSError: [Errno 28] No space left on device" in attempt["error"]
    assert complete_steps(tmp_path / "run") == [2]
    assert len(told(ended)) == 1
