"""Process 1 of a lab: starts, watches and ends the processes of all hosts, told by JSON lines on its standard input.

When it ends, the kernel kills every other process of the lab and removes the namespaces. It ends when its input is closed, so
also when the program at the other end is killed. Needs the standard library only, and no module of this folder.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "MOEFOLD_LAB_PROCESS"
TICK_S = 0.1
STOP_S = 5.0


@dataclass
class Started:
    """One process that was asked for. `process` is only kept, never polled: `reap` collects all ends."""

    process: subprocess.Popen[bytes]
    start_s: float
    limit_s: float
    seconds: float = 0.0
    code: int | None = None
    timed_out: bool = False


class Agent:
    """Every public method is a request; its keyword arguments are the request's fields, its result the answer's."""

    def __init__(self) -> None:
        self._started: dict[int, Started] = {}

    def start(self, argv: list[str], env: dict[str, str], cwd: str, out: str, err: str, limit_s: float) -> dict[str, Any]:
        """Start a process in a session of its own, to be killed with all that it started after `limit_s` seconds."""
        number = len(self._started)
        with open(out, "wb") as out_file, open(err, "wb") as err_file:
            process = subprocess.Popen(
                argv,
                env={**env, MARK: str(number)},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                start_new_session=True,
            )
        self._started[number] = Started(process, time.monotonic(), limit_s)
        return {"number": number}

    def state(self, number: int) -> dict[str, Any]:
        """How a process stands: `code` is None while it runs."""
        self.reap()
        started = self._started[number]
        return {"code": started.code, "seconds": started.seconds, "timed_out": started.timed_out}

    def stop(self, number: int) -> dict[str, Any]:
        """Kill a process and everything that it started, in whatever session that is now."""
        mark = f"{MARK}={number}".encode()
        end_s = time.monotonic() + STOP_S
        while marked := [pid for pid in _pids() if mark in _environment_of(pid)]:
            if time.monotonic() > end_s:
                return {"error": f"processes {marked} have not ended {STOP_S:g} s after SIGKILL"}
            for pid in marked:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
            self.reap()
        return {}

    def call(self, argv: list[str], limit_s: float) -> dict[str, Any]:
        """Run a short command to its end."""
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s)
        return {"code": done.returncode, "out": done.stdout, "err": done.stderr}

    def reap(self) -> None:
        """Collect what has ended; orphans come to process 1 as well."""
        numbers = {started.process.pid: started for started in self._started.values() if started.code is None}
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                started = numbers.get(ended[0])
                if started is not None:
                    started.code = os.waitstatus_to_exitcode(ended[1])
                    started.seconds = time.monotonic() - started.start_s

    def tick(self) -> None:
        """End what has run for too long."""
        self.reap()
        for number, started in self._started.items():
            if started.code is None and time.monotonic() - started.start_s > started.limit_s:
                started.timed_out = True
                self.stop(number)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and name != "1"]


def _environment_of(pid: int) -> list[bytes]:
    """Empty for a process that has ended.

    Before it is collected such a process belongs to the machine's root, so without root this is a lack of permission.
    """
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def answer(agent: Agent, request: bytes) -> dict[str, Any]:
    """To one line; carries the question's id."""
    fields = json.loads(request)
    number = fields.pop("id")
    try:
        return {"id": number, **getattr(agent, fields.pop("do"))(**fields)}
    except (OSError, subprocess.SubprocessError) as error:
        return {"id": number, "error": f"{type(error).__name__}: {error}"}


def main() -> None:
    agent, unread = Agent(), b""
    while True:
        if select.select([0], [], [], TICK_S)[0]:
            received = os.read(0, 1 << 16)
            if not received:
                return
            *requests, unread = (unread + received).split(b"\n")
            for request in requests:
                print(json.dumps(answer(agent, request)), flush=True)
        agent.tick()


if __name__ == "__main__":
    main()
