"""`moefold profile comm` on four real hosts: its numbers are those of plain sockets, and a slow host or link gets its name."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab.bed import Lab
from lab.processes import Job

FOLDER = Path(__file__).parent
RATE_MBIT, SLOW_MBIT = 200, 40
PAYLOAD = 1448 / 1514
"""Of a link's rate is what TCP carries."""
SHAPED = 1e6 * RATE_MBIT / 8 * PAYLOAD
FEW, MANY = 128, 1 << 19
SWEEP = {"begin": FEW, "end": MANY, "factor": 4.0, "iters": 20, "warmup": 2, "operations": ["send_recv"]}
PAIRS = {**SWEEP, "begin": 1024, "end": 65536, "factor": 8.0, "iters": 3}
"""Enough to know how large a message has to be, and then every two hosts."""


class Profiler:
    """The running job, of which profiles are ordered one after another."""

    def __init__(self, lab: Lab, folder: Path):
        self.folder, self.orders = folder, 0
        self.job: Job = lab.start_torchrun(FOLDER / "profile_comm_job.py", [folder], timeout_s=400)

    def order(self, fields: dict[str, Any] | None) -> None:
        unseen = self.folder / "order"
        unseen.write_text(json.dumps(fields))
        unseen.rename(self.folder / f"{self.orders}.json")
        self.orders += 1

    def answer(self, **fields: Any) -> dict[str, Any]:
        number = self.orders
        self.order(fields)
        process = self.job.on[0]
        process.wait_for(f'{{"order": {number}, ', timeout_s=120)
        while not (out := process.out()).endswith("\n"):
            pass  # a long line is read while it is being written
        return next(a for a in map(json.loads, out.splitlines()) if a["order"] == number)

    def findings(self) -> list[tuple[str, list[str], str]]:
        found = self.answer(**PAIRS)["profile"]["findings"]
        return [(f["kind"], f["members"], f["way"]) for f in found]


def plain_ping_pong(lab: Lab, port: int, nbytes: int, repeats: int) -> dict[str, float]:
    """Half of the time there and back between hosts 0 and 1."""
    program = [sys.executable, "-I", "-S", str(FOLDER / "plain_sockets.py")]
    lab.start(1, [*program, "serve", str(port)]).wait_for("listening")
    end = lab.run(0, [*program, "ask", lab.address(1), str(port), str(nbytes), str(repeats)])
    assert end.code == 0, end
    return json.loads(end.out)


@contextmanager
def slow_link(lab: Lab, source: int, target: int) -> Iterator[None]:
    """While the body runs, what one host sends to one other is slow, and nothing else."""
    rates = ((1, RATE_MBIT), (2, SLOW_MBIT))
    commands = [
        "qdisc replace dev eth0 root handle 1: htb default 1",
        *(f"class add dev eth0 parent 1: classid 1:{n} htb rate {mbit}mbit burst 8k cburst 8k" for n, mbit in rates),
        f"filter add dev eth0 parent 1: protocol ip u32 match ip dst {lab.address(target)}/32 flowid 1:2",
    ]
    for command in commands:
        end = lab.run(source, ["tc", *command.split()])
        assert end.code == 0, end
    yield
    lab.shape(source, f"{RATE_MBIT}mbit")


SLACK_S = 50e-6
"""What this machine's interpreter may add to a message that takes as long: on some days a fifth of it, on others four fifths."""


def errors(curve: dict[str, Any], gloo_s: float) -> tuple[float, float]:
    """Of bandwidth against the shaped rate, by 5 %, and of latency against the ping-pong, by 20 % or `SLACK_S`. The fastest
    iterations count."""
    rate, latency_s = abs(curve["fastest"]["bytes_per_s"] / SHAPED - 1), abs(curve["fastest"]["alpha_s"] - gloo_s)
    return rate / 0.05, latency_s / max(0.20 * gloo_s, SLACK_S)


def busy_share(seconds: float = 0.5) -> float:
    """Part of the processors that anybody uses, while the job waits for its next order."""
    psutil.cpu_percent()
    time.sleep(seconds)
    return psutil.cpu_percent() / 100


def measured(profiler: Profiler) -> tuple[dict[str, Any], float, float]:
    """A profile, the ping-pong beside it, and how wide the bounds are: 1 on a machine that does nothing else, 3 on a busy one.

    What else runs is no property of a link, and a message of 50 us feels every process that it has to wait for.
    """
    attempts = []
    for _ in range(6):
        width = 1.0 if busy_share() < 0.2 else 3.0
        answer = profiler.answer(**SWEEP, budget_s=6.0)
        profile, gloo_s = answer["profile"], min(answer["ping_pong_s"])
        rate, latency = errors(profile["curves"][0], gloo_s)
        attempts.append((max(rate, latency) / width, profile, gloo_s, width))
        if attempts[-1][0] < 1 and not profile["findings"]:
            break
    _, profile, gloo_s, width = min(attempts, key=lambda attempt: attempt[0])
    return profile, gloo_s, width


@pytest.mark.ranks
@pytest.mark.alone
@pytest.mark.slow
def test_links_are_measured_as_by_plain_sockets_and_slow_ones_are_named(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    lab = make_lab(hosts=4, rate=f"{RATE_MBIT}mbit")
    profiler = Profiler(lab, tmp_path)
    profile, gloo_s, width = measured(profiler)
    [curve] = profile["curves"]
    assert profile["findings"] == [], profile["verdict"]
    assert all(row["wrong"] == 0 for row in curve["rows"])
    rate, latency = errors(curve, gloo_s)
    assert rate < width and latency < width, (curve["fastest"], gloo_s, width)
    assert len(profile["pairs"]["ways"]) == 12

    sockets = plain_ping_pong(lab, 5000, MANY, 3)
    assert curve["fastest"]["bytes_per_s"] == pytest.approx(MANY / sockets["least_s"], rel=0.07 * width)
    # gloo's own work comes on top of the wire's
    assert plain_ping_pong(lab, 5001, FEW, 100)["least_s"] < curve["fastest"]["alpha_s"]

    lab.shape(2, f"{SLOW_MBIT}mbit")
    assert profiler.findings() == [("slow_host", ["nl2"], "both")]
    lab.shape(2, f"{RATE_MBIT}mbit")
    with slow_link(lab, 1, 3):
        assert profiler.findings() == [("slow_link", ["nl1", "nl3"], "sends")]
    assert profiler.findings() == []

    profiler.order(None)
    profiler.job.wait().check()
