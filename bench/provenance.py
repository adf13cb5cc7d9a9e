"""Where and with what a number was measured."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moefold.launch.provenance import origin_of_process


def provenance(argv: Sequence[str]) -> dict[str, Any]:
    """Machine, commit, versions, date and command of this run; no host name, no paths. `argv`: words after `python -m bench`."""
    import torch

    origin = origin_of_process(argv=list(argv))
    git = origin["git"] or {"commit": None, "dirty": None, "diff_sha256": None}
    return {
        "command": shlex.join(["python", "-m", "bench", *argv]),
        "date": origin["time"],
        "commit": git["commit"],
        "dirty": git["dirty"],
        "diff_sha256": git["diff_sha256"],
        "versions": {k: v for k, v in origin["versions"].items() if k in ("python", "torch", "triton", "numpy", "moefold")},
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system gives it; the architecture where it gives none."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def render(facts: Mapping[str, Any]) -> str:
    """The facts as two lines above a table."""
    commit = (facts["commit"] or "no commit")[:12] + (" with local changes" if facts["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average_1min']}"
    gpu = f", {facts['gpu']}" if facts["gpu"] else ", no GPU"
    return f"{facts['command']}   {facts['date']}   {commit}\n{machine}{gpu}; {versions}"
