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
from moefold.launch.comm import CommLog, comm_metrics
from moefold.launch.console import console_line
from moefold.launch.metrics import make_record
from moefold.launch.report import report
from moefold.launch.rundir import RunDir
from moefold.launch.settings import RunSection
from moefold.parallel.collectives import all_reduce
from moefold.parallel.recorder import CommRecorder
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


def test_a_step_without_records_has_no_metrics() -> None:
    assert comm_metrics([[], []]) == {}


def test_a_run_without_the_file_says_how_to_get_it(tmp_path: Path) -> None:
    run = RunDir.create(RunSection(dir=str(tmp_path / "run")), "", argv=["moefold"])
    written = report(run.path)
    assert not written.sections["communication"]
    assert "log.comm = true" in written.path.read_text()
