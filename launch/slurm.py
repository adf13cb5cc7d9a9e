"""Job scripts for several nodes: one torchrun script per node, or one sbatch file. Imports no torch.

A script names a fixed run directory and leaves `checkpoint.resume` at 'auto', so that submitting it again resumes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..moe.errors import ConfigError, MoefoldError, Problem
from .config import Loaded, check_world, dump, load
from .rundir import RunDir, write_atomic
from .settings import RunConfig

DEFAULT_PORT = 29400


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where and how long a run is to run. `time` is a Slurm time limit: minutes, H:M:S or D-H:M:S."""

    nodes: int
    gpus_per_node: int = 8
    """Worker processes per node; on CPU nodes too."""
    slurm: bool = False
    time: str = "4:00:00"
    partition: str | None = None
    account: str | None = None
    rdzv_host: str | None = None
    """HOST or HOST:PORT of the first node, which the others meet at; Slurm finds it by itself."""

    def problems(self) -> list[Problem]:
        found = [
            Problem(f"--{name.replace('_', '-')}", f"is {getattr(self, name)}, but must be positive")
            for name in ("nodes", "gpus_per_node")
            if getattr(self, name) < 1
        ]
        if not re.fullmatch(r"(\d+-\d+(:\d\d){0,2}|\d+(:\d\d){0,2})", self.time):
            found.append(
                Problem("--time", f"is '{self.time}', which is no Slurm time limit; write minutes, H:MM:SS or D-HH:MM:SS")
            )
        for name in ("partition", "account"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,@+-]+", value):
                found.append(Problem(f"--{name}", f"is '{value}', which is no Slurm name; use letters, digits, '-', '_' and '.'"))
        if not self.slurm and self.nodes > 1 and not self.rdzv_host:
            found.append(
                Problem("--rdzv-host", f"is not set, but {self.nodes} nodes need the host name of the first one to meet at")
            )
        if self.rdzv_host is not None and not re.fullmatch(r"[\w.-]+(:\d+)?|\[[\da-fA-F:]+\](:\d+)?", self.rdzv_host):
            found.append(Problem("--rdzv-host", f"is '{self.rdzv_host}'; write HOST or HOST:PORT"))
        return found

    @property
    def endpoint(self) -> str:
        host = self.rdzv_host or "localhost"
        return host if re.search(r":\d+$", host) and not host.endswith("]") else f"{host}:{DEFAULT_PORT}"


@dataclass(frozen=True)
class Launch:
    """Rendered scripts, and what became of them."""

    run_dir: Path
    scripts: Mapping[Path, str]
    written: bool
    job_id: str | None
    instructions: str

    def to_dict(self) -> dict[str, Any]:
        scripts = {str(path): text for path, text in self.scripts.items()}
        return {"run_dir": str(self.run_dir), "written": self.written, "job_id": self.job_id, "scripts": scripts}

    def render(self) -> str:
        """The scripts where they were not written, then what to do."""
        shown = [] if self.written else [f"# ---- {path}\n{text}" for path, text in self.scripts.items()]
        return "\n".join([*shown, self.instructions])


def launch(*files: str | os.PathLike[str], job: Job, dry_run: bool = False, flags: Mapping[str, object] | None = None) -> Launch:
    """Check a run for `job.nodes * job.gpus_per_node` ranks, render its scripts, and submit them if `job.slurm`.

    Nothing is written before everything is checked; dry_run writes nothing at all. An existing `run.dir` is reused,
    which continues that run with the given configuration.
    Raises ConfigError (TopologyError where only the layout is wrong) with all problems, RunDirError, and MoefoldError where
    Slurm refuses the job.
    """
    loaded = load(*files, flags=flags)
    _check(loaded, job, dry_run)
    section = loaded.config.run
    path = RunDir.place(section, clock.time()).absolute()
    scripts = render(loaded.config, job, path)
    if dry_run:
        return Launch(path, scripts, False, None, f"dry run: nothing was written; the run directory would be {path}")
    run = RunDir.open_or_create(replace(section, dir=str(path)), dump(loaded.config))
    (run.path / "launch").mkdir(exist_ok=True)
    write_atomic(_config_path(path), dump(loaded.config))
    for script, text in scripts.items():
        write_atomic(script, text)
        script.chmod(0o755)
    if job.slurm:
        job_id = _submit(path / "submit.sbatch")
        again = f"resubmit with: sbatch {shlex.quote(str(path / 'submit.sbatch'))}"
        return Launch(path, scripts, True, job_id, f"submitted job {job_id}; run directory {path}\n{again}")
    lines = [f"  node {i}:  bash {shlex.quote(str(script))}" for i, script in enumerate(scripts)]
    return Launch(path, scripts, True, None, "\n".join([f"run directory {path}; start on each node:", *lines]))


