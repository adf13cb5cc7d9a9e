"""Real torchrun jobs over two hosts: right numbers at the speed of the link, and what a job does when its network is broken."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.bed import Ended, Job, Lab

pytestmark = pytest.mark.alone

FOLDER = Path(__file__).parent
RATE_BYTES_PER_S = 200e6 / 8
STEP_BYTES = 1 << 18
"""Of the tensor that is added over two ranks: so much crosses the link in each direction."""


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab(hosts=2, rate="200mbit")


def lines(text: str) -> list[dict]:
    """The JSON lines of an output, without one that is only half written."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.startswith("{") and line.endswith("\n")]


@pytest.mark.ranks
@pytest.mark.slow
def test_rows_cross_the_link_unharmed_and_at_its_speed(lab: Lab) -> None:
    end = lab.torchrun(FOLDER / "exchange_job.py", [4096, 5], nproc_per_node=2, timeout_s=90).check()
    facts = [lines(host.out) for host in end.hosts]
    assert [sorted((f["rank"], f["node"], f["host"]) for f in host) for host in facts] == [
        [(0, 0, "nl0"), (1, 0, "nl0")],
        [(2, 1, "nl1"), (3, 1, "nl1")],
    ]
    assert {f["threads"] for host in facts for f in host} == {1}
    first = min((f for f in facts[0]), key=lambda f: f["rank"])
    for ranks_on_host, name in ((2, "all"), (1, "one_each")):
        crossing_bytes = ranks_on_host * first["bytes"] / 2  # half of every rank's rows go to the other host
        share = crossing_bytes / statistics.median(first["seconds"][name]) / RATE_BYTES_PER_S
        assert 0.80 <= share <= 0.97, f"{name}: each direction carries {share:.1%} of the link's rate"


def step_seconds(job: Job, host: int, after: int) -> list[float]:
    return [line["seconds"] for line in lines(job.on[host].out()) if line["step"] > after]


def steps_done(job: Job, host: int) -> int:
    return len(lines(job.on[host].out()))


def wait_for_steps(job: Job, more: int) -> None:
    job.wait_for(f'"step": {max(steps_done(job, host) for host in job.on) + more},', timeout_s=30)


@pytest.mark.ranks
@pytest.mark.slow
def test_faults_reach_a_running_job(lab: Lab) -> None:
    """One job lives through a slow link, a hung host and a pulled cable, and ends when a host dies."""
    job = lab.start_torchrun(FOLDER / "steps_job.py", [STEP_BYTES, 20], timeout_s=90)
    wait_for_steps(job, 20)
    normal_s = statistics.median(step_seconds(job, 0, after=5))

    lab.shape(1, "20mbit")
    at = steps_done(job, 0)
    wait_for_steps(job, 8)
    slow_s = statistics.median(step_seconds(job, 0, after=at + 2))
    assert slow_s > STEP_BYTES / (20e6 / 8), "faster than the link allows"
    assert normal_s < slow_s / 2
    lab.shape(1, "200mbit")
    wait_for_steps(job, 3)

    for hinder, relieve in (
        (lambda: lab.pause(1), lambda: lab.resume(1)),
        (lambda: lab.link(1, up=False), lambda: lab.link(1, up=True)),
    ):
        at = steps_done(job, 0)
        hinder()
        time.sleep(1.0)
        relieve()
        wait_for_steps(job, 5)
        assert max(step_seconds(job, 0, after=at - 1)) > 0.9, "no step can have ended meanwhile"

    lab.kill(1)
    survivor, dead = job.wait().hosts
    assert dead.code == -9 and not dead.timed_out
    assert survivor.code == 1 and not survivor.timed_out
    assert says_that_the_peer_is_gone(survivor)
    assert lab.pids(0) == lab.pids(1) == []


def says_that_the_peer_is_gone(end: Ended) -> bool:
    return "Connection closed by peer" in end.err or "Connection reset by peer" in end.err
