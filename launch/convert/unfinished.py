"""What of an interrupted import is on the disk: journal.json says of what it is, and beside each data file that is whole and
kept by the disk, a note says what is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ...moe.errors import CheckpointError
from ...moe.hf.journal import JOURNAL, Journal, sync_folder, write_durably
from ...moe.hf.shards import Tensors, content_key
from ..checkpoint import file_crc

NOTE = ".note"
"""Suffix of the note of a data file."""


@dataclass(frozen=True)
class Note:
    """A data file that is whole. nbytes, crc: of all of it. places: (offset, length) of each tensor's shard, in the order of the
    plan."""

    nbytes: int
    crc: int
    places: tuple[tuple[int, int], ...]

    def write(self, file: Path) -> None:
        """Put the note beside its file, which the disk has kept already."""
        sync_folder(file.parent)
        write_durably(file.with_name(file.name + NOTE), json.dumps(vars(self)) + "\n")

    @classmethod
    def read(cls, file: Path) -> Note | None:
        """The note of a data file; None if it has none, or if the file is not what was written: it is then written once more."""
        try:
            value = json.loads(file.with_name(file.name + NOTE).read_text(encoding="utf-8"))
            found = cls(value["nbytes"], value["crc"], tuple((at, length) for at, length in value["places"]))
            numbers = all(type(number) is int for place in found.places for number in place)
            whole = file.stat().st_size == found.nbytes and file_crc(file) == found.crc
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if whole and numbers else None


def plan_hash(tensors: Tensors, facts: Mapping[str, object]) -> str:
    """Equal for two imports that give the same bytes. facts: whatever else decides these, ready for JSON."""
    digest = sha256(json.dumps(facts, sort_keys=True).encode())
    for name, (matrix, dtype) in tensors.items():
        digest.update(f"\0{name}\0{content_key(matrix, dtype)}".encode())
    return digest.hexdigest()


def begin(folder: Path, wanted: Journal, lock: str) -> dict[str, Note]:
    """Data files to go on from, by name; all else but the lock is removed. Begins the journal where there is none.

    Raises CheckpointError where the folder was begun with other options or sources, or a source has changed since; where it
    has a folder in it, which no import makes.
    """
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            raise CheckpointError(f"{path} is a folder, which no import makes: move it away to go on")
    found, notes = Journal.read(folder), dict[str, Note]()
    if found is not None:
        found.check(wanted, folder)
        for path in sorted(folder.glob(f"*{NOTE}")):
            file = path.with_name(path.name.removesuffix(NOTE))
            note = Note.read(file)
            if note is not None:
                notes[file.name] = note
    kept = {lock, *([] if found is None else [JOURNAL]), *notes, *(name + NOTE for name in notes)}
    # complete.json too: files that are written once more are not those it speaks of
    for path in sorted(folder.iterdir(), key=lambda p: p.name != "complete.json"):
        if path.name not in kept:
            path.unlink()
    if found is None:
        wanted.write(folder)
    return notes


def tidy(folder: Path) -> None:
    """Remove what only an unfinished import has, the lock's file excepted; the journal last, as without it all begins anew."""
    for path in (*folder.glob(f"*{NOTE}"), folder / JOURNAL):
        path.unlink()
