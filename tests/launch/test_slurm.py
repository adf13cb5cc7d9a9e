"""Job scripts: what they contain, and what they do under a fake Slurm."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moefold.launch import slurm
from moefold.launch.config import load
from moefold.launch.rundir import RunDir
from moefold.launch.slurm import Job, launch
from moefold.moe.errors import ConfigError, MoefoldError, TopologyError

BASE = '[run]\nname = "mini"\n[model]\npreset = "debug"\n[train]\nsteps = 10\n'


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(BASE)
    return "a.toml"


@pytest.fixture
def bin_dir(tmp_path, monkeypatch):
    """A folder at the front of PATH; call it to put a program there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def program(name, text):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
        return folder / name

    return program


def wait_for(path: Path, text: str = "") -> str:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if path.exists() and text in (content := path.read_text()):
            return content
        time.sleep(0.02)
    raise AssertionError(f"{path} never said {text!r}")


def end_session(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- rendering ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_slurm", [False, True], ids=["torchrun", "slurm"])
def test_scripts_are_valid_shell_with_no_placeholder_left(config, use_slurm):
    done = launch(config, job=Job(nodes=2, gpus_per_node=4, slurm=use_slurm, rdzv_host="n0"), dry_run=True)
    assert len(done.scripts) == 2
    for text in done.scripts.values():
        assert "@{" not in text
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_one_script_per_node_meets_at_the_first(config):
    done = launch(config, job=Job(nodes=4, gpus_per_node=2, rdzv_host="n0:1234"), dry_run=True)
    texts = list(done.scripts.values())
    assert [path.name for path in done.scripts] == [f"node-0{i}.sh" for i in range(4)]
    assert all("--nnodes 4 --nproc-per-node 2" in t and "--rdzv-endpoint n0:1234" in t for t in texts)
    assert ["is_host=true" in t for t in texts] == [True, False, False, False]
    assert len({t.replace("is_host=true", "is_host=false") for t in texts}) == 1


ENDPOINTS = {"n0": "n0:29400", "n0:7": "n0:7", "[::1]": "[::1]:29400", "[::1]:7": "[::1]:7", None: "localhost:29400"}


@pytest.mark.parametrize(("host", "endpoint"), ENDPOINTS.items())
def test_the_endpoint_has_a_port(host, endpoint):
    assert Job(nodes=1, rdzv_host=host).endpoint == endpoint


def test_batch_script_has_literal_resources(config):
    job = Job(nodes=2, gpus_per_node=4, slurm=True, time="1-00:00:00", partition="long", account="me")
    text = next(t for p, t in launch(config, job=job, dry_run=True).scripts.items() if p.name == "submit.sbatch")
    header = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--time=1-00:00:00", "--gpus-per-node=4", "--partition=long", "--account=me"} <= set(header)
    assert {"--signal=B:USR1@120", "--requeue", "--job-name=mini"} <= set(header)
    # Slurm does not expand variables there
    assert not any("$" in line for line in header)
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert text.rindex("#SBATCH") < text.index(commands[0]), "Slurm stops reading #SBATCH lines at the first command"


def test_a_cpu_run_asks_for_no_gpu(config):
    job = Job(nodes=1, gpus_per_node=4, slurm=True)
    texts = launch(config, job=job, dry_run=True, flags={"train.device": "cpu"}).scripts.values()
    assert not any("--gpus-per-node" in text for text in texts)


def test_paths_with_blanks_and_quotes_survive(config, tmp_path, monkeypatch, bin_dir):
    monkeypatch.setattr(slurm.sys, "executable", str(bin_dir("fake python", 'printf "%s\\n" "$@" >> "$HOME/args"; exit 0')))
    monkeypatch.setenv("HOME", str(tmp_path))
    done = launch(config, job=Job(nodes=1, gpus_per_node=2), flags={"run.dir": "it's a run"})
    assert subprocess.run(["bash", str(next(iter(done.scripts)))], check=False).returncode == 0
    args = (tmp_path / "args").read_text().splitlines()
    assert str(tmp_path / "it's a run") in args
    assert str(tmp_path / "it's a run" / "launch" / "config.toml") in args


# --- what is checked before anything is written ------------------------------------------------------------


def test_dry_run_writes_nothing(config, tmp_path):
    done = launch(config, job=Job(nodes=2, slurm=True), dry_run=True)
    assert os.listdir(tmp_path) == ["a.toml"]
    assert not done.written and "nothing was written" in done.render()
    assert all(str(path) in done.render() for path in done.scripts)


def test_a_layout_that_does_not_fit_is_found_before_writing(config, tmp_path):
    with pytest.raises(TopologyError, match=r"parallel\.ep"):
        launch(config, job=Job(nodes=1, gpus_per_node=4), flags={"parallel.ep": 3})
    assert os.listdir(tmp_path) == ["a.toml"]


def test_all_problems_come_together(config, tmp_path):
    job = Job(nodes=2, gpus_per_node=4, time="soon", partition="a\n#SBATCH --x")
    with pytest.raises(ConfigError) as error:
        launch(config, job=job, flags={"parallel.ep": 3, "checkpoint.resume": "must"})
    where = [p.where for p in error.value.problems]
    assert where == ["--time", "--partition", "--rdzv-host", "checkpoint.resume", "parallel.ep"]
    with pytest.raises(ConfigError, match="--gpus-per-node: is 0"):
        launch(config, job=Job(nodes=1, gpus_per_node=0))
    assert os.listdir(tmp_path) == ["a.toml"]


@pytest.mark.parametrize("limit", ["30", "30:00", "4:00:00", "2-0", "2-04:00:00"])
def test_slurm_time_limits_are_accepted(limit):
    assert Job(nodes=1, time=limit).problems() == []


def test_missing_sbatch_is_told_before_writing(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="sbatch, which is not on PATH"):
        launch(config, job=Job(nodes=1, slurm=True))
    assert os.listdir(tmp_path) == ["a.toml"]


# --- writing and submitting ---------------------------------------------------------------------------------


def test_scripts_are_written_into_a_run_directory(config):
    done = launch(config, job=Job(nodes=2, gpus_per_node=2, rdzv_host="n0"), flags={"train.lr": 5e-4})
    run = RunDir.open(done.run_dir)
    assert run.state == "created" and not run.used
    assert all(path.read_text() == text and os.access(path, os.X_OK) for path, text in done.scripts.items())
    assert all(str(path) in done.render() for path in done.scripts)
    assert load(str(run.path / "launch" / "config.toml")).config.train.lr == 5e-4


def test_an_existing_run_is_continued_with_the_new_configuration(config):
    job = Job(nodes=1, gpus_per_node=2)
    first = launch(config, job=job)
    second = launch(config, job=job, flags={"run.dir": str(first.run_dir), "train.lr": 7e-4})
    assert second.run_dir == first.run_dir
    assert load(str(first.run_dir / "launch" / "config.toml")).config.train.lr == 7e-4


def test_sbatch_gets_the_script(config, bin_dir):
    bin_dir("sbatch", 'echo "4711;cluster"; printf "%s " "$@" > sbatch.args')
    done = launch(config, job=Job(nodes=1, slurm=True))
    assert done.job_id == "4711"
    assert Path("sbatch.args").read_text().strip() == f"--parsable {done.run_dir / 'submit.sbatch'}"


def test_a_refusal_of_sbatch_is_passed_on(config, bin_dir):
    bin_dir("sbatch", 'echo "invalid partition specified" >&2; exit 1')
    with pytest.raises(MoefoldError, match="invalid partition specified"):
        launch(config, job=Job(nodes=1, slurm=True))


# --- running the batch script under a fake Slurm ------------------------------------------------------------

# A trainer that starts and ends at once: RECORD directory state.
RECORD = """\
import sys
from moefold.launch.rundir import RunDir
run = RunDir(sys.argv[1])
run.start_attempt(4)
run.finish_attempt(sys.argv[2])
"""


@pytest.fixture
def batch(config, bin_dir, monkeypatch):
    """Starts the sbatch file with a srun of the given text; scontrol writes its requeue calls into a file."""
    bin_dir("sbatch", "echo 1")
    bin_dir("scontrol", 'if [ "$1" = show ]; then printf "n0\\nn1\\n"; else echo "$@" >> scontrol.log; fi')
    done = launch(config, job=Job(nodes=2, gpus_per_node=2, slurm=True))
    Path("record.py").write_text(RECORD)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[0-1]")

    jobs = []

    def start(srun):
        bin_dir("srun", f'record() {{ {sys.executable} record.py {done.run_dir} "$1"; }}\n{srun}')
        command = ["bash", str(done.run_dir / "submit.sbatch")]
        jobs.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True))
        return jobs[-1]

    yield start
    for job in jobs:
        end_session(job)


