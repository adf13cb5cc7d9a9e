"""How far a long piece of work is: one line that moves on a terminal, now and then a line elsewhere. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from ..console import duration

Told = Callable[[str, int, int, float], None]
"""Called with the stage ("hashing", "writing", "proof"), what is done, what there is in all (bytes, or layers) and seconds."""

BYTES = ("hashing", "writing")
WIDTH = 24
PAUSE_S = 10.0
"""Between two lines where nobody watches."""


class Bar:
    """Progress for people. stream: where to; the cursor is moved only on a terminal."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self._stage, self._first, self._told_s = "", (0, 0.0), -PAUSE_S

    def __call__(self, stage: str, done: int, total: int, seconds: float) -> None:
        begins, ended = stage != self._stage, done >= total
        if begins:
            # what earlier runs had done says nothing about the speed of this one
            self._stage, self._first, self._told_s = stage, (done, seconds), seconds
        if self.live:
            self.stream.write(f"\r\x1b[2K{self._line(stage, done, total, seconds)}" + ("\n" if ended else ""))
        elif ended or (not begins and seconds - self._told_s >= PAUSE_S):
            self._told_s = seconds
            self.stream.write(self._line(stage, done, total, seconds) + "\n")
        self.stream.flush()

    def _line(self, stage: str, done: int, total: int, seconds: float) -> str:
        share = done / total if total else 1.0
        filled = round(share * WIDTH)
        bar = f"[{'#' * filled}{'.' * (WIDTH - filled)}] " if self.live else ""
        before, start_s = self._first
        parts = [f"{stage} {bar}{share:4.0%}", f"{size(done)} of {size(total)}" if stage in BYTES else f"{done} of {total}"]
        if done > before and seconds > start_s:
            rate = (done - before) / (seconds - start_s)
            parts += [f"{size(rate)}/s"] if stage in BYTES else []
            parts.append(f"{duration((total - done) / rate)} left" if done < total else duration(seconds))
        return "  ".join(parts)


def size(nbytes: float) -> str:
    """Bytes for people: 1.50 GiB, 12.0 MiB, 3 KiB."""
    for limit, unit, form in ((2**30, "GiB", ".2f"), (2**20, "MiB", ".1f"), (2**10, "KiB", ".0f")):
        if nbytes >= limit:
            return f"{nbytes / limit:{form}} {unit}"
    return f"{nbytes:.0f} B"
