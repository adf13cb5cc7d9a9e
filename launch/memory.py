"""Memory of this program. Imports no torch."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """Most resident memory of this program so far, in bytes.

    On Linux that is VmHWM: what getrusage says there is kept by exec, and may be the peak of what started this one. It
    is taken only where /proc does not tell.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        status = []
    found = next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), None)
    if found is not None:
        return found
    # macOS counts bytes, everybody else kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
