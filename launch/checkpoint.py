"""Checkpoints that any layout can load: written aside, verified, renamed; `latest` moves last.

checkpoints/step-00001000/   __0_0.distcp ... .metadata   torch.distributed.checkpoint, logical names and global shapes
                             complete.json                 written last: step, model, size and CRC-32 of every file
checkpoints/latest           name of the newest complete one
"""

from __future__ import annotations

import json
import shutil
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..moe.errors import CheckpointError
from ..parallel.engine import Engine
from .rundir import write_atomic, write_json

SCHEMA = 1


@dataclass(frozen=True)
class Restored:
    """What a checkpoint says about the run it came from."""

    step: int
    meta: Mapping[str, Any]


def engine_state(engine: Engine, *, weights_only: bool = False) -> dict[str, Tensor]:
    """Every tensor of the training state under its logical name; loading into them in place restores the engine."""
    state: dict[str, Tensor] = {f"model.{p.placement.name}": p.logical(p.local, engine.mesh) for p in engine.parameters}
    state |= {f"model.{name}": buffer for name, buffer in engine.model.named_buffers()}
    if weights_only:
        return state
    for parameter, key, local in engine.optimizer.moments():
        state[f"optimizer.{key}.{parameter.placement.name}"] = parameter.logical(local, engine.mesh)
    state["train.rng"] = torch.get_rng_state()
    state |= {f"train.balance.{k}": v for k, v in engine.balancer.state_dict().items()}
    return state


def _copy(value: Tensor) -> Tensor:
    """A copy on CPU that later updates do not touch."""
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        local = value.to_local().detach().to("cpu", copy=True)
        return DTensor.from_local(local, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())
    return value.detach().to("cpu", copy=True)


def file_crc(path: Path) -> int:
    """CRC-32 of a file, read in pieces of 1 MiB."""
    crc = 0
    with path.open("rb") as f:
        while piece := f.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return crc


