"""What watches a run, as it is put together for two ranks: names of hosts, a window of traces, counters of GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import GlooPool
from moefold.launch.comm import CommLog
from moefold.launch.gpu_counters import Reading
from moefold.launch.instruments import GpuLog, Instruments, open_instruments
from moefold.launch.process import Crew
from moefold.launch.rundir import RunDir
from moefold.launch.settings import LogConfig
from moefold.moe.errors import ConfigError
from moefold.parallel.collectives import all_reduce
from moefold.parallel.recorder import CommRecorder

CPU = torch.device("cpu")


class FakeSampler:
    """Says what it is given."""

    def __init__(self, values: dict[str, float | None]):
        self.values = values

    def take(self) -> Reading:
        return Reading(self.values, ("hardware slowdown",))


def steps_of_a_run(rank: int, world: int, path: Path, log: LogConfig) -> dict[str, Any]:
    """Three steps under all instruments; the metrics of the last."""
    crew, run = Crew(), RunDir(path)
    recorder = CommRecorder(rank, CPU)
    probe = recorder.probe("world", crew.group, "norm")
    comm = CommLog(recorder, crew.group, path / "comm.json")
    metrics: dict[str, float] = {}
    with open_instruments(log, comm, crew, run, CPU) as instruments:
        assert instruments.gpu is None, "no GPU here"
        values = {"power_w": 100.0 * (rank + 1), "nvlink_tx_gib_s": None}
        instruments.gpu = GpuLog(FakeSampler(values) if rank else None, crew, run)  # type: ignore[arg-type]
        for step in range(3):
            instruments.before(step)
            recorder.start_step(step)
            all_reduce(torch.ones(1), crew.group, probe)
            instruments.after(step)
            metrics = instruments.sample(step)
    dist.barrier()
    return metrics


def a_run(path: Path) -> Path:
    path.mkdir()
    (path / "status.json").write_text(json.dumps({"schema": 1, "state": "running", "attempts": []}))
    return path


@pytest.mark.ranks
def test_all_instruments_leave_their_files(gloo_pool: GlooPool, tmp_path: Path) -> None:
    path = a_run(tmp_path / "run")
    first, second = gloo_pool.run(steps_of_a_run, 2, path, LogConfig(trace_steps=(1, 2), trace_ranks=(1,)))
    assert second == {}, "rank 0 writes for all"
    assert first["gpu/power_w"] == 200.0, "of the rank whose device tells it"
    assert "gpu/nvlink_tx_gib_s" not in first and first["comm/exposed_share"] > 0
    comm = json.loads((path / "comm.json").read_text())
    assert comm["hosts"][0] and comm["hosts"][0] == comm["hosts"][1] and comm["steps"] == [0, 1, 2]
    assert sorted(p.name for p in (path / "trace" / "attempt-00").iterdir()) == ["rank-00001.json", "rank-00001.trace.json.gz"]
    silent, telling = json.loads((path / "gpu.json").read_text())["ranks"]
    assert set(silent["values"].values()) == {None} and silent["reasons"] == []
    assert telling["values"]["power_w"] == 200.0 and telling["reasons"] == ["hardware slowdown"]


def out_of_range(rank: int, world: int, path: Path) -> str:
    try:
        open_instruments(LogConfig(trace_steps=(1, 2), trace_ranks=(0, 7)), None, Crew(), RunDir(path), CPU)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.ranks
def test_a_rank_that_there_is_not_is_refused(gloo_pool: GlooPool, tmp_path: Path) -> None:
    (said,) = set(gloo_pool.run(out_of_range, 2, a_run(tmp_path / "run")))
    assert "log.trace_ranks: names rank 7, but there are ranks 0 to 1" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trace_steps": (5,)}, "log.trace_steps: is [5], but must be [start, stop]"),
        ({"trace_steps": (5, 5)}, "0 <= start < stop"),
        ({"trace_steps": (0, 21)}, "stop <= start + 20: traces are large"),
        ({"trace_ranks": (1, 1)}, "log.trace_ranks: is [1, 1], but must name ranks once each"),
        ({"trace_ranks": (-1,)}, "counted from 0"),
    ],
)
def test_a_window_that_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LogConfig(**settings)
    assert said in str(caught.value)


def test_without_any_nothing_is_said() -> None:
    with Instruments() as none:
        none.before(0)
        none.after(0)
        assert none.sample(0) == {}
