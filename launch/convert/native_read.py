"""A training checkpoint seen as parts, without loading it: what complete.json says, and where each tensor's values are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ...moe.config import ModelConfig, with_defaults
from ...moe.errors import CheckpointError
from ...moe.hf.families import FAMILIES, NATIVE, read_parts
from ...moe.hf.family_native import from_table
from ...moe.hf.files import Checkpoint
from ...moe.hf.matrix import Constant, Matrix, Stored, WeightedSum
from ..checkpoint import file_crc, read_complete
from ..upcycle.progress import Told
from .tiles import Shard, stored_shard, tensor_of

MODEL, EXACT = "model.", "exact."
"""Prefixes of tensors: of the model, and of source values that the model's own do not give back (see native_write)."""


@dataclass(frozen=True)
class NativeCheckpoint:
    """A training checkpoint. meta: complete.json. parts: of the model, in the order of files."""

    path: Path
    meta: Mapping[str, Any]
    config: ModelConfig
    parts: Mapping[str, Matrix]

    @property
    def imported(self) -> Mapping[str, Any]:
        """What was noted when it was imported: family, dtypes, special tokens, files to carry. Empty for one that was trained."""
        return self.meta.get("imported", {})


def open_native(path: Path, progress: Told | None = None) -> NativeCheckpoint:
    """A complete checkpoint directory (`step-*`, or what `convert import` made); its files are checked first.

    Raises CheckpointError: damaged, truncated or foreign files, or tensors that are not those of the model it names.
    """
    try:
        meta = read_complete(path)
        check_files(path, meta["files"], progress)
        config: ModelConfig = from_table(ModelConfig, with_defaults(meta["model"]), "model")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be used: complete.json cannot be read ({type(error).__name__}: {error})") from error
    tensors = _tensors(path)
    model = {name.removeprefix(MODEL): t for name, t in tensors.items() if name.startswith(MODEL)}
    folder = Checkpoint(path, FAMILIES[NATIVE].write(config), _as_stored(model), {}, (), "F32", {})
    config, parts = read_parts(folder)
    for name, matrix in tensors.items():
        if name.startswith(EXACT):
            part = name.removeprefix(EXACT)
            # as `read_parts` makes it of a file, so that a file of that kind gets these very values
            parts[part] = WeightedSum((matrix, Constant(matrix.shape, 1.0)), (1.0, 1.0))
    return NativeCheckpoint(path, meta, config, parts)


def check_files(path: Path, files: Mapping[str, Any], progress: Told | None = None) -> None:
    """Raise CheckpointError unless every file has the size and the CRC-32 that it was written with."""
    total, done, begin_s = sum(size for size, _ in files.values()), 0, time.monotonic()
    for name, (size, crc) in sorted(files.items()):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} cannot be used: {name} is missing")
        if file.stat().st_size != size:
            what = f"{name} has {file.stat().st_size} bytes, {size} were written: it is truncated or was changed"
            raise CheckpointError(f"{path} cannot be used: {what}")
        if file_crc(file) != crc:
            raise CheckpointError(f"{path} cannot be used: {name} does not hold what was written (CRC-32 differs)")
        done += size
        if progress is not None:
            progress("hashing", done, total, time.monotonic() - begin_s)


def _as_stored(tensors: Mapping[str, Matrix]) -> Mapping[str, Stored]:
    """For `Checkpoint`, which is made for files of one tensor each: parts are made of any matrix in the same way."""
    return tensors  # type: ignore[return-value]


def _tensors(path: Path) -> dict[str, Matrix]:
    """Tensors of the model, and exact values kept beside, as matrices over the files."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    wanted = {n: t for n, t in metadata.state_dict_metadata.items() if n.startswith((MODEL, EXACT))}
    shards: dict[str, list[Shard]] = {name: [] for name in wanted}
    opened: dict[str, BinaryIO] = {}
    try:
        for index, place in metadata.storage_data.items():
            if index.fqn not in wanted:
                continue
            file = opened.get(place.relative_path) or (path / place.relative_path).open("rb")
            opened[place.relative_path] = file
            values = stored_shard(file, path / place.relative_path, place.offset, place.length)
            shards[index.fqn].append(Shard(tuple(index.offset or ()), values))
    finally:
        for file in opened.values():
            file.close()
    tensors = {}
    for name, found in shards.items():
        kind = wanted[name]
        if not isinstance(kind, TensorStorageMetadata):
            raise CheckpointError(f"{path} cannot be used: {name} is no tensor")
        try:
            tensors[name] = tensor_of(kind.size, found)
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be used: {name}: {error}") from error
    return tensors
