"""The one directory that a run owns: resolved config, provenance, status, logs, metrics, checkpoints. Imports no torch.

`python -m moefold.launch.rundir exit-code DIR` tells a job script how the workers ended, because torchrun reduces every
failure to 1; `attempts DIR` tells how often training was started there.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from ..moe.errors import ConfigError, Problem, RunDirError
from .provenance import origin_of_process
from .resume import Decision as Decision
from .resume import completed_checkpoints, find_checkpoint
from .resume import decide_resume as decide_resume
from .settings import RunSection

SCHEMA = 1
State = Literal["created", "running", "completed", "failed", "preempted", "oom", "nan", "timeout", "interrupted"]
EXIT_CODES: Mapping[str, int] = MappingProxyType(
    {"completed": 0, "failed": 1, "nan": 4, "timeout": 5, "oom": 6, "preempted": 75, "interrupted": 130}
)
"""Process exit code of every final state; `failed` keeps the code of its error where it has one (2, 3)."""


def state_of(exit_code: int) -> State:
    """The final state that goes with an exit code of the command line."""
    codes = {code: state for state, code in EXIT_CODES.items()}
    state = codes.get(exit_code, "failed")
    assert state in get_args(State)
    return state  # type: ignore[return-value]


class RunDir:
    """A run directory. Make a new one with `create`, use an existing one with `open`.

    Rank 0 alone calls `lock`, `start_attempt` and `finish_attempt`; every other rank only reads paths.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock: int | None = None

    # --- making and finding ---------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        section: RunSection,
        config_text: str,
        *,
        argv: Sequence[str] | None = None,
        extra: Mapping[str, object] | None = None,
        now: float | None = None,
    ) -> RunDir:
        """Make `<root>/<name>-<YYYYMMDD-HHMMSS>`, or exactly `section.dir`, and write config, origin and status.

        config_text: the resolved TOML. argv: command line for origin.json (default: this process's). extra: further
        facts for origin.json, such as the accelerator. now: Unix time of the stamp.
        Raises RunDirError where the directory is already somebody's (an existing empty one is taken), ConfigError for
        a run name that cannot be part of a path.
        """
        now = time.time() if now is None else now
        run = cls(cls.place(section, now))
        try:
            run.path.mkdir(parents=True, exist_ok=section.dir is not None)
        except FileExistsError as error:
            way_out = "pass another run.dir" if section.dir else "two runs of one name started in the same second: set run.name"
            raise RunDirError(f"{run.path} already exists; {way_out}") from error
        except OSError as error:
            raise RunDirError(f"{run.path} cannot be made ({error.strerror}); set run.root or run.dir") from error
        try:
            # The exclusive creation of one file decides between two jobs that were given the same run.dir.
            descriptor = os.open(run.path / "status.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError as error:
            raise RunDirError(f"{run.path} is already a run directory; open it to resume, or pass another run.dir") from error
        os.close(descriptor)
        foreign = sorted(entry.name for entry in run.path.iterdir() if entry.name != "status.json")
        if foreign:
            (run.path / "status.json").unlink()
            raise RunDirError(f"{run.path} is not empty and not a run directory (it holds {foreign[0]}); pass another run.dir")
        for folder in (run.checkpoints, run.path / "logs"):
            folder.mkdir()
        write_atomic(run.path / "config.toml", config_text)
        write_json(run.path / "origin.json", origin_of_process(argv=argv, extra=extra, now=now))
        write_json(run.path / "status.json", {"schema": SCHEMA, "state": "created", "created_s": now, "attempts": []})
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDir:
        """An existing run directory. Raises RunDirError where there is none."""
        run = cls(path)
        missing = [name for name in ("config.toml", "status.json") if not (run.path / name).is_file()]
        if missing:
            why = f"it has no {' and no '.join(missing)}" if run.path.is_dir() else "there is no such directory"
            raise RunDirError(f"{run.path} is not a run directory: {why}; pass the path that the run printed at its start")
        return run

    @classmethod
    def open_or_create(cls, section: RunSection, config_text: str, **facts: Any) -> RunDir:
        """`open` where `section.dir` is a run directory already (a resumed or requeued run), else `create`."""
        if section.dir is not None and (Path(section.dir) / "status.json").is_file():
            return cls.open(section.dir)
        return cls.create(section, config_text, **facts)

    @staticmethod
    def place(section: RunSection, now: float) -> Path:
        """Where `create` makes the directory at Unix time `now`. Raises ConfigError for a name that is no file name."""
        if section.dir is not None:
            return Path(section.dir)
        if not re.fullmatch(r"[\w.+=@-]+", section.name) or section.name.startswith("."):
            what = f"is '{section.name}', but becomes part of a directory name; use letters, digits, '-', '_' and '.'"
            raise ConfigError([Problem("run.name", what)])
        return Path(section.root) / f"{section.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"

    # --- paths ----------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    def logs(self, attempt: int | None = None) -> Path:
        """Folder of one attempt's log files (default: the current one)."""
        return self.path / "logs" / f"attempt-{self.attempt if attempt is None else attempt:02d}"

    # --- status ---------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Contents of status.json. Raises RunDirError where it cannot be read."""
        try:
            return json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError) as error:
            raise RunDirError(f"{self.path / 'status.json'} cannot be read ({error}); the directory may be damaged") from error

    @property
    def state(self) -> State:
        return self.status()["state"]

    @property
    def attempt(self) -> int:
        """Index of the newest attempt, counted from 0; 0 before the first one."""
        return max(len(self.status()["attempts"]) - 1, 0)

    @property
    def used(self) -> bool:
        """Whether training was ever started here; a directory that `launch` has just made is not used."""
        return bool(self.status()["attempts"]) or self.metrics.exists() or any(self.checkpoints.glob("step-*"))

    def start_attempt(self, world_size: int, *, now: float | None = None) -> int:
        """Record that training starts, and return the index of this attempt. Call it while holding the lock."""
        now = time.time() if now is None else now
        status = self.status()
        attempts = status["attempts"]
        if attempts and attempts[-1]["end_s"] is None:
            # The lock is ours, so that process is gone, and it had no chance to say why.
            attempts[-1] |= {"state": "failed", "exit_code": 1, "error": "killed: the process left no end of its own"}
        attempts.append(
            {
                "index": len(attempts),
                "state": "running",
                "start_s": now,
                "end_s": None,
                "world_size": world_size,
                "exit_code": None,
                "error": None,
                "pid": os.getpid(),
                "host": socket.gethostname(),
            }
        )
        write_json(self.path / "status.json", {**status, "state": "running"})
        self.logs(len(attempts) - 1).mkdir(parents=True, exist_ok=True)
        return len(attempts) - 1

    def finish_attempt(
        self, state: State, *, exit_code: int | None = None, error: str | None = None, now: float | None = None
    ) -> None:
        """Record how the current attempt ended.

        state: a final state (a key of EXIT_CODES). exit_code: default is the state's. error: message of the first error.
        """
        if state not in EXIT_CODES:
            raise RunDirError(f"an attempt cannot end in state '{state}'; final states: {', '.join(EXIT_CODES)}")
        status = self.status()
        if not status["attempts"]:
            raise RunDirError(f"{self.path} has no attempt to finish; call start_attempt first")
        code = EXIT_CODES[state] if exit_code is None else exit_code
        end = time.time() if now is None else now
        status["attempts"][-1] |= {"state": state, "end_s": end, "exit_code": code, "error": error}
        write_json(self.path / "status.json", {**status, "state": state})

    def exit_code(self, *, after: int = 0, fallback: int = 1, wait_s: float = 0.0) -> int:
        """How the newest attempt ended, as a process exit code.

        after: number of attempts there were before the job; without a newer one, or without a recorded end, the answer is
        `fallback` (1 if that is 0): a stale "preempted" must not requeue a job that never came to life.
        wait_s: how long to wait for the end of a newer attempt, which another node's rank 0 may still be recording.
        """
        give_up = time.monotonic() + wait_s
        while (attempts := self.status()["attempts"])[after:] and attempts[-1]["exit_code"] is None:
            if time.monotonic() >= give_up:
                break
            time.sleep(0.1)
        if len(attempts) <= after:
            return fallback
        if attempts[-1]["exit_code"] is None:
            return fallback or 1
        return attempts[-1]["exit_code"]

    # --- lock -----------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Hold the directory until `unlock` or the end of this process, however it ends.

        Raises RunDirError naming the process, its host and since when it holds the directory.
        """
        if self._lock is not None:
            raise RunDirError(f"{self.path} is already locked by this object")
        # A bare descriptor: a file object would free the lock as soon as nobody refers to this RunDir any more.
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(os.read(descriptor, 4096).decode(errors="replace"))
            os.close(descriptor)
            raise RunDirError(
                f"{self.path} is in use by {holder}; two jobs cannot share one run directory: "
                "stop that job, or start this one with another run.dir"
            ) from error
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
        self._lock = descriptor

    def unlock(self) -> None:
        """Free the directory; nothing happens where it is not held."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDir:
        self.lock()
        return self

    def __exit__(self, *exc: object) -> None:
        self.unlock()

    # --- checkpoints ----------------------------------------------------------------------------------------

    def checkpoint_dir(self, step: int) -> Path:
        """Where the checkpoint after `step` optimizer steps belongs."""
        return self.checkpoints / f"step-{step:08d}"

    def completed_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest step first; unfinished ones are not listed."""
        return completed_checkpoints(self.checkpoints)

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint that `latest` names, or the newest complete one where that is missing or incomplete."""
        return find_checkpoint(self.path)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that every reader, also after a crash, sees the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _holder(text: str) -> str:
    try:
        held = json.loads(text)
        return f"process {held['pid']} on {held['host']} since {held['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def main(argv: Sequence[str] | None = None) -> int:
    """`attempts DIR` prints the number of attempts; `exit-code DIR` exits with the run's code."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m moefold.launch.rundir", description=main.__doc__)
    parser.add_argument("what", choices=["attempts", "exit-code"])
    parser.add_argument("dir")
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--fallback", type=int, default=1)
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for rank 0 to record the end")
    options = parser.parse_args(argv)
    try:
        run = RunDir.open(options.dir)
        if options.what == "exit-code":
            return run.exit_code(after=options.after, fallback=options.fallback, wait_s=options.wait)
        print(len(run.status()["attempts"]))
    except RunDirError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
