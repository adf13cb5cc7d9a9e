"""Tensors of a training checkpoint as lazy matrices: each shard's values lie somewhere in a file, and are read from there.

A shard is written by torch.save, which makes an uncompressed zip archive: a pickle that says type, shape and strides, and the
values as one record. Only the pickle is interpreted here, by an unpickler that makes nothing but these facts.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from ...moe.errors import CheckpointError
from ...moe.hf.codec import Array, carrier, item_bytes
from ...moe.hf.matrix import Matrix, Stored

STORAGES = MappingProxyType(
    {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64"}
    | {"IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL"}
)
"""torch's name of a storage -> dtype, by the names of safetensors."""
LOCAL_HEADER, NAME_LENGTH, EXTRA_LENGTH = 30, 26, 28
"""Bytes before the name in a zip record's header, and where in them the lengths of name and extra field are (PKWARE APPNOTE)."""


@dataclass(frozen=True)
class Strip:
    """Some whole rows of a shard: they are rows first, first + 1, ... of the tensor from column left on.

    at: the first row in `of`. rows: how many.
    """

    first: int
    rows: int
    left: int
    of: Matrix
    at: int


@dataclass(frozen=True)
class Tiled(Matrix):
    """A tensor that is stored as shards, which cover it without overlap.

    strips: all of it, each a range of rows of a shard.
    """

    of_shape: tuple[int, ...]
    strips: tuple[Strip, ...] = field(compare=False, repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self._is(self.of_shape, self.strips[0].of.dtype)
        covered = sum(strip.rows * strip.of.cols for strip in self.strips)
        if covered != prod(self.shape):
            raise ValueError(f"shards hold {covered} of the {prod(self.shape)} values")
        # shown instead of the strips, of which there may be thousands
        object.__setattr__(self, "digest", sha256(repr(self.strips).encode()).hexdigest()[:32])

    def children(self) -> tuple[Matrix, ...]:
        return tuple({id(strip.of): strip.of for strip in self.strips}.values())

    def block(self, start: int, stop: int, left: int, right: int, dtype: str) -> Array:
        out = np.empty((stop - start, right - left), carrier(dtype))
        for strip in self.strips:
            top, bottom = max(start, strip.first), min(stop, strip.first + strip.rows)
            west, east = max(left, strip.left), min(right, strip.left + strip.of.cols)
            if top < bottom and west < east:
                move = strip.at - strip.first
                found = strip.of.block(top + move, bottom + move, west - strip.left, east - strip.left, dtype)
                out[top - start : bottom - start, west - left : east - left] = found
        return out


@dataclass(frozen=True)
class Shard:
    """A shard of a tensor: where it begins in each dimension, and its values, with its own shape."""

    offsets: tuple[int, ...]
    values: Stored


def tensor_of(shape: Sequence[int], shards: Sequence[Shard]) -> Matrix:
    """A tensor from its shards; a single one is taken as it is. Raises ValueError where they do not cover it."""
    shape = tuple(shape)
    if len(shards) == 1 and shards[0].values.shape == shape:
        return shards[0].values
    return Tiled(shape, tuple(strip for shard in shards for strip in _strips(shape, shard)))


def _strips(shape: tuple[int, ...], shard: Shard) -> list[Strip]:
    """Rows of a shard that stay together in the tensor."""
    sizes, offsets = shard.values.shape, shard.offsets
    if len(shape) == 1:
        return [Strip(0, 1, offsets[0], shard.values, 0)]
    split = len(shape) - 2
    # dimensions that the shard has whole do not part its rows
    while split > 0 and sizes[split] == shape[split]:
        split -= 1
    inner = prod(shape[split + 1 : -1])
    rows = sizes[split] * inner
    strips = []
    for number, index in enumerate(np.ndindex(*sizes[:split])):
        at = [i + o for i, o in zip(index, offsets, strict=False)] + [offsets[split]]
        first = 0
        for position, bound in zip(at, shape, strict=False):
            first = first * bound + position
        strips.append(Strip(first * inner, rows, offsets[-1], shard.values, number * rows))
    return strips


class _Slice(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        self.position = to + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        data = self.file.read(max(0, min(len(buffer), self.length - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@dataclass(frozen=True)
class _Facts:
    """What the pickle of a tensor says. record: name of its values in the archive. start: first element in them."""

    dtype: str
    record: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Facing(pickle.Unpickler):
    """Reads what torch.save says about one tensor, and makes no object of torch."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _facts
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which no plain tensor has")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _facts(storage: tuple[Any, ...], start: int, shape: Sequence[int], strides: Sequence[int], *rest: Any) -> _Facts:
    return _Facts(storage[1], storage[2], start, tuple(shape), tuple(strides))


def stored_shard(file: BinaryIO, path: Path, offset: int, length: int) -> Stored:
    """Where the values of a tensor that torch.save has written at `offset` of a file lie.

    file: `path`, open for reading. Raises CheckpointError for what is no such tensor.
    """
    try:
        with zipfile.ZipFile(_Slice(file, offset, length)) as archive:
            records = {name.split("/", 1)[-1]: name for name in archive.namelist()}
            facts = _Facing(io.BytesIO(archive.read(records["data.pkl"]))).load()
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                raise pickle.UnpicklingError("its bytes are big-endian")
            place = archive.getinfo(records[f"data/{facts.record}"])
        if place.compress_type != zipfile.ZIP_STORED or not isinstance(facts, _Facts):
            raise pickle.UnpicklingError("it is not stored as torch.save does")
    except (pickle.UnpicklingError, zipfile.BadZipFile, KeyError, AttributeError, TypeError, IndexError, EOFError) as error:
        raise CheckpointError(f"{path} has no tensor at byte {offset}: {error}") from error
    expected = 1
    for size, stride in zip(reversed(facts.shape), reversed(facts.strides), strict=True):
        if size > 1 and stride != expected:
            what = f"is stored with strides {list(facts.strides)} for its shape {list(facts.shape)}"
            raise CheckpointError(f"{path}: the tensor at byte {offset} {what}: resume the run, so that it saves another")
        expected *= size
    file.seek(offset + place.header_offset)
    header = file.read(LOCAL_HEADER)
    lengths = (int.from_bytes(header[i : i + 2], "little") for i in (NAME_LENGTH, EXTRA_LENGTH))
    begin = offset + place.header_offset + LOCAL_HEADER + sum(lengths) + facts.start * item_bytes(facts.dtype)
    return Stored(path=path, offset=begin, shape=facts.shape, dtype=facts.dtype)
