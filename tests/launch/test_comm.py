"""From the recorders of all ranks to metrics, comm.json and the report."""

from __future__ import annotations

import json
import time
from html import unescape
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import GlooPool
from moefold.launch import comm
from moefold.launch.comm import CommLog, CoreWait, comm_metrics
from moefold.launch.console import console_line
from moefold.launch.metrics import make_record
from moefold.launch.report import report
from moefold.launch.rundir import RunDir
from moefold.launch.settings import RunSection
from moefold.parallel.collectives import all_reduce
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.recorder_clock import HostClock
from moefold.parallel.transfer import Transfer

ROWS = 10
SLOW_S = 0.03


def log_steps(rank: int, world: int, path: Path, steps: int) -> list[dict[str, float]]:
    """Steps of one exchange of rows and one sum, before which rank 1 is slow; the metrics of each."""
    group = dist.group.WORLD
    assert group is not None
    recorder = CommRecorder(rank, torch.device("cpu"))
    dispatch = recorder.probe("ep_etp", group, "dispatch", layer=2)
    norm = recorder.probe("world", group, "norm")
    log = CommLog(recorder, group, path)
    metrics = []
    for step in range(steps):
        recorder.start_step(step)
        x_RD = torch.ones(ROWS * world, 4)
        transfer = Transfer([ROWS] * world, [ROWS] * world, group, dispatch, torch.tensor([ROWS] * world))
        transfer.finish(transfer.start(x_RD))
        time.sleep(SLOW_S if rank == 1 else 0.001)
        all_reduce(torch.ones(1), group, norm)
        metrics.append(log.sample(step))
        assert rank or path.exists() == (step + 1 >= comm.SAMPLES)
    log.write()
    return metrics


@pytest.mark.ranks
def test_samples_become_metrics_a_file_and_a_section(gloo_pool: GlooPool, tmp_path: Path) -> None:
    run = RunDir.create(RunSection(dir=str(tmp_path / "run")), "", argv=["moefold"])
    path = run.path / "comm.json"
    first, *others = gloo_pool.run(log_steps, 3, path, 4)
    assert others == [[{}] * 4] * 2, "rank 0 writes for all"
    for values in first:
        assert values["comm/a2a_gib"] == pytest.approx(ROWS * 16 * 2 / 2**30)
        assert 0 < values["comm/a2a_share"] < values["comm/exposed_share"] < 1
        # two of three ranks wait for the third
        assert values["comm/skew_s"] == pytest.approx(2 / 3 * (SLOW_S - 0.001), rel=0.5)
    record = make_record("step", 4, 0, first[-1])
    assert f"a2a {100 * first[-1]['comm/a2a_share']:.0f}%" in console_line(record, 10)

    data = json.loads(path.read_text())
    assert data["steps"] == [0, 1, 2, 3] and data["left_out"] == 0
    assert data["all_to_all_bytes"] == [[4 * ROWS * 16] * 3] * 3
    assert data["expert_rows"] == {"2": [4 * 3 * ROWS] * 3}
    assert [(v["kind"], v["rank"]) for v in data["verdicts"]] == [("slow_rank", 1)]

    written = report(run.path)
    html = unescape(written.path.read_text())
    assert written.sections["communication"]
    assert data["verdicts"][0]["text"] in html and "Traffic of the all-to-all" in html
    assert "4 sampled steps up to 3" in html


def test_the_newest_samples_are_kept(monkeypatch: pytest.MonkeyPatch, gloo_pool: GlooPool, tmp_path: Path) -> None:
    path = tmp_path / "comm.json"
    gloo_pool.run(log_steps, 2, path, comm.SAMPLES + 2)
    assert json.loads(path.read_text())["steps"] == list(range(2, comm.SAMPLES + 2))


class JumpingClock:
    """Goes ahead by `by_s` whenever it is told to."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.ahead_s


def log_with_jumps(rank: int, world: int, path: Path, jumps: dict[int, float]) -> list[bool]:
    """Steps in some of which the clock of rank 1 jumps between two sums; which of them have metrics."""
    group = dist.group.WORLD
    assert group is not None
    now = JumpingClock()
    recorder = CommRecorder(rank, torch.device("cpu"), clock=HostClock(now))
    probe = recorder.probe("world", group, "norm")
    log = CommLog(recorder, group, path, ["a", "b"])
    told = []
    for step in range(4):
        recorder.start_step(step)
        all_reduce(torch.ones(1), group, probe)
        now.ahead_s += jumps.get(step, 0.0) if rank == 1 else 0.0
        all_reduce(torch.ones(1), group, probe)
        told.append(bool(log.sample(step)))
    log.write()
    return told


@pytest.mark.ranks
def test_a_step_in_which_a_clock_jumps_is_left_out_and_clocks_are_compared_again(gloo_pool: GlooPool, tmp_path: Path) -> None:
    path = tmp_path / "comm.json"
    assert gloo_pool.run(log_with_jumps, 2, path, {1: 100.0})[0] == [True, False, True, True]
    data = json.loads(path.read_text())
    assert data["steps"] == [0, 2, 3] and data["hosts"] == ["a", "b"]
    assert data["unaligned_s"] == {"1": pytest.approx(100.0, abs=1.0)}
    assert data["history"]["steps"] == [0, 2, 3]
    assert data["total"]["skew_s"] < 10.0, "seconds of a jump are no waiting"


def test_waiting_for_a_core_is_read_by_thread_and_step(tmp_path: Path) -> None:
    def write(**waits: int) -> None:
        for task, ns in waits.items():
            (tmp_path / task).mkdir(exist_ok=True)
            name = {"2": "pt_autograd_0", "3": "gloo"}.get(task, "python")
            (tmp_path / task / "comm").write_text(f"{name}\n")
            (tmp_path / task / "schedstat").write_text(f"123 {ns} 7\n")

    write(**{"1": 1_000_000_000, "3": 0})
    waiting = CoreWait(tmp_path, main=1)
    assert waiting.per_step_s(10) is None, "it is not known since which step"
    write(**{"1": 1_500_000_000, "2": 100_000_000, "3": 900_000_000})
    assert waiting.per_step_s(12) == pytest.approx(0.3), "of the threads that compute"
    (tmp_path / "1" / "schedstat").write_text("words")
    assert waiting.per_step_s(13) is None
    assert CoreWait(tmp_path / "nowhere").per_step_s(1) is None


def test_a_step_without_records_has_no_metrics() -> None:
    assert comm_metrics([[], []]) == {}


def test_a_run_without_the_file_says_how_to_get_it(tmp_path: Path) -> None:
    run = RunDir.create(RunSection(dir=str(tmp_path / "run")), "", argv=["moefold"])
    written = report(run.path)
    assert not written.sections["communication"]
    assert "log.comm = true" in written.path.read_text()
