"""Runs that are killed or asked to stop, and go on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import RankError
from jobs import (
    at_step,
    command_ranks,
    complete_steps,
    end_tree,
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

pytestmark = [pytest.mark.ranks, pytest.mark.alone]

STEPS = 12


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
        end_tree(process)
    attempt = last_attempt(tmp_path / "run")
    assert (attempt["state"], attempt["exit_code"], attempt["error"]) == ("preempted", 75, None), out
    assert RunDir.open(tmp_path / "run").exit_code() == 75
    (step,) = complete_steps(tmp_path / "run")
    assert step == max(losses(tmp_path / "run"))
