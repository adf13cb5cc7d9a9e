"""The header of a safetensors file: eight bytes of length, JSON, then the tensors' bytes without gaps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .codec import ITEM_BYTES
from .matrix_sources import Stored

MAX_HEADER_BYTES = 100_000_000
"""Longer headers are refused by the readers of this format."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a header: its bytes are [begin, end) counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Header of a file, padded with spaces so that the tensors begin at a multiple of eight. CheckpointError if too long."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    table |= {e.name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.begin, e.end]} for e in entries}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"a header of {len(text)} bytes for {len(entries)} tensors is too long: write smaller shards")
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors of a file by name, in the order of their bytes, and its metadata. Reads the header only.

    Raises CheckpointError, naming the file: not this format, truncated, longer than its header says, tensors that overlap, leave
    gaps, or do not fit their shape.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _wrong(
                    path, f"it has {size} bytes, its header alone would have {length}: it is truncated, or not safetensors"
                )
            text = file.read(length)
    except OSError as error:
        raise _wrong(path, error.strerror or str(error)) from error
    try:
        table = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise _wrong(path, f"its header is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise _wrong(path, "its header is not an object")
    metadata = table.pop("__metadata__", None) or {}
    entries = sorted((_entry(path, name, value) for name, value in table.items()), key=lambda e: (e.begin, e.end))
    at = 0
    for entry in entries:
        if entry.begin != at:
            what = "overlaps the tensor before it" if entry.begin < at else f"leaves {entry.begin - at} bytes before it unused"
            raise _wrong(path, f"{entry.name} begins at byte {entry.begin} and so {what}")
        at = entry.end
    data = 8 + length
    if size != data + at:
        kind = "it is truncated" if size < data + at else "something was appended"
        raise _wrong(path, f"it has {size} bytes, by its header {data + at}: {kind}; download or copy it again")
    return {e.name: Stored(path=path, offset=data + e.begin, shape=e.shape, dtype=e.dtype) for e in entries}, metadata


def _entry(path: Path, name: str, value: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise _wrong(path, f"the entry of {name} lacks dtype, shape or data_offsets") from error
    if dtype not in ITEM_BYTES:
        raise _wrong(path, f"{name} has dtype {dtype!r}, known are {', '.join(ITEM_BYTES)}")
    if not whole or end - begin != prod(shape) * ITEM_BYTES[dtype]:
        raise _wrong(path, f"{name} has bytes {begin} to {end}, which is not the size of {dtype} {list(shape)}")
    return Entry(name, dtype, shape, begin, end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _wrong(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {what}")
