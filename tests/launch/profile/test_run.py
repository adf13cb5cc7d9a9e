"""`moefold profile run`: who is to blame, from recordings whose cause is known; and what it says where there are none."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from comm_case import ROW_BYTES, ROWS, CommCase, make_recorded_run, recorded, samples
from moefold.launch import comm_file
from moefold.launch.comm_file import History, Sample, comm_data, disorder_s, step_spans
from moefold.launch.profile.diagnosis import diagnose, of_a_whole, rank_names
from moefold.launch.profile.run import profile_run
from moefold.launch.profile.verbs_run import VERB
from moefold.moe.errors import RunDirError
from moefold.parallel.recorder_analysis import aligned, collectives
from moefold.parallel.recorder_verdict import verdicts

HOSTS = ("a", "a", "b", "b", "c", "c", "d", "d")


@pytest.mark.parametrize(
    ("fault", "kind", "ranks", "host", "words"),
    [
        ({"slow": {5: 2.5}}, "slow_rank", (5,), "c", "rank 5 (host c), slower than the others on as much work"),
        ({"slow": {4: 2.5, 5: 2.5}}, "slow_rank", (4, 5), "c", "ranks 4–5 of host c, slower"),
        ({"slow": {3: 2.5}, "cpu_wait_s": {3: 0.3}}, "busy_cpu", (3,), "b", "whose processor is busy with other work"),
        ({"slow": {3: 2.5}, "cpu_wait_s": dict.fromkeys(range(8), 0.3)}, "slow_rank", (3,), "b", "slower than the others"),
        ({"hot": 2}, "hot_expert", (2,), "b", "expert 4 on rank 2 (host b), which gets more rows than others"),
        ({"slow_links": frozenset({6, 7})}, "slow_link", (6, 7), "d", "the slow links of ranks 6–7 of host d"),
    ],
    ids=["rank", "host", "cpu", "cpu-of-all", "expert", "links"],
)
def test_one_cause_is_named(fault: dict[str, Any], kind: str, ranks: tuple[int, ...], host: str, words: str) -> None:
    found = diagnose(recorded(CommCase(hosts=HOSTS, **fault)))
    assert [(f.kind, f.ranks, f.host) for f in found.findings] == [(kind, ranks, host)]
    assert words in found.line and found.tone == "bad"
    assert found.findings[0].share > 0.2 and found.findings[0].of_waiting > 0.3


def test_nobody_is_named_where_nothing_is_wrong() -> None:
    found = diagnose(recorded(CommCase(hosts=HOSTS)))
    assert found.findings == found.minor == () and found.tone == "good"
    assert found.line.endswith("no rank, link or expert stands out.")


def test_an_expert_counts_once_for_all_its_layers() -> None:
    (finding,) = diagnose(recorded(CommCase(hosts=HOSTS, hot=2, layers=3))).findings
    assert finding.layers == (0, 1, 2) and finding.expert == 4


def test_shares_are_those_of_the_records() -> None:
    case = CommCase(hosts=HOSTS, slow={5: 2.5})
    data, found = recorded(case), diagnose(recorded(case))
    whole = sum(data["rank_times"][name][r] for name in ("work_s", "a2a_s", "other_s") for r in range(8)) * case.steps
    assert whole == pytest.approx(data["covered_s"], rel=1e-4)
    a2a_s = sum(data["rank_times"]["a2a_s"]) * case.steps
    assert found.a2a == pytest.approx(a2a_s / data["covered_s"], rel=1e-4)
    blamed = data["waited_for"]["all_s"]
    assert max(range(8), key=blamed.__getitem__) == 5
    assert sum(blamed) == pytest.approx(data["total"]["skew_s"], rel=1e-4)
    assert data["all_to_all_bytes"][0][1] == case.steps * case.layers * 4 * case.rows(1) * ROW_BYTES
    assert data["expert_rows"]["0"] == [case.steps * 8 * ROWS] * 16


def test_spans_of_a_step_fit_into_it() -> None:
    sample = samples(CommCase(hosts=HOSTS, slow={5: 2.5}))[-1]
    spans = step_spans(sample)
    assert list(spans["ranks"]) == [str(r) for r in range(8)] and spans["left_out"] == 0
    for rank, rows in spans["ranks"].items():
        assert len(rows) == len(sample.records[int(rank)])
        for kind, begin, wait, moving, end in rows:
            assert 0 <= begin <= wait <= moving <= end
            assert len(spans["kinds"][kind]) == 5
    # nobody waits for the others where it comes last
    late = [moving - wait for _, _, wait, moving, _ in spans["ranks"]["5"]]
    early = [moving - wait for _, _, wait, moving, _ in spans["ranks"]["0"]]
    assert sum(late) < 0.05 * sum(early)


def test_the_file_stays_small_however_long_and_wide_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CommCase(hosts=HOSTS)
    (sample,) = samples(CommCase(hosts=HOSTS, steps=1))
    monkeypatch.setattr(comm_file, "HISTORY_CELLS", 100)
    monkeypatch.setattr(comm_file, "SPANS", 60)
    history = History(case.world)
    for step in range(1000):
        history.add(Sample(step, sample.records, sample.cpu_wait_s))
    kept = history.to_dict()
    assert 6 <= len(kept["steps"]) <= 12
    gaps = {b - a for a, b in zip(kept["steps"], kept["steps"][1:], strict=False)}
    assert kept["steps"][0] == 0 and len(gaps) == 1, "evenly spread from the start"
    assert len(kept["work_s"][0]) == case.world
    spans = step_spans(sample, prefer=[5])
    assert 0 < sum(map(len, spans["ranks"].values())) <= 60 and "5" in spans["ranks"]
    assert spans["left_out"] == sum(map(len, sample.records)) - sum(map(len, spans["ranks"].values()))


def test_a_clock_that_jumped_is_seen_in_the_order_of_things() -> None:
    (sample,) = samples(CommCase(hosts=HOSTS, steps=1))
    assert disorder_s(collectives(sample.records)) <= 0
    jumped = aligned(sample.records, [0.0] * 7 + [0.5])
    # half a second later there, which is longer than any collective of the step takes
    assert disorder_s(collectives(jumped)) == pytest.approx(0.5, abs=0.05)


def test_unaligned_steps_are_told_and_not_compared(tmp_path: Path) -> None:
    case = CommCase(hosts=HOSTS)
    some = make_recorded_run(tmp_path / "some", case, unaligned_s={"7": 0.5})
    assert "1 sampled steps are left out, as a clock jumped in them" in profile_run(some).render()
    none = make_recorded_run(tmp_path / "none", case)
    data = comm_data([], History(8), HOSTS, 1e-4, {7: 0.5, 8: 0.75})
    comm_file.write_comm(none / "comm.json", data)
    found = profile_run(none)
    assert not found.diagnoses[0].aligned and found.tone == "bad"
    assert "clocks of the ranks jumped during each of the 2 sampled steps (by 0.75 s" in found.line
    assert found.write(tmp_path / "p.html").read_text().count("No data for this section") >= 5


def test_a_running_job_and_one_without_recordings_are_told(tmp_path: Path) -> None:
    running = make_recorded_run(tmp_path / "running", CommCase(hosts=HOSTS), state="running")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.toml").write_text("[log]\ncomm = false\n")
    text = profile_run(running, bare).render()
    assert "running is running: recorded up to step 2." in text
    assert "bare has no recordings: log.comm is false" in text
    with pytest.raises(RunDirError, match=r"nothing was recorded:\n.*bare: log\.comm is false; set it to true"):
        profile_run(bare)
    with pytest.raises(RunDirError, match="does not exist"):
        profile_run(tmp_path / "nowhere")


def test_files_of_other_versions_are_read_or_refused(tmp_path: Path) -> None:
    path = make_recorded_run(tmp_path / "old", CommCase(hosts=HOSTS, slow={5: 2.5}))
    data = json.loads((path / "comm.json").read_text())
    later = {"hosts", "waited_for", "rank_times", "history", "spans", "unaligned_s"}
    old = {k: v for k, v in data.items() if k not in later} | {"schema": 1}
    old["verdicts"] = [{k: v[k] for k in ("kind", "rank", "share", "text")} for v in data["verdicts"]]
    (path / "comm.json").write_text(json.dumps(old))
    found = profile_run(path)
    assert found.diagnoses[0].findings[0].ranks == (5,)
    assert "recorded by an earlier version" in found.render()
    assert "record again" in found.write(tmp_path / "p.html").read_text()
    (path / "comm.json").write_text(json.dumps(data | {"schema": 99}))
    with pytest.raises(RunDirError, match=r"comm\.json: schema 99, but this moefold reads up to 2"):
        profile_run(path)


def test_the_verb_writes_page_json_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    run = make_recorded_run(tmp_path / "run", CommCase(hosts=HOSTS, slow={5: 2.5}))
    parser = argparse.ArgumentParser()
    VERB.options(parser)
    out, table = tmp_path / "f.json", tmp_path / "t.csv"
    assert VERB.run(parser.parse_args([str(run), "--json", str(out), "--csv", str(table)]), {}) == 0
    said = capsys.readouterr().out
    assert "rank 5 (host c)" in said and f"page: {run / 'profile.html'}" in said
    found = json.loads(out.read_text())
    assert found["runs"][0]["diagnosis"]["findings"][0]["ranks"] == [5]
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len(found["runs"][0]["recorded"]["layers"])
    assert sum(float(r["skew_s"]) for r in rows) == pytest.approx(found["runs"][0]["recorded"]["total"]["skew_s"], rel=1e-4)
    assert VERB.run(parser.parse_args([str(run), "--json"]), {}) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == found["verdict"]


def test_ranks_that_all_lack_cores_make_blame_uncertain() -> None:
    found = diagnose(recorded(CommCase(hosts=HOSTS, slow={3: 2.5}, cpu_wait_s=dict.fromkeys(range(8), 0.3))))
    assert len(found.notes) == 1 and "most ranks wait for a free core (300 ms of a step of" in found.notes[0]
    assert not diagnose(recorded(CommCase(hosts=HOSTS, slow={3: 2.5}, cpu_wait_s={3: 0.3}))).notes


def test_counters_of_gpus_are_shown_with_na_where_a_device_is_silent(tmp_path: Path) -> None:
    run = make_recorded_run(tmp_path / "run", CommCase(hosts=("a", "b"), steps=1))
    values = {"power_w": 345.678, "nvlink_tx_gib_s": None}
    ranks = [{"rank": r, "host": h, "values": values, "reasons": ["hardware thermal limit"][:r]} for r, h in enumerate("ab")]
    (run / "gpu.json").write_text(json.dumps({"schema": 1, "ranks": ranks}))
    (section,) = [s for s in profile_run(run).sections() if s.anchor == "gpu"]
    assert section.body is not None
    assert section.body.count("n/a") >= 2 and "345.7" in section.body and section.body.count("hardware thermal limit") == 1
    (run / "gpu.json").write_text("{}")
    with pytest.raises(RunDirError, match=r"gpu\.json: cannot be read"):
        profile_run(run).sections()


def test_what_else_was_found_is_told(tmp_path: Path) -> None:
    data = recorded(CommCase(hosts=HOSTS))
    verdict = {"kind": "stale_plan", "rank": None, "share": 0.0, "text": "the plan is stale"}
    run = make_recorded_run(tmp_path / "run", CommCase(hosts=HOSTS), verdicts=[*data["verdicts"], verdict])
    assert "run: the plan is stale." in profile_run(run).render()


def test_the_planted_job_is_judged_as_its_records_are() -> None:
    case = CommCase(hosts=HOSTS, slow={5: 2.5}, steps=1)
    (found,) = verdicts(samples(case)[0].records)
    assert (found.kind, found.rank) == ("slow_rank", 5)


@pytest.mark.parametrize(("share", "words"), [(0.66, "two thirds"), (0.5, "half"), (0.98, "nearly all"), (0.41, "41%")])
def test_parts_are_said_in_words_where_they_are_close(share: float, words: str) -> None:
    assert of_a_whole(share) == words


@pytest.mark.parametrize(("ranks", "words"), [((3,), "rank 3"), ((4, 5, 6), "ranks 4–6"), ((1, 5), "ranks 1, 5")])
def test_ranks_are_named_briefly(ranks: tuple[int, ...], words: str) -> None:
    assert rank_names(ranks) == words
