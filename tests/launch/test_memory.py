"""The peak of this program's memory, and of no other's."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = "from moefold.launch.memory import peak_resident_bytes; print(peak_resident_bytes())"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system keeps the peak across exec")
def test_a_program_does_not_inherit_the_peak_of_the_one_that_started_it() -> None:
    grows = f"block = bytearray(b'1') * (300 << 20); import os, sys; os.execv(sys.executable, [sys.executable, '-c', {CHILD!r}])"
    peak = int(subprocess.run([sys.executable, "-c", grows], capture_output=True, text=True, check=True, timeout=60).stdout)
    assert 1 << 20 < peak < 200 << 20


def test_it_grows_with_what_is_held() -> None:
    grows = f"block = bytearray(b'1') * (300 << 20); {CHILD}"
    peak = int(subprocess.run([sys.executable, "-c", grows], capture_output=True, text=True, check=True, timeout=60).stdout)
    assert 300 << 20 < peak < 500 << 20
