"""The run directory: exclusive creation, provenance, status, lock, checkpoints, and what a start resumes from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moefold.launch import rundir
from moefold.launch.provenance import git_state, recorded_environment
from moefold.launch.resume import decide_resume, find_checkpoint
from moefold.launch.rundir import EXIT_CODES, RunDir, state_of
from moefold.launch.settings import RunSection
from moefold.moe.errors import CheckpointError, ConfigError, RunDirError

NOON = 1_785_585_600.0


@pytest.fixture
def run(tmp_path):
    return RunDir.create(RunSection(dir=str(tmp_path / "run")), "x = 1\n")


def add_checkpoint(run: RunDir, step: int, *, complete: bool = True) -> Path:
    path = run.checkpoint_dir(step)
    path.mkdir(parents=True)
    if complete:
        (path / "complete.json").write_text("{}")
    return path


# --- creation -----------------------------------------------------------------------------------------------


def test_a_new_directory_is_named_after_the_run_and_the_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    run = RunDir.create(RunSection(name="mini", root=str(tmp_path / "runs")), "x = 1\n", argv=["moefold", "pretrain"], now=NOON)
    assert run.path.parent == tmp_path / "runs"
    assert run.path.name.startswith("mini-2026080") and len(run.path.name) == len("mini-20260801-120000")
    assert run.config.read_text() == "x = 1\n"
    assert run.state == "created" and not run.used
    origin = json.loads((run.path / "origin.json").read_text())
    assert origin["argv"] == ["moefold", "pretrain"]
    assert {"python", "torch", "moefold"} <= origin["versions"].keys()
    assert origin["host"] and "git" in origin


def test_two_runs_in_one_second_do_not_share_a_directory(tmp_path):
    section = RunSection(root=str(tmp_path))
    RunDir.create(section, "", now=NOON)
    with pytest.raises(RunDirError, match="already exists; two runs of one name"):
        RunDir.create(section, "", now=NOON)


def test_an_exact_directory_may_exist_only_if_it_is_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    RunDir.create(RunSection(dir=str(tmp_path / "empty")), "")
    with pytest.raises(RunDirError, match="is already a run directory"):
        RunDir.create(RunSection(dir=str(tmp_path / "empty")), "")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(RunDirError, match=r"not empty and not a run directory \(it holds thesis.tex\)"):
        RunDir.create(RunSection(dir=str(tmp_path / "mine")), "")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError):
        RunDir.create(RunSection(dir=str(tmp_path / "file")), "")
    with pytest.raises(RunDirError):
        RunDir.create(RunSection(root=str(tmp_path / "file")), "")


@pytest.mark.parametrize("name", ["a/b", "../up", "", ".hidden", "a b"])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"run\.name"):
        RunDir.create(RunSection(name=name, root=str(tmp_path)), "")
    assert not list(tmp_path.iterdir())


def test_open_wants_a_run_directory(run, tmp_path):
    assert RunDir.open(run.path).state == "created"
    with pytest.raises(RunDirError, match="no such directory"):
        RunDir.open(tmp_path / "nowhere")
    with pytest.raises(RunDirError, match=r"has no config\.toml and no status\.json"):
        RunDir.open(tmp_path)


def test_open_or_create_continues_what_is_there(tmp_path):
    section = RunSection(dir=str(tmp_path / "run"))
    first = RunDir.open_or_create(section, "x = 1\n")
    first.start_attempt(4)
    again = RunDir.open_or_create(section, "x = 2\n")
    assert again.used and again.config.read_text() == "x = 1\n"


def test_secrets_and_foreign_variables_are_not_recorded():
    kept = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7", "TORCH_LOGS": "x", "GLOO_SOCKET_IFNAME": "lo"}
    left = {
        "SLURM_JWT": "s",
        "TORCH_HUB_TOKEN": "s",
        "NCCL_API_KEY": "s",
        "HOME": "/",
        "MY_NCCL_X": "s",
        "SLURM_DB_PASSWORD": "s",
    }
    assert recorded_environment(kept | left) == kept


def test_git_state_tells_commit_and_local_changes(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *args], check=True, capture_output=True)

    file = tmp_path / "code.py"
    file.write_text("a\n")
    git("init", "-q")
    assert git_state(file) is None, "an untracked file is not a part of the repository around it"
    git("add", "code.py")
    git("commit", "-qm", "first")
    clean = git_state(file)
    file.write_text("b\n")
    dirty = git_state(file)
    assert len(clean["commit"]) == 40 and clean["commit"] == dirty["commit"]
    assert (clean["dirty"], clean["diff_sha256"]) == (False, None)
    assert dirty["dirty"] and len(dirty["diff_sha256"]) == 64


# --- status -------------------------------------------------------------------------------------------------


def test_attempts_are_counted_and_keep_their_history(run):
    assert run.attempt == 0
    assert run.start_attempt(4, now=10.0) == 0
    assert run.state == "running" and run.logs() == run.path / "logs" / "attempt-00" and run.logs().is_dir()
    run.finish_attempt("preempted", now=20.0)
    assert run.start_attempt(8, now=30.0) == 1
    run.finish_attempt("failed", exit_code=3, error="DataError: no such file", now=40.0)
    status = run.status()
    assert (status["state"], run.attempt) == ("failed", 1)
    keys = ("index", "state", "start_s", "end_s", "world_size", "exit_code", "error")
    assert [tuple(a[k] for k in keys) for a in status["attempts"]] == [
        (0, "preempted", 10.0, 20.0, 4, 75, None),
        (1, "failed", 30.0, 40.0, 8, 3, "DataError: no such file"),
    ]


def test_an_attempt_without_an_end_was_killed(run):
    run.start_attempt(1)
    run.start_attempt(1)
    first, second = run.status()["attempts"]
    assert (first["state"], first["exit_code"]) == ("failed", 1) and "killed" in first["error"]
    assert second["state"] == "running"


def test_attempts_end_in_a_final_state(run):
    with pytest.raises(RunDirError, match="has no attempt"):
        run.finish_attempt("completed")
    run.start_attempt(1)
    with pytest.raises(RunDirError, match="cannot end in state 'running'"):
        run.finish_attempt("running")


CODES = {
    0: "completed",
    1: "failed",
    2: "failed",
    3: "failed",
    4: "nan",
    5: "timeout",
    6: "oom",
    75: "preempted",
    130: "interrupted",
}


@pytest.mark.parametrize(("code", "state"), CODES.items())
def test_exit_codes_and_states_belong_together(code, state):
    assert state_of(code) == state
    assert EXIT_CODES[state] == code or state == "failed"


def test_exit_code_is_the_newest_attempts_own(run):
    assert run.exit_code(fallback=9) == 9, "no attempt: torchrun failed before training"
    run.start_attempt(1)
    assert run.exit_code(fallback=9) == 9 and run.exit_code(fallback=0) == 1, "an attempt without an end is never a success"
    run.finish_attempt("preempted")
    assert run.exit_code(fallback=1) == 75
    assert run.exit_code(after=1, fallback=1) == 1, "an old pre-emption must not requeue a job that never started"


def test_a_crash_while_writing_leaves_the_old_status(run, monkeypatch):
    run.start_attempt(2)
    before = run.status()

    def crash(*args):
        raise OSError("disk gone")

    monkeypatch.setattr(rundir.os, "replace", crash)
    with pytest.raises(OSError, match="disk gone"):
        run.finish_attempt("completed")
    assert run.status() == before


def test_a_damaged_status_is_named(run):
    (run.path / "status.json").write_text("{")
    with pytest.raises(RunDirError, match="cannot be read"):
        run.status()


@pytest.mark.parametrize(
    ("args", "code", "out"),
    [(["attempts"], 0, "1\n"), (["exit-code"], 75, ""), (["exit-code", "--after", "1", "--fallback", "7"], 7, "")],
)
def test_job_scripts_ask_by_command(run, capsys, args, code, out):
    run.start_attempt(1)
    run.finish_attempt("preempted")
    assert rundir.main([args[0], str(run.path), *args[1:]]) == code
    assert capsys.readouterr().out == out


def test_job_scripts_hear_of_a_missing_directory(tmp_path, capsys):
    assert rundir.main(["attempts", str(tmp_path)]) == 3
    assert "is not a run directory" in capsys.readouterr().err


# --- lock ---------------------------------------------------------------------------------------------------

HOLD = """\
import sys, time
from moefold.launch.rundir import RunDir
RunDir(sys.argv[1]).lock()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_job_is_refused_and_told_who_holds_the_directory(run):
    with run, pytest.raises(RunDirError, match=rf"in use by process {os.getpid()} on .* since 20"):
        RunDir.open(run.path).lock()
    with RunDir.open(run.path):
        pass


