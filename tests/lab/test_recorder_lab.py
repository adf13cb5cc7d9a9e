"""What holds up a real job over real links is called by its name: a slow link, a slow rank, a hot expert, or nothing at all."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.bed import Lab
from lab.processes import Job

pytestmark = pytest.mark.alone

FOLDER = Path(__file__).parent
HOSTS = 4
STEPS = 6
NOISE = 1 / 3
"""Of the share of what was planted: other programs on this machine do hold up ranks, and are found too, but well below."""


class Training:
    """The running job, of which stretches are ordered one after another."""

    def __init__(self, lab: Lab, folder: Path):
        self.lab, self.folder, self.orders = lab, folder, 0
        self.job: Job = lab.start_torchrun(FOLDER / "recorder_job.py", [folder], timeout_s=170)

    def order(self, **fields: Any) -> None:
        unseen = self.folder / "order"
        unseen.write_text(json.dumps(fields))
        unseen.rename(self.folder / f"{self.orders}.json")
        self.orders += 1

    def verdicts(self, **fields: Any) -> list[dict[str, Any]]:
        """Of a stretch of training, the worst first."""
        number = self.orders
        self.order(steps=STEPS, **fields)
        out = self.job.on[0].wait_for(f'{{"order": {number}, ', timeout_s=90)
        answers = (json.loads(line) for line in out.splitlines(keepends=True) if line.startswith("{") and line.endswith("\n"))
        return next(answer["verdicts"] for answer in answers if answer["order"] == number)

    def end(self) -> None:
        self.order(steps=0)
        self.job.wait().check()


def named(found: list[dict[str, Any]]) -> set[tuple[str, int]]:
    """(kind, rank) of what stands out, over all layers."""
    shares: Counter[tuple[str, int]] = Counter()
    for v in found:
        shares[v["kind"], v["rank"]] += v["share"]
    return {cause for cause, share in shares.items() if share > NOISE * max(shares.values())}


@contextmanager
def interrupted(lab: Lab, host: int) -> Iterator[None]:
    """While the body runs, the processes of a host are stopped most of the time, a moment at a time."""
    end = threading.Event()

    def slices() -> None:
        while not end.is_set():
            lab.pause(host)
            end.wait(0.08)
            lab.resume(host)
            end.wait(0.04)

    thread = threading.Thread(target=slices)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def assert_healthy(training: Training) -> None:
    """No verdict. A busy machine gets another chance: what holds up a rank for a moment is no fault of the recorder."""
    found: list[dict[str, Any]] = []
    for _ in range(3):
        if not (found := training.verdicts()):
            return
        assert max(v["share"] for v in found) < 0.1, found
    raise AssertionError(f"nothing is wrong, but the recorder says {found}")


@pytest.mark.ranks
@pytest.mark.slow
def test_whatever_slows_a_job_is_named(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    lab = make_lab(hosts=HOSTS, rate="200mbit")
    training = Training(lab, tmp_path)
    assert_healthy(training)

    lab.shape(2, "20mbit")
    found = training.verdicts()
    lab.shape(2, "200mbit")
    assert named(found) == {("slow_link", 2)}, found
    assert found[0]["peer"] is None, "all of its links, not one"
    assert "links of rank 2 are slow" in found[0]["text"]

    found = training.verdicts(slow_rank=1, factor=2.5)
    assert named(found) == {("slow_rank", 1)}, found
    assert "rank 1 computes more slowly than the others on as much work" in found[0]["text"]

    with interrupted(lab, 3):
        found = training.verdicts()
    assert named(found) == {("slow_rank", 3)}, found

    found = training.verdicts(hot_expert=1)
    assert named(found) == {("hot_expert", 0)}, found
    assert {v["expert"] for v in found if v["kind"] == "hot_expert"} == {1}
    assert {v["layer"] for v in found if v["kind"] == "hot_expert"} == {0, 1}

    assert_healthy(training)
    training.end()
