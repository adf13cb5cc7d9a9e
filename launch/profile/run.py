"""`moefold profile run`: what the recordings of finished or running jobs say, as a verdict and one page. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ...moe.errors import RunDirError
from ..comm_file import check_comm
from ..report_parts import RunData, csv_text, load_runs
from .diagnosis import Diagnosis, diagnose
from .page import Section, Tone, page_html, write_page
from .run_sections import sections as build_sections

KEPT = (
    *("schema", "ranks", "hosts", "steps", "covered_s", "clock_error_s", "total", "by_rank", "layers", "last"),
    *("rank_times", "waited_for", "all_to_all_bytes", "expert_rows", "unaligned_s"),
)
"""Of comm.json, in the plain data of a profile."""
ORDER: tuple[Tone, ...] = ("bad", "warn", "good", "")


@dataclass(frozen=True)
class ProfileRun:
    """What was found. runs: those with recordings; without: names of those that have none."""

    runs: tuple[RunData, ...]
    diagnoses: tuple[Diagnosis, ...]
    without: tuple[RunData, ...] = ()

    @property
    def line(self) -> str:
        """The verdict in one line; of several runs each with its name."""
        if len(self.runs) == 1:
            return self.diagnoses[0].line
        return " ".join(f"{run.name}: {d.line}" for run, d in zip(self.runs, self.diagnoses, strict=True))

    @property
    def tone(self) -> Tone:
        """That of the run that is worst off."""
        return min((d.tone for d in self.diagnoses), key=ORDER.index)

    def details(self) -> list[str]:
        """What to know beside the verdict: runs that go on, steps that were left out, runs without recordings."""
        out = []
        for run, diagnosis in zip(self.runs, self.diagnoses, strict=True):
            out += [f"{run.name}: {note}." for note in diagnosis.notes]
            newest = max(run.comm.get("steps", []), default=0)
            if run.state == "running":
                out.append(f"{run.name} is running: recorded up to step {newest}.")
            elif run.state not in ("completed", "unknown"):
                out.append(f"{run.name} ended as {run.state}: recorded up to step {newest}.")
            if run.comm.get("unaligned_s") and run.comm.get("collectives"):
                count = len(run.comm["unaligned_s"])
                out.append(f"{run.name}: {count} sampled steps are left out, as a clock jumped in them.")
            if run.comm.get("schema", 1) < 2:
                out.append(f"{run.name} was recorded by an earlier version: no timeline, hosts or times by step.")
        out += [f"{run.name} has no recordings: {how_to_record(run)}." for run in self.without]
        return out

    def sections(self) -> list[Section]:
        """Of the page."""
        return build_sections(list(zip(self.runs, self.diagnoses, strict=True)), [*self.runs, *self.without])

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the verdict, and per run its path, state, diagnosis, and tables of comm.json."""
        runs = [
            {
                "path": str(run.path),
                "name": run.name,
                "state": run.state,
                "diagnosis": d.to_dict(),
                "recorded": {key: run.comm[key] for key in KEPT if key in run.comm},
            }
            for run, d in zip(self.runs, self.diagnoses, strict=True)
        ]
        return {"verdict": self.line, "tone": self.tone, "runs": runs, "without": [str(run.path) for run in self.without]}

    def to_csv(self) -> str:
        """The table of collectives: one row for each (run, what, axis, layer, direction); seconds added over ranks and steps."""
        names = ("what", "axis", "layer", "direction", "skew_s", "transfer_s", "hidden_s", "unseen_s", "exposed_share")
        rows = [[run.name, *(line[n] for n in names)] for run in self.runs for line in run.comm.get("layers", [])]
        return csv_text(["run", *names], rows)

    def render(self) -> str:
        """For the console."""
        lines = []
        for run, d in zip(self.runs, self.diagnoses, strict=True):
            lines += [f"{run.name}: {d.line}", *(f"  - {f.text} ({f.of_waiting:.0%} of all waiting)" for f in d.findings)]
        return "\n".join([*lines, *self.details()])

    def title(self) -> str:
        names = [run.name for run in self.runs]
        return names[0] if len(names) == 1 else f"Comparison of {len(names)} runs"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """The page. Raises RunDirError where it cannot be written."""
        return write_page(Path(path), self.title(), self.line, self.sections(), tone=self.tone, details=self.details())

    def _repr_html_(self) -> str:
        from .page import frame

        page = page_html(self.title(), self.line, self.sections(), tone=self.tone, details=self.details())
        return frame(page, f"profile of {escape(self.title())}")


def profile_run(*rundirs: str | os.PathLike[str]) -> ProfileRun:
    """Read the recordings of one run, or of several to compare.

    Raises:
        RunDirError: a path that is no run directory, a comm.json of a later version, or no recordings in any of the runs.
    """
    runs = load_runs([Path(d) for d in rundirs])
    for run in runs:
        check_comm(run.path / "comm.json", run.comm)
    found = [run for run in runs if run.comm.get("covered_s") or run.comm.get("unaligned_s")]
    if not found:
        raise RunDirError("\n  ".join(["nothing was recorded:", *(f"{run.path}: {how_to_record(run)}" for run in runs)]))
    without = tuple(run for run in runs if run not in found)
    return ProfileRun(tuple(found), tuple(diagnose(run.comm) for run in found), without)


def how_to_record(run: RunData) -> str:
    """Why there are no recordings, as far as the directory tells, and the way to some."""
    log, worlds = run.config.get("log", {}), [a.get("world_size") for a in run.attempts]
    if log.get("comm") is False:
        return "log.comm is false; set it to true (it costs below 1 % of a step)"
    if worlds and max(w or 0 for w in worlds) == 1:
        return "it ran on one rank, which communicates with nobody; start it on several"
    every = log.get("every", 10)
    if run.state == "running":
        return f"comm.json is written at every 8th metric line, here every {8 * every} steps, and at the end: wait for it"
    return "comm.json is missing; run on several ranks with log.comm = true (the default)"


def default_page(runs: Sequence[RunData]) -> Path:
    """Where the page goes if nobody says: into the run directory, of several into the first."""
    return runs[0].path / ("profile.html" if len(runs) == 1 else "profile-comparison.html")
