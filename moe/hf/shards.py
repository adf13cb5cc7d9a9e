"""What a checkpoint will look like, byte by byte, before any of it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from .codec import item_bytes
from .files import SINGLE
from .matrix_base import Matrix
from .safetensors_header import Entry, encode_header

Tensors = Mapping[str, tuple[Matrix, str]]
"""Name -> matrix and the dtype to store it as."""


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a file.

    offset: of its first byte, from the beginning of the file. key: equal for tensors of equal bytes.
    """

    name: str
    matrix: Matrix
    dtype: str
    offset: int
    nbytes: int
    key: str

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Shard:
    """A file. header: its first bytes. nbytes: of all of it."""

    name: str
    header: bytes
    slots: tuple[Slot, ...]
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """All files with tensors. index: text of the index, None for a single file. tensor_bytes: without headers."""

    shards: tuple[Shard, ...]
    index: str | None
    tensor_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def lay_out(tensors: Tensors, shard_bytes: int) -> Layout:
    """Files of at most `shard_bytes` of tensors, in the order given; a larger tensor has a file to itself.

    Inside a file, elements of more bytes come first: tensors then begin at multiples of their element size, which readers that
    map files into memory need. Raises ValueError for no tensors, CheckpointError for dtypes unknown or headers too long.
    """
    if not tensors:
        raise ValueError("a checkpoint without tensors cannot be written")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}, but must be positive")
    groups: list[list[str]] = []
    filled = 0
    for name, (matrix, dtype) in tensors.items():
        nbytes = matrix.nbytes(dtype)
        if not groups or filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    shards = tuple(_shard(name, group, tensors) for name, group in zip(names, groups, strict=True))
    total = sum(slot.nbytes for shard in shards for slot in shard.slots)
    return Layout(shards, _index(shards, total) if count > 1 else None, total)


def _shard(file: str, names: Sequence[str], tensors: Tensors) -> Shard:
    entries, at = [], 0
    for name in sorted(names, key=lambda n: -item_bytes(tensors[n][1])):
        matrix, dtype = tensors[name]
        entries.append(Entry(name, dtype, matrix.shape, at, at + matrix.nbytes(dtype)))
        at = entries[-1].end
    header = encode_header(entries, {"format": "pt"})
    slots = tuple(
        Slot(
            e.name, tensors[e.name][0], e.dtype, len(header) + e.begin, e.end - e.begin, content_key(tensors[e.name][0], e.dtype)
        )
        for e in entries
    )
    return Shard(file, header, slots, len(header) + at)


def _index(shards: Sequence[Shard], total: int) -> str:
    places = {slot.name: shard.name for shard in shards for slot in shard.slots}
    return as_text({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def content_key(matrix: Matrix, dtype: str) -> str:
    """What a tensor is made of, as a short string. Raises TypeError for a class that does not show all its fields."""
    _check_shown(matrix)
    return sha256(f"{dtype} {list(matrix.shape)} {matrix!r}".encode()).hexdigest()


def _check_shown(matrix: Matrix) -> None:
    if type(matrix).__repr__ is Matrix.__repr__:
        raise TypeError(
            f"{type(matrix).__name__} must be a dataclass: what it is made of decides whether a file can be gone on with"
        )
    for child in matrix.children():
        _check_shown(child)


def as_text(value: Mapping[str, Any]) -> str:
    """JSON as Hugging Face writes it: two spaces, a newline at the end."""
    return json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n"


def plan_hash(layout: Layout, config: Mapping[str, Any], manifest: Mapping[str, Any], carry: Sequence[Path]) -> str:
    """Equal for two writings that give the same bytes: of manifest, config, headers, and what every tensor is made of."""
    digest = sha256(json.dumps([dict(config), dict(manifest), [path.name for path in carry]], sort_keys=True).encode())
    for shard in layout.shards:
        digest.update(f"\0{shard.name}\0".encode() + shard.header)
        for slot in shard.slots:
            digest.update(slot.key.encode())
    return digest.hexdigest()