def render(config: RunConfig, job: Job, run_dir: Path) -> dict[Path, str]:
    """Path -> text of every script of a job in an absolute run directory. Writes nothing."""
    title = f"{config.run.name}: {job.nodes} node{'s' if job.nodes > 1 else ''} x {job.gpus_per_node} workers"
    common = {
        "title": title,
        "nproc": str(job.gpus_per_node),
        "nnodes": str(job.nodes),
        "python": shlex.quote(sys.executable),
        "run_dir": shlex.quote(str(run_dir)),
        "workdir": shlex.quote(os.getcwd()),
        "config": shlex.quote(str(_config_path(run_dir))),
    }
    if not job.slurm:
        fixed = {**common, "endpoint": shlex.quote(job.endpoint), "rdzv_id": shlex.quote(run_dir.name)}
        return {
            run_dir / "launch" / f"node-{i:02d}.sh": _fill("torchrun.sh", {**fixed, "is_host": str(i == 0).lower()})
            for i in range(job.nodes)
        }
    node_script, sbatch = run_dir / "launch" / "node.sh", run_dir / "submit.sbatch"
    # Slurm knows the nodes only when the job starts: the batch script passes them on as arguments.
    late = {"endpoint": '"$1"', "rdzv_id": '"$2"', "is_host": '"$([ "$SLURM_NODEID" = 0 ] && echo true || echo false)"'}
    batch = {
        "job_name": config.run.name,
        "time": job.time,
        "optional": "".join(f"#SBATCH {line}\n" for line in _optional(config, job)),
        "run_dir_raw": str(run_dir),
        "node_script": shlex.quote(str(node_script)),
        "script": shlex.quote(str(sbatch)),
    }
    return {node_script: _fill("torchrun.sh", common | late), sbatch: _fill("slurm.sbatch", common | batch)}


class _Template(string.Template):
    """`@{name}` is a placeholder; everything else, `$` and a bare `@` included, is shell."""

    pattern = r"@(?:\{(?P<braced>[a-z_]+)\}|(?P<escaped>(?!))|(?P<named>(?!))|(?P<invalid>(?!)))"  # type: ignore[assignment]


def _fill(name: str, values: Mapping[str, str]) -> str:
    return _Template((Path(__file__).parent / "templates" / f"{name}.tmpl").read_text()).substitute(values)


def _config_path(run_dir: Path) -> Path:
    return run_dir / "launch" / "config.toml"


def _optional(config: RunConfig, job: Job) -> Sequence[str]:
    gpus = [f"--gpus-per-node={job.gpus_per_node}"] if config.train.device != "cpu" else []
    return gpus + [f"--{name}={getattr(job, name)}" for name in ("partition", "account") if getattr(job, name)]


def _check(loaded: Loaded, job: Job, dry_run: bool) -> None:
    """Everything that can be known to be wrong before a directory exists. Raises ConfigError."""
    config = loaded.config
    problems = job.problems()
    resume = config.checkpoint.resume
    if resume != "auto":
        what = (
            f"is '{resume}', but a job script is started again after pre-emption and must then continue; leave it at 'auto', and "
            "set run.dir to continue an existing run or checkpoint.init_from to start from other weights"
        )
        problems.append(Problem("checkpoint.resume", what, loaded.origins["checkpoint.resume"]))
    path = str(RunDir.place(config.run, 0.0).absolute())
    if re.search(r"[\s\"'%\\]", path) and job.slurm:
        problems.append(Problem("run.dir", f"is '{path}': #SBATCH lines cannot hold blanks, quotes, '\\' and '%'"))
    if job.slurm and not dry_run and shutil.which("sbatch") is None:
        what = "needs sbatch, which is not on PATH; run this on a login node of the cluster, or add --dry-run to see the script"
        problems.append(Problem("--slurm", what))
    world = job.nodes * job.gpus_per_node
    if world > 0:
        try:
            check_world(loaded, world)
        except ConfigError as error:
            if not problems:
                raise
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def _submit(script: Path) -> str:
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise MoefoldError(
            f"sbatch refused {script}: {reason}\nchange the file and submit it with: sbatch {shlex.quote(str(script))}"
        )
    # `id` or, on federated clusters, `id;cluster`.
    return done.stdout.strip().partition(";")[0]
