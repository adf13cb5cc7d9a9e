"""The benchmark of blame without the lab: what counts as found, the table, and a stretch of its job on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench.__main__ import main
from bench.faults.job import EXPERTS_PER_RANK, Bench, Order
from bench.profile_faults import CASES, HOSTS, Planted, figures, judged
from bench.result import load_goals

from helpers import run_ranks
from lab.bed import LabUnavailable
from moefold.launch.profile.diagnosis import Diagnosis, Finding
from moefold.launch.profile.run import profile_run

FAULTS = [case for case in CASES if case.kind is not None]


def finding(case: Planted, **other: Any) -> Finding:
    """What should be said of a case, but for what is given."""
    ranks = () if case.rank is None else (case.rank,)
    right: dict[str, Any] = {"kind": case.kind, "ranks": ranks, "host": f"nl{case.rank}", "expert": case.expert}
    return Finding(**{**right, "lost_s": 1.0, "share": 0.3, "of_waiting": 0.5, "text": "", **other})


def said(*findings: Finding) -> Diagnosis:
    return Diagnosis("line", "warn", 0.2, 0.1, findings, ())


def test_there_are_two_faults_of_each_kind_and_four_runs_without() -> None:
    kinds = [case.kind for case in CASES]
    assert sorted(k for k in kinds if k) == sorted(["slow_rank", "slow_link", "busy_cpu", "hot_expert"] * 2)
    assert kinds.count(None) == 4 and len({case.name for case in CASES}) == len(CASES)
    for case in FAULTS:
        assert case.rank is not None and case.rank < HOSTS
        assert case.expert is None or case.expert // EXPERTS_PER_RANK == case.rank
        Order(steps=1, **case.order)


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name)
def test_only_the_planted_cause_in_its_place_counts(case: Planted) -> None:
    assert case.rank is not None
    other = (case.rank + 1) % HOSTS
    wrong = [finding(case, kind="slow_rank" if case.kind != "slow_rank" else "busy_cpu"), finding(case, ranks=(other,))]
    wrong += [finding(case, host="nl9"), finding(case, ranks=(case.rank, other))]
    wrong += [finding(case, expert=99)] if case.expert is not None else []
    row = judged(case, said(finding(case)))
    assert (row["found"], row["confused"], row["false_alarm"], row["share"]) == (True, False, False, 0.3)
    for mistake in wrong:
        assert judged(case, said(mistake)) | {"share": 0.3} == row | {"found": False, "confused": True}
    assert judged(case, said())["found"] is False and judged(case, said())["confused"] is False
    assert judged(case, said(finding(case), wrong[0])) == row | {"confused": True}


def test_a_name_where_nothing_is_wrong_is_a_false_alarm() -> None:
    healthy = CASES[0]
    assert judged(healthy, said())["found"] is True
    row = judged(healthy, said(finding(FAULTS[0])))
    assert (row["found"], row["confused"], row["false_alarm"]) == (False, False, True)


def test_figures_count_and_goals_are_stated_for_them() -> None:
    rows = [{**judged(case, said(finding(case)) if case.kind else said()), "seconds": 2.0} for case in CASES]
    good = figures(rows)
    assert good == {"found": 8.0, "confused": 0.0, "false_alarms": 0.0, "seconds": 24.0}
    goals = {goal.figure: goal for goal in load_goals("profile_faults")}
    assert set(goals) == {"found", "confused", "false_alarms"} and all(g.met(good[name]) for name, g in goals.items())
    rows[0] = {**judged(CASES[0], said(finding(FAULTS[0]))), "seconds": 2.0}
    rows[1] = {**judged(CASES[1], said(finding(FAULTS[1]))), "seconds": 2.0}
    bad = figures(rows)
    assert (bad["found"], bad["confused"], bad["false_alarms"]) == (7.0, 1.0, 1.0)
    assert not any(g.met(bad[name]) for name, g in goals.items())


def test_without_a_lab_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nothing() -> str:
        raise LabUnavailable("rootless: no user namespaces")

    monkeypatch.setattr("lab.bed.available", nothing)
    with pytest.raises(SystemExit) as end:
        main(["profile_faults"])
    assert end.value.code == 2
    assert "none can be made here: rootless: no user namespaces" in capsys.readouterr().err


def stretches(rank: int, world: int, folder: Path) -> None:
    bench = Bench(folder)
    bench.stretch(0, Order(steps=2, settling=1, slow_rank=1, factor=6.0))
    bench.stretch(1, Order(steps=2, settling=1, hot_expert=1))


@pytest.mark.ranks
def test_two_ranks_record_what_they_were_told(tmp_path: Path) -> None:
    run_ranks(stretches, 2, tmp_path)
    slowed = profile_run(tmp_path / "run-0")
    assert slowed.runs[0].comm["steps"] == [1, 2]
    (finding,) = slowed.diagnoses[0].findings
    assert (finding.kind, finding.ranks) == ("slow_rank", (1,))
    rows = json.loads((tmp_path / "run-1" / "comm.json").read_text())["expert_rows"]["0"]
    assert max(range(4), key=rows.__getitem__) == 1, "wanted by every token"
    assert profile_run(tmp_path / "run-1").runs[0].comm["steps"] == [4, 5]
