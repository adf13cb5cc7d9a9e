"""Traces of several ranks, whose clocks differ by minutes, become one in which everything has its place."""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from comm_case import CommCase, make_recorded_run
from helpers import GlooPool
from moefold.launch.profile.run import profile_run
from moefold.launch.profile.trace_merge import PER_RANK, MergedTrace, merge_traces
from moefold.launch.profile.verbs_run import VERB
from moefold.launch.report_parts import load_runs
from moefold.launch.trace import MARK, TraceWindow
from moefold.moe.errors import RunDirError
from moefold.parallel.collectives import all_reduce
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.recorder_clock import HostClock, clock_offsets

APART_S = 777.0
STEPS, WINDOW = 6, (2, 4)


def traced_job(rank: int, world: int, run: Path, chosen: tuple[int, ...], until: int) -> list[str]:
    """Steps of a product and a sum, on clocks that are far apart; the files that this rank finds afterwards."""
    group = dist.group.WORLD
    assert group is not None

    def now() -> float:
        return time.perf_counter() + APART_S * rank

    recorder = CommRecorder(rank, torch.device("cpu"), clock=HostClock(now))
    probe = recorder.probe("world", group, "norm", layer=None)
    folder = run / "trace" / "attempt-00"
    window = TraceWindow(WINDOW, chosen, rank, folder, lambda: clock_offsets(group, now=now), recorder, now)
    x_NN = torch.ones(64, 64)
    for step in range(until):
        window.before(step)
        recorder.start_step(step)
        x_NN = x_NN @ x_NN / 64
        time.sleep(0.005 * rank)
        all_reduce(torch.ones(1), group, probe)
        window.after(step)
    window.close()
    dist.barrier()
    return sorted(p.name for p in folder.glob("*"))


def traced_run(pool: GlooPool, path: Path, chosen: tuple[int, ...] = (0, 1), until: int = STEPS) -> list[str]:
    path.mkdir()
    (path / "status.json").write_text(json.dumps({"schema": 1, "state": "completed", "attempts": []}))
    return pool.run(traced_job, 2, path, chosen, until)[0]


def merged(path: Path, name: str = "all.json") -> tuple[MergedTrace, list[dict[str, Any]]]:
    done = merge_traces(load_runs([path])[0], path / name)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(path / name, "rt") as file:
        return done, json.load(file)["traceEvents"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, gloo_pool: GlooPool) -> Path:
    path = tmp_path_factory.mktemp("traces") / "run"
    files = traced_run(gloo_pool, path)
    assert files == ["rank-00000.json", "rank-00000.trace.json.gz", "rank-00001.json", "rank-00001.trace.json.gz"]
    return path