def test_the_lock_of_a_killed_process_is_free(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirError, match=f"process {holder.pid}"):
            run.lock()
        # the refused attempt must not have destroyed the holder's note
        with pytest.raises(RunDirError, match=f"process {holder.pid}"):
            run.lock()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with run:
        pass


# --- checkpoints --------------------------------------------------------------------------------------------


def test_only_complete_checkpoints_count(run):
    assert run.latest_checkpoint() is None
    add_checkpoint(run, 900)
    newest = add_checkpoint(run, 100_000_000)
    add_checkpoint(run, 100_000_001, complete=False)
    (run.checkpoints / ".step-00000950.tmp").mkdir()
    assert [p.name for p in run.completed_checkpoints()] == ["step-00000900", "step-100000000"]
    assert run.latest_checkpoint() == newest
    assert run.used


@pytest.mark.parametrize("kind", ["text", "symlink"])
def test_latest_names_the_checkpoint(run, kind):
    old = add_checkpoint(run, 5)
    newest = add_checkpoint(run, 10)
    latest = run.checkpoints / "latest"
    latest.write_text("step-00000005\n") if kind == "text" else latest.symlink_to("step-00000005")
    assert run.latest_checkpoint() == old
    (old / "complete.json").unlink()
    assert run.latest_checkpoint() == newest