def test_the_warning_signal_reaches_srun_and_the_job_is_requeued(batch):
    # the signal ends srun's sleep; srun itself then ends with torchrun's flattened code
    job = batch("trap 'echo usr1 > signal.log; record preempted; exit 1' USR1; touch ready; while :; do sleep 0.05; done")
    wait_for(Path("ready"))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 75
    assert Path("signal.log").read_text() == "usr1\n"
    assert Path("scontrol.log").read_text() == "requeue 77\n"


def test_a_signal_that_srun_survives_does_not_lose_its_exit_status(batch):
    job = batch("trap 'echo usr1 >> signal.log' USR1; touch ready; until [ -e stop ]; do sleep 0.05; done; exit 9")
    wait_for(Path("ready"))
    for n in (1, 2):
        job.send_signal(signal.SIGUSR1)
        wait_for(Path("signal.log"), "usr1\n" * n)
    Path("stop").touch()
    assert job.wait(timeout=20) == 9
    assert not Path("scontrol.log").exists()


@pytest.mark.parametrize(("state", "srun_status", "code"), [("completed", 0, 0), ("nan", 1, 4), ("oom", 1, 6), ("failed", 1, 1)])
def test_the_exit_status_is_that_of_the_workers(batch, state, srun_status, code):
    job = batch(f"record {state}; exit {srun_status}")
    assert job.wait(timeout=20) == code
    assert not Path("scontrol.log").exists()


