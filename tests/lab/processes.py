"""What runs on the hosts of a lab: processes, torchrun jobs, and how they ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_S = 30.0
"""A lab that does not answer within this time is broken."""
POLL_S = 0.03
TAIL = 2000
"""Characters of a process's output that an error message quotes."""


class LabUnavailable(RuntimeError):
    """No lab can be made on this machine; the message is the reason."""


class LabError(RuntimeError):
    """A lab could not do what it was asked for, or what ran in it failed."""


@dataclass(frozen=True)
class Ended:
    """How a process on a host ended: exit code (negative: killed by that signal), output, and whether its time was over."""

    host: int
    code: int
    out: str
    err: str
    seconds: float
    timed_out: bool

    def __str__(self) -> str:
        why = " (its time was over)" if self.timed_out else ""
        return f"host {self.host}: exit code {self.code}{why} after {self.seconds:.1f} s\n{_tail(self.out)}{_tail(self.err)}"


@dataclass(frozen=True)
class JobEnd:
    """How a torchrun job ended, by host."""

    hosts: tuple[Ended, ...]

    @property
    def ok(self) -> bool:
        return all(end.code == 0 for end in self.hosts)

    def check(self) -> JobEnd:
        """This, if every host's torchrun ended with 0.

        Raises:
            LabError: with each host's exit code and the end of its output.
        """
        if not self.ok:
            raise LabError("the job failed\n" + "\n".join(map(str, self.hosts)))
        return self


class Process:
    """A process on a host, with what it started. Its output can be read while it runs, as far as it has been flushed."""

    def __init__(self, ask: Callable[..., dict[str, Any]], host: int, number: int, files: tuple[Path, Path], limit_s: float):
        self._ask, self._number, self._files, self._limit_s = ask, number, files, limit_s
        self.host = host

    def out(self) -> str:
        return self._files[0].read_text(errors="replace")

    def err(self) -> str:
        return self._files[1].read_text(errors="replace")

    def ended(self) -> Ended | None:
        """How it ended; None while it runs."""
        state = self._ask("state", number=self._number)
        if state["code"] is None:
            return None
        return Ended(self.host, state["code"], self.out(), self.err(), state["seconds"], state["timed_out"])

    def wait(self) -> Ended:
        """Wait for its end, which comes at the latest when its time is over."""
        end_s = time.monotonic() + self._limit_s + ANSWER_S
        while time.monotonic() < end_s:
            if (end := self.ended()) is not None:
                return end
            time.sleep(POLL_S)
        raise LabError(f"host {self.host}: a process outlived its {self._limit_s:g} s; the lab does not watch it any more")

    def wait_for(self, text: str, timeout_s: float = 60.0) -> str:
        """Its standard output as soon as `text` is in it.

        Raises:
            LabError: it ended, or `timeout_s` seconds went by, without this text.
        """
        end_s = time.monotonic() + timeout_s
        while True:
            end = self.ended()  # first, so that all its output is read below
            if text in (out := self.out()):
                return out
            if end is not None:
                raise LabError(f"no {text!r} in the output of {end}")
            if time.monotonic() > end_s:
                raise LabError(
                    f"host {self.host}: no {text!r} in the output after {timeout_s:g} s\n{_tail(out)}{_tail(self.err())}"
                )
            time.sleep(POLL_S)

    def stop(self) -> Ended:
        """Kill it with everything that it started, if it still runs."""
        self._ask("stop", number=self._number)
        return self.wait()


class Job:
    """A torchrun job: one launcher on each of its hosts."""

    def __init__(self, processes: Mapping[int, Process]):
        self.on = dict(processes)

    def wait(self) -> JobEnd:
        """Wait until all launchers have ended, at the latest when the job's time is over. Does not raise where one failed."""
        return JobEnd(tuple(process.wait() for process in self.on.values()))

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Wait until every host has written `text`; see `Process.wait_for`."""
        end_s = time.monotonic() + timeout_s
        for process in self.on.values():
            process.wait_for(text, max(0.0, end_s - time.monotonic()))

    def stop(self) -> JobEnd:
        """Kill it on all hosts."""
        return JobEnd(tuple(process.stop() for process in self.on.values()))


def _tail(text: str) -> str:
    return text if len(text) <= TAIL else f"...{text[-TAIL:]}"