@pytest.mark.ranks
def test_one_trace_has_every_rank_in_order_on_one_clock(run: Path) -> None:
    done, events = merged(run)
    assert done.ranks == (0, 1) and done.error_s < 0.05 and "2 ranks, steps 2 to 3" in done.render()
    timed = [e for e in events if e["ph"] != "M"]
    assert len(timed) == done.events
    by_rank = defaultdict(list)
    for event in timed:
        by_rank[event["pid"] // PER_RANK].append(event["ts"])
        assert event["name"] != MARK
    assert sorted(by_rank) == [0, 1]
    assert all(times == sorted(times) for times in by_rank.values())
    assert all(times[0] >= -1 and times[-1] < 60e6 for times in by_rank.values()), "clocks 777 s apart would show"
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert all(names[e["pid"]].startswith(f"rank {e['pid'] // PER_RANK} · ") for e in timed)
    collectives = {r: [e for e in timed if e["pid"] == r * PER_RANK + 1] for r in (0, 1)}
    assert [e["args"]["step"] for e in collectives[0]] == [e["args"]["step"] for e in collectives[1]] == [2, 3]
    for one, other in zip(collectives[0], collectives[1], strict=True):
        # nobody goes on before both have come: so on clocks that agree the spans overlap
        slack_us = 1e6 * done.error_s + 1
        assert one["ts"] + one["dur"] + slack_us > other["ts"] and other["ts"] + other["dur"] + slack_us > one["ts"]
    # what torch saw of a sum lies inside what the recorder saw of it
    for rank, spans in collectives.items():
        seen = [e for e in timed if e["pid"] == rank * PER_RANK and "allreduce" in e["name"] and e["ph"] == "X"]
        for span in spans:
            assert any(span["ts"] - 500 < e["ts"] < span["ts"] + span["dur"] + 500 for e in seen)


@pytest.mark.ranks
def test_a_name_that_ends_in_gz_is_zipped(run: Path) -> None:
    assert merged(run, "all.json.gz")[1] == merged(run)[1]


def test_traces_of_two_runs_are_not_put_together(tmp_path: Path) -> None:
    path = make_recorded_run(tmp_path / "run", CommCase(hosts=("a", "b"), steps=1))
    parser = argparse.ArgumentParser()
    VERB.options(parser)
    with pytest.raises(RunDirError, match="--trace takes one run"):
        VERB.run(parser.parse_args([str(path), str(path), "--trace", str(tmp_path / "all.json")]), {})


@pytest.mark.ranks
def test_a_window_that_is_cut_short_keeps_what_it_saw_of_chosen_ranks(tmp_path: Path, gloo_pool: GlooPool) -> None:
    path = tmp_path / "run"
    assert traced_run(gloo_pool, path, chosen=(1,), until=3) == ["rank-00001.json", "rank-00001.trace.json.gz"]
    done, events = merged(path)
    assert done.ranks == (1,)
    assert {e["args"]["step"] for e in events if e.get("cat") == "collective"} == {2}


def edited(run: Path, to: Path, **changes: Any) -> Path:
    """A copy of a run whose rank 1 says something else."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("all.json*"))
    about = to / "trace" / "attempt-00" / "rank-00001.json"
    data = json.loads(about.read_text())
    about.write_text(json.dumps({**data, **{key: change(data[key]) for key, change in changes.items()}}))
    return to


@pytest.mark.ranks
def test_a_clock_that_jumped_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    half = edited(run, tmp_path / "a", marks_s=lambda m: [*m[: len(m) // 2], *(t + 0.5 for t in m[len(m) // 2 :])])
    with pytest.raises(RunDirError, match=r"a clock of rank 1 \(host .*\) jumped by 0\.[45]\d* s within the window"):
        merged(half)
    offset = edited(run, tmp_path / "b", offsets_s=lambda o: [o[0], o[1] - 3.0])
    with pytest.raises(RunDirError, match=r"rank 1 .* jumped by (3|2\.9)"):
        merged(offset)
    lost = edited(run, tmp_path / "c", marks_s=lambda m: m[:-1])
    with pytest.raises(RunDirError, match="has 10 of 9 clock marks"):
        merged(lost)
    assert not list((tmp_path / "a").glob("*all.json*")), "nothing half written"


@pytest.mark.ranks
def test_a_damaged_file_is_named(run: Path, tmp_path: Path) -> None:
    path = edited(run, tmp_path / "run")
    trace = path / "trace" / "attempt-00" / "rank-00001.trace.json.gz"
    trace.write_bytes(trace.read_bytes()[:1000])
    with pytest.raises(RunDirError, match=r"rank-00001\.trace\.json\.gz: is damaged"):
        merged(path)
    assert not (path / "all.json").exists()


def test_without_a_window_the_collectives_of_one_step_are_the_trace(tmp_path: Path) -> None:
    path = make_recorded_run(tmp_path / "run", CommCase(hosts=("a", "b", "b"), slow={2: 2.5}))
    done, events = merged(path)
    spans = profile_run(path).runs[0].comm["spans"]["ranks"]
    assert done.ranks == (0, 1, 2) and done.events == sum(map(len, spans.values()))
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        "rank 0 · a · collectives",
        "rank 1 · b · collectives",
        "rank 2 · b · collectives",
    }
    assert {e["name"] for e in events if e["ph"] == "X"} >= {"dispatch of layer 0", "combine of layer 1", "gradients"}


def test_without_anything_the_way_to_some_is_told(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(RunDirError, match=r"nothing to make a trace of; train with log\.trace_steps"):
        merged(tmp_path)
    assert not list(tmp_path.glob("*all*"))
