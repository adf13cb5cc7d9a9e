"""Which code, versions, machine and command line a process runs with. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PACKAGES = (
    "moefold",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "deepspeed",
    "megatron-core",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
_RECORDED = re.compile(r"(NCCL|GLOO|OMP|TORCH|SLURM)_")
# Names, not values: a variable of this kind is left out however harmless it looks.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|AUTH|CREDENTIAL|JWT|COOKIE", re.IGNORECASE)


def origin_of_process(
    *, argv: Sequence[str] | None = None, extra: Mapping[str, object] | None = None, now: float | None = None
) -> dict[str, Any]:
    """Provenance of this process, ready for JSON.

    argv: command line (default: this process's). extra: further facts. now: Unix time (default: the clock).
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now)),
        "argv": list(sys.argv if argv is None else argv),
        "cwd": os.getcwd(),
        "git": git_state(Path(__file__).resolve()),
        "versions": {"python": platform.python_version(), **_versions()},
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "environment": recorded_environment(os.environ),
        **(extra or {}),
    }


def recorded_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of NCCL, gloo, OpenMP, torch and Slurm, without those whose name suggests a secret."""
    return {name: environ[name] for name in sorted(environ) if _RECORDED.match(name) and not _SECRET.search(name)}


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the repository that tracks `file`, whether it has local changes, and their hash.

    None where no repository tracks the file: an installed package inside somebody's repository is not a part of it.
    """
    folder = file.parent
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "diff", "HEAD")
    if commit is None or changes is None:
        return None
    digest = hashlib.sha256(changes.encode()).hexdigest() if changes else None
    return {"commit": commit.strip(), "dirty": bool(changes), "diff_sha256": digest}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no repository, or no commit yet: recorded as "git": null
    return done.stdout


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {name: version for name, version in found.items() if version is not None}