def test_a_checkpoint_may_be_named_directly_or_by_its_run(run):
    path = add_checkpoint(run, 5)
    assert find_checkpoint(path) == find_checkpoint(run.path) == find_checkpoint(run.checkpoints) == path
    assert find_checkpoint(run.path / "nothing") is None


# --- resume rules: one test per row and column of the table -------------------------------------------------

OWN, OTHER = Path("run/checkpoints/step-00000100"), Path("else/step-00000007")


def decide(resume, own=None, used=False, init_from=None):
    return decide_resume(resume, own, used, init_from, run_dir="run", find={str(OTHER): OTHER}.get)


@pytest.mark.parametrize(
    ("resume", "own", "used", "init_from", "kind", "path", "says"),
    [
        ("auto", OWN, True, None, "resume", OWN, "resuming from step 100"),
        ("auto", None, False, None, "fresh", None, "no checkpoint in run: starting fresh"),
        ("auto", None, True, None, "fresh", None, "no checkpoint in run: starting fresh"),
        ("must", OWN, True, None, "resume", OWN, "resuming from step 100"),
        ("never", None, False, None, "fresh", None, "starting fresh"),
        (str(OTHER), None, False, None, "resume", OTHER, "resuming from step 7"),
        (str(OTHER), OWN, True, None, "resume", OTHER, "resuming from step 7"),
        ("auto", OWN, True, str(OTHER), "resume", OWN, f"checkpoint.init_from = '{OTHER}' is ignored"),
        ("must", OWN, True, str(OTHER), "resume", OWN, "is ignored"),
        ("auto", None, False, str(OTHER), "init", OTHER, "starting at step 0 with the weights of"),
        ("auto", None, True, str(OTHER), "init", OTHER, "starting at step 0 with the weights of"),
        ("never", None, False, str(OTHER), "init", OTHER, "starting at step 0 with the weights of"),
    ],
)
def test_resume_table(resume, own, used, init_from, kind, path, says):
    decision = decide(resume, own, used, init_from)
    assert (decision.kind, decision.path) == (kind, path)
    assert says in decision.message


@pytest.mark.parametrize(
    ("resume", "own", "used", "init_from", "error", "says"),
    [
        ("must", None, True, None, CheckpointError, "run has no complete checkpoint"),
        ("must", None, False, str(OTHER), CheckpointError, "run has no complete checkpoint"),
        ("never", OWN, True, None, RunDirError, "run is not empty"),
        ("never", None, True, None, RunDirError, "run is not empty"),
        ("nowhere", OWN, True, None, CheckpointError, "checkpoint.resume = 'nowhere': no complete checkpoint"),
        ("Auto", None, False, None, CheckpointError, "pass 'auto', 'must', 'never'"),
        ("auto", None, False, "nowhere", CheckpointError, "checkpoint.init_from = 'nowhere'"),
    ],
)
def test_resume_table_errors(resume, own, used, init_from, error, says):
    with pytest.raises(error, match=says) as raised:
        decide(resume, own, used, init_from)
    assert raised.value.exit_code == 3
