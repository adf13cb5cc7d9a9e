"""Parts written as a training checkpoint: weights only, of no layout, one shard at a time, so that memory stays small.

Weights are float32 (float64 where the source is), as training keeps them. What that loses is kept beside under `exact.`: Gemma's
files hold w where a norm multiplies by 1 + w, and float32 has not the bits for small w. Training does not look at these.

While it is written, OUT is the folder OUT.partial; renaming it is the last step. A killed import leaves OUT.partial, and the same
import goes on from its whole files; the result is the same, byte for byte.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ... import __version__
from ...moe.config import ModelConfig
from ...moe.errors import CheckpointError, MoefoldError
from ...moe.hf.codec import carrier, work_dtype
from ...moe.hf.families import FAMILIES, NATIVE, write_tensors
from ...moe.hf.journal import Journal, sync_folder
from ...moe.hf.lock import locked
from ...moe.hf.matrix import Matrix
from ..checkpoint import SCHEMA, described, file_crc, write_complete
from ..rundir import write_atomic
from ..upcycle.progress import Told, size
from .native_read import EXACT, MODEL
from .source import shifted
from .unfinished import Note, begin, plan_hash, tidy

SHARD_BYTES = 256 << 20
"""About how much is in memory at a time, and the size of files; one expert's matrices are not cut."""
LOCK = "import.lock"
"""Not the name that exports have theirs under: what an interrupted one has written is not to be removed."""
DTYPES = (("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16))


def write_native(
    out: Path,
    config: ModelConfig,
    parts: Mapping[str, Matrix],
    *,
    imported: Mapping[str, Any],
    texts: Mapping[str, str],
    carry: Sequence[Path] = (),
    shard_bytes: int = SHARD_BYTES,
    progress: Told | None = None,
) -> Wrote:
    """Write OUT, a checkpoint directory that `checkpoint.init_from` takes under any layout, or go on with an interrupted one.

    imported: facts kept in complete.json. texts: further files, name -> contents. carry: files to copy along. shard_bytes: most
    bytes of a file, as far as the first dimension can be cut.

    Raises:
        CheckpointError: OUT is not empty, another process writes it, the disk is too small or full, a source cannot be read;
            OUT.partial was begun from something else, or a source has changed since.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder: choose another, or remove it")
    model = write_tensors(FAMILIES[NATIVE], config, parts)
    tensors = {f"{MODEL}{name}": (matrix, work_dtype(matrix.dtype)) for name, matrix in model.items()}
    tensors |= {f"{EXACT}{part}": (source, source.dtype) for part, matrix in parts.items() if (source := shifted(matrix))}
    planner = _Planner(tensors, shard_bytes, progress)
    aside = out.with_name(f"{out.name}.partial")
    facts = {"config": asdict(config), "imported": dict(imported), "texts": dict(texts), "carry": [p.name for p in carry]}
    plan = plan_hash(tensors, facts | {"shard_bytes": shard_bytes, "versions": [SCHEMA, __version__, torch.__version__]})
    sources = frozenset(carry).union(*(matrix.sources() for matrix, _ in tensors.values()))
    with _locked(aside):
        notes = begin(aside, Journal.begun(plan, sources), LOCK)
        writer = _Writer(aside, planner, notes, plan)
        _check_space(aside, planner.nbytes - sum(note.nbytes for note in notes.values()))
        _save(writer, planner)
        for path in carry:
            shutil.copyfile(path, aside / path.name)
        for name, text in texts.items():
            write_atomic(aside / name, text)
        meta = {"schema": SCHEMA, "step": 0, "tokens": 0, "model": asdict(config), "data": {}, "layout": {}}
        shapes = {name: list(matrix.shape) for name, matrix in model.items() if not name.endswith("expert_bias_E")}
        files = {name: [note.nbytes, note.crc] for name, note in sorted(writer.notes.items())} | described([aside / ".metadata"])
        described_by = {"names": sorted(tensors), "shapes": shapes, "files": files, "imported": dict(imported)}
        write_complete(aside, meta | described_by)
        tidy(aside)
        aside.rename(out)
        # not before: without it, nobody would know OUT.partial for an interrupted import
        (out / LOCK).unlink()
        sync_folder(out.parent)
    return Wrote(planner.nbytes, writer.resumed)


@dataclass(frozen=True)
class Wrote:
    """nbytes: of all tensors. resumed: of these, what earlier, interrupted runs had written."""

    nbytes: int
    resumed: int


class _Planner(SavePlanner):
    """Cuts tensors into shards, and makes each when it is written."""

    def __init__(self, tensors: Mapping[str, tuple[Matrix, str]], shard_bytes: int, progress: Told | None):
        self.tensors, self.shard_bytes, self.progress = tensors, shard_bytes, progress
        self.nbytes = sum(matrix.nbytes(dtype) for matrix, dtype in tensors.values())
        self.done, self.begin_s = 0, time.monotonic()

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: the tensors are known."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([item for name in self.tensors for item in self._items(name)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def _items(self, name: str) -> Iterator[WriteItem]:
        """One shard after another along the first dimension; a vector is one."""
        matrix, dtype = self.tensors[name]
        shape, each = matrix.shape, matrix.nbytes(dtype) // max(1, matrix.shape[0])
        step = shape[0] if len(shape) == 1 else max(1, self.shard_bytes // max(1, each))
        properties = TensorProperties(dtype=dict(DTYPES)[dtype])
        for first in range(0, shape[0], step):
            offsets = torch.Size((first, *(0 for _ in shape[1:])))
            chunk = ChunkStorageMetadata(offsets, torch.Size((min(step, shape[0] - first), *shape[1:])))
            data = TensorWriteData(chunk, properties, torch.Size(shape))
            yield WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of one shard."""
        matrix, dtype = self.tensors[write_item.index.fqn]
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        each = prod(matrix.shape[1:-1])
        start, stop = (0, 1) if len(matrix.shape) == 1 else (chunk.offsets[0] * each, (chunk.offsets[0] + chunk.sizes[0]) * each)
        values = np.empty((stop - start, matrix.cols), carrier(dtype))
        for first, last in matrix.steps(start, stop):
            values[first - start : last - start] = matrix.block(first, last, 0, matrix.cols, dtype)
            self.done += values[first - start : last - start].nbytes
            if self.progress is not None:
                self.progress("writing", self.done, self.nbytes, time.monotonic() - self.begin_s)
        # numpy has no bfloat16: its bits travel as whole numbers
        whole = torch.from_numpy(values.view(np.int16) if dtype == "BF16" else values)
        return whole.view(dict(DTYPES)[dtype]).view(chunk.sizes)


class _Writer(dcp.FileSystemWriter):
    """Writes files of a limited size: of what is in one file, DCP keeps everything in memory until its end.

    notes: of files that are whole; those of earlier runs are not written again. resumed: bytes of tensors in them.
    """

    def __init__(self, folder: Path, planner: _Planner, notes: Mapping[str, Note], plan: str):
        super().__init__(folder, sync_files=True)
        self.folder, self.planner, self.earlier, self.plan = folder, planner, notes, plan
        self.notes, self.resumed = dict[str, Note](), 0

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files, filled = list[list[WriteItem]](), 0
        for item in plan.items:
            if not files or filled + _nbytes(item) > self.planner.shard_bytes:
                files.append([])
                filled = 0
            files[-1].append(item)
            filled += _nbytes(item)
        results: list[WriteResult] = []
        for number, items in enumerate(files):
            prefix = f"__0_{number}_"
            name = f"{prefix}0{DEFAULT_SUFFIX}"
            note = self.earlier.get(name)
            if note is None or len(note.places) != len(items):
                note = self._write(replace(plan, items=items, storage_data=_StoragePrefix(prefix)), name)
            else:
                self.resumed += sum(map(_nbytes, items))
                self.planner.done += sum(map(_nbytes, items))
            self.notes[name] = note
            # of a file that was there or not, in the same order: the same metadata follow from it
            for item, (offset, length) in zip(items, note.places, strict=True):
                results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, plan: SavePlan, name: str) -> Note:
        """One file, and its note."""
        found = {result.index: result.storage_data for result in super().write_data(plan, self.planner).wait()}
        path = self.folder / name
        places = tuple((found[item.index].offset, found[item.index].length) for item in plan.items)
        note = Note(path.stat().st_size, file_crc(path), places)
        note.write(path)
        return note

    def storage_meta(self) -> StorageMeta:
        """Nothing that differs from run to run: by default, a number drawn and the name of the folder that is renamed."""
        return StorageMeta(save_id=self.plan)


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _save(writer: _Writer, planner: _Planner) -> None:
    """Have DCP write what the planner says."""
    try:
        with warnings.catch_warnings():
            # that there is one process only is what is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        cause = error.failures[min(error.failures)][0]
        if isinstance(cause, MoefoldError | KeyboardInterrupt):
            raise cause from error
        what = f"{writer.folder} cannot be written: {type(cause).__name__}: {cause}"
        raise CheckpointError(f"{what}; run it again to go on from what is there") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock."""
    others = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if others and LOCK not in others:
        raise CheckpointError(f"{folder} has {others[0]} but no {LOCK}, so it is not an interrupted import: move it away")
    with locked(folder, LOCK):
        yield


def _check_space(folder: Path, need: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < need:
        what = (
            f"{size(need)} are to be written to {folder}, but its disk has {size(free)} free: make room, or choose another disk"
        )
        raise CheckpointError(what)