def test_a_job_that_never_came_to_life_passes_on_sruns_status(batch):
    preempted = batch("record preempted; exit 1")
    assert preempted.wait(timeout=20) == 75
    stillborn = batch("exit 7")
    assert stillborn.wait(timeout=20) == 7
    assert Path("scontrol.log").read_text() == "requeue 77\n", "the old pre-emption must not requeue the second job"


def test_srun_starts_one_task_per_node_with_the_first_host(batch):
    job = batch('printf "%s\\n" "$@" > srun.args; record completed')
    assert job.wait(timeout=20) == 0
    args = Path("srun.args").read_text().splitlines()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(args)
    assert args[-2:] == [f"n0:{20000 + 77}", "77-0"]


# --- running a node's script --------------------------------------------------------------------------------

# Stands for Python: rundir questions go to the real one; torchrun is a parent of one worker. It must not act on USR1
# itself (its default is to die), and ends with 1 for whatever its worker ended with.
FAKE_PYTHON = """\
if [ "$2" != torch.distributed.run ]; then exec {python} "$@"; fi
{python} worker.py &
while kill -0 $! 2>/dev/null; do sleep 0.05; done
exit 1
"""

WORKER = """\
import pathlib, signal, sys
from moefold.launch.rundir import RunDir
run = RunDir("run")
run.start_attempt(1)

def save(number, frame):
    run.finish_attempt("preempted", error=signal.Signals(number).name)
    sys.exit(75)

signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").touch()
signal.pause()
"""


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
def test_a_nodes_workers_get_the_signal_and_its_script_their_exit_code(config, bin_dir, monkeypatch, sent):
    Path("worker.py").write_text(WORKER)
    monkeypatch.setattr(slurm.sys, "executable", str(bin_dir("fake-python", FAKE_PYTHON.format(python=sys.executable))))
    done = launch(config, job=Job(nodes=1, gpus_per_node=1), flags={"run.dir": "run"})
    node = subprocess.Popen(["bash", str(next(iter(done.scripts)))], start_new_session=True)
    try:
        wait_for(Path("ready"))
        node.send_signal(sent)
        assert node.wait(timeout=20) == 75
    finally:
        end_session(node)
    assert RunDir.open("run").status()["attempts"][0]["error"] == sent.name