class Checkpointer:
    """Saves and loads the checkpoints of one run. Every rank has one and calls it at the same steps.

    Args:
        folder: `checkpoints/` of the run directory, seen by all ranks.
        keep: newest checkpoints that stay.
        background: write in a thread while training goes on. At most one save is under way.
    """

    def __init__(self, folder: Path, *, keep: int, background: bool):
        self.folder, self.keep, self.background = folder, keep, background
        # of its own, so that a save in the background never meets a collective of training
        self.group = dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, engine: Engine, meta: Mapping[str, Any]) -> None:
        """Save the state after `engine.step` steps. Raises CheckpointError for a failed earlier save, or for this one if not background."""
        self.wait()
        state = {name: _copy(value) for name, value in engine_state(engine).items()}
        meta = {**meta, "schema": SCHEMA, "step": engine.step, "names": sorted(state)}
        self._thread = threading.Thread(target=self._write, args=(state, meta, engine.step), name="moefold-checkpoint")
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if any. Raises CheckpointError if it failed; earlier checkpoints are untouched."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"saving to {self.folder} failed: {error}; the last complete checkpoint is kept") from error

    def _write(self, state: dict[str, Tensor], meta: dict[str, Any], step: int) -> None:
        try:
            target = self.folder / f"step-{step:08d}"
            aside = self.folder / f".step-{step:08d}.partial"
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            dist.barrier(group=self.group)
            dcp.save(state, checkpoint_id=aside, process_group=self.group)
            mine = {p.name: [p.stat().st_size, file_crc(p)] for p in sorted(aside.glob(f"__{self.rank}_*"))}
            files: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(files, mine, group=self.group)
            if self.rank == 0:
                self._complete(aside, target, meta, {k: v for part in files for k, v in part.items()})
            dist.barrier(group=self.group)
        except BaseException as error:
            self._error = error

    def _complete(self, aside: Path, target: Path, meta: dict[str, Any], files: dict[str, Any]) -> None:
        """Rank 0: check that every tensor is there, then make the checkpoint visible under its name."""
        stored = dcp.FileSystemReader(aside).read_metadata().state_dict_metadata
        missing = sorted(set(meta["names"]) - set(stored))
        if missing:
            raise CheckpointError(f"{len(missing)} tensors were not written, the first is {missing[0]}")
        metadata = aside / ".metadata"
        files[".metadata"] = [metadata.stat().st_size, file_crc(metadata)]
        write_json(aside / "complete.json", {**meta, "files": files})
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        write_atomic(self.folder / "latest", target.name)
        complete = sorted(p for p in self.folder.glob("step-*") if (p / "complete.json").is_file())
        for old in complete[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, path: Path, engine: Engine, *, weights_only: bool = False) -> Restored:
        """Load a checkpoint of any layout into `engine`, in place. Collective.

        Raises:
            CheckpointError: incomplete, damaged, foreign, or of another model; nothing has been changed then.
        """
        meta = self._verify(path, engine)
        engine.reshard()
        if not weights_only and "train.balance.previous_LE" in meta["names"]:
            layers, experts = len(engine.layers), engine.layers[0].config.num_experts
            engine.balancer.previous_LE = torch.zeros(layers, experts, dtype=torch.float64, device=engine.mesh.device)
        state = engine_state(engine, weights_only=weights_only)
        try:
            dcp.load(state, checkpoint_id=path, process_group=self.group)
        except Exception as error:
            raise CheckpointError(f"{path} cannot be loaded: {error}") from error
        if weights_only:
            return Restored(0, meta)
        engine.step = meta["step"]
        engine.optimizer.set_step(engine.step)
        torch.set_rng_state(state["train.rng"])
        return Restored(engine.step, meta)

    def _verify(self, path: Path, engine: Engine) -> dict[str, Any]:
        """The contents of complete.json, after checking files and model. All ranks raise together."""
        meta: dict[str, Any] = {}
        problem: str | None = None
        try:
            meta = json.loads((path / "complete.json").read_text())
            if meta.get("schema") != SCHEMA:
                problem = f"it has schema {meta.get('schema')}, this version reads {SCHEMA}"
            else:
                problem = self._damage(path, meta["files"]) or self._other_model(meta, engine)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"complete.json cannot be read ({type(error).__name__}: {error}); it is not a complete moefold checkpoint"
        problems: list[str | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(problems, problem, group=self.group)
        first = next((p for p in problems if p), None)
        if first:
            raise CheckpointError(f"{path} cannot be used: {first}")
        return meta

    def _damage(self, path: Path, files: Mapping[str, Any]) -> str | None:
        """What is wrong with the files; sizes are checked by every rank, contents are shared out."""
        for index, (name, (size, crc)) in enumerate(sorted(files.items())):
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {size} were written: it is truncated or was changed"
            if index % dist.get_world_size(self.group) == self.rank and file_crc(file) != crc:
                return f"{name} does not hold what was written (CRC-32 differs)"
        return None

    @staticmethod
    def _other_model(meta: Mapping[str, Any], engine: Engine) -> str | None:
        """How the model of the checkpoint differs in shape from the one at hand."""
        theirs: dict[str, list[int]] = meta["shapes"]
        ours = {p.placement.name: list(p.placement.global_shape) for p in engine.parameters}
        lines = [f"{n} is {theirs[n]} there and {ours[n]} here" for n in ours if n in theirs and theirs[n] != ours[n]]
        lines += [f"{n} is only in the checkpoint" for n in sorted(set(theirs) - set(ours))]
        lines += [f"{n} is only in the model" for n in sorted(set(ours) - set(theirs))]
        if not lines:
            return None
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        return f"it holds another model: {'; '.join(lines[:3])}{more}; use the [model] section it was trained with"


def parameter_shapes(engine: Engine) -> dict[str, list[int]]:
    """Global shape of every parameter by logical name, as kept in complete.json."""
    return {p.placement.name: list(p.placement.global_shape) for p in engine.parameters}
