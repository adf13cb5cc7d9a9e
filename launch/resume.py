"""Resume or initialise: what a start of a run does, decided from its settings and what its directory holds. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..moe.errors import CheckpointError, RunDirError


def completed_checkpoints(folder: Path) -> list[Path]:
    """Directories `step-<digits>` of `folder` that contain complete.json, by step."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name)) and is_complete(p)]
    return [path for _, path in sorted(found)]


def is_complete(path: Path) -> bool:
    """Whether a checkpoint directory was written to its end."""
    return (path / "complete.json").is_file()


def find_checkpoint(path: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint that a path means: itself, or the latest one of a run directory or checkpoint folder."""
    path = Path(path)
    if is_complete(path):
        return path.resolve() if path.is_symlink() else path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    latest = folder / "latest"
    if latest.is_file():
        named = folder / latest.read_text().strip()
        if is_complete(named):
            return named
    elif latest.is_dir() and is_complete(latest):
        return latest.resolve()
    done = completed_checkpoints(folder)
    return done[-1] if done else None


@dataclass(frozen=True)
class Decision:
    """fresh: random weights at step 0; resume: everything from `path`; init: only the weights from `path`, at step 0."""

    kind: Literal["fresh", "resume", "init"]
    path: Path | None
    message: str
    """What is said to the user; never empty, because a silent fresh start loses runs."""


def decide_resume(
    resume: str,
    own: Path | None,
    used: bool,
    init_from: str | None,
    *,
    run_dir: str = "the run directory",
    find: Callable[[str], Path | None] = find_checkpoint,
) -> Decision:
    """What to start from.

    resume: `checkpoint.resume` ('auto', 'must', 'never' or a path). own: latest complete checkpoint of the run
    directory, if any. used: whether training was started in the directory before (`RunDir.used`).
    init_from: `checkpoint.init_from`. find: the complete checkpoint that a path means, or None.
    Raises CheckpointError for a checkpoint that is asked for and not there, RunDirError where 'never' meets a used directory.
    """
    if resume not in ("auto", "must", "never"):
        found = find(resume)
        if found is None:
            raise CheckpointError(
                f"checkpoint.resume = '{resume}': no complete checkpoint there; pass 'auto', 'must', 'never', "
                "or the path of a directory that contains complete.json"
            )
        return Decision("resume", found, f"resuming from {_step(found)} in {found}{_ignored(init_from)}")
    if resume == "never":
        if used or own is not None:
            raise RunDirError(
                f"{run_dir} is not empty (checkpoint.resume = 'never'); pass another run.dir, or resume = 'auto' to continue"
            )
    elif own is not None:
        return Decision("resume", own, f"resuming from {_step(own)} in {own}{_ignored(init_from)}")
    elif resume == "must":
        raise CheckpointError(
            f"{run_dir} has no complete checkpoint (checkpoint.resume = 'must'); "
            "check run.dir, or use 'auto' to start fresh where there is none"
        )
    if init_from is not None:
        found = find(init_from)
        if found is None:
            raise CheckpointError(f"checkpoint.init_from = '{init_from}': no complete checkpoint there; {_instead(init_from)}")
        return Decision("init", found, f"starting at step 0 with the weights of {found}")
    return Decision("fresh", None, f"no checkpoint in {run_dir}: starting fresh at step 0")


def _instead(path: str) -> str:
    """The way out where no checkpoint of ours is."""
    if (Path(path) / "config.json").is_file():
        return f"it is a Hugging Face folder: make one of it with `moefold convert import {path} OUT`, and name OUT here"
    return "check the path"


def _step(checkpoint: Path) -> str:
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return f"step {int(match[1])}" if match else "the checkpoint"


def _ignored(init_from: str | None) -> str:
    return f" (checkpoint.init_from = '{init_from}' is ignored: a checkpoint to resume from wins)" if init_from else ""
