"""Checkpoints that any layout can load: written aside, verified, renamed; `latest` moves last.

checkpoints/step-00001000/   __0_0.distcp ... .metadata   torch.distributed.checkpoint, logical names and global shapes
                             complete.json                 written last: step, model, size and CRC-32 of every file
checkpoints/latest           name of the newest complete one
checkpoints/.step-*.partial  being written, or left by a process that was killed: removed by the next save
"""

from __future__ import annotations

import json
import shutil
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..moe.errors import CheckpointError
from ..parallel.engine import Engine
from .resume import completed_checkpoints
from .rundir import write_atomic, write_json

SCHEMA = 1
KEYS = ("crc32", "data", "files", "layout", "model", "names", "schema", "shapes", "step", "tokens")
"""What complete.json holds."""
PREVIOUS = "train.balance.previous_LE"
T = TypeVar("T")


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
        # on a mesh of CPUs, or the copy would go back to the device
        mesh = DeviceMesh("cpu", value.device_mesh.mesh, _init_backend=False)
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


def _crc_of(meta: Mapping[str, Any]) -> int:
    """CRC-32 of complete.json without its own entry."""
    rest = {key: value for key, value in meta.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode())


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
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._on_disk: int | None = None

    def save(self, engine: Engine, meta: Mapping[str, Any]) -> None:
        """Save the state after `engine.step` steps; nothing is written where this step was saved here or loaded from here.

        meta: `model`, `data`, `layout`, `tokens`, kept in complete.json.
        Raises CheckpointError on every rank for a failed earlier save, or for this one if not background.
        """
        self.wait()
        if self._on_disk == engine.step:
            return
        state = {name: _copy(value) for name, value in engine_state(engine).items()}
        shapes = parameter_shapes(engine)
        meta = {**meta, "schema": SCHEMA, "step": engine.step, "names": sorted(state), "shapes": shapes}
        self._on_disk = engine.step
        # a daemon, because a thread that waits for a lost rank must not keep a failed process alive
        self._thread = threading.Thread(
            target=self._write, args=(state, meta, engine.step), name="moefold-checkpoint", daemon=True
        )
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the save under way, if any, for at most `timeout_s`. Raises CheckpointError, on every rank, if it failed;
        earlier checkpoints are untouched."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise CheckpointError(f"saving to {self.folder} has not ended after {timeout_s:g} s")
            self._thread = None
        if self._error is not None:
            error, self._error, self._on_disk = self._error, None, None
            raise CheckpointError(f"saving to {self.folder} failed: {error}; earlier checkpoints are kept") from error

    def _write(self, state: dict[str, Tensor], meta: dict[str, Any], step: int) -> None:
        aside = self.folder / f".step-{step:08d}.partial"
        try:
            self._all(lambda: self._clear() if self.rank == 0 else None)
            self._all(lambda: dcp.save(state, checkpoint_id=aside, process_group=self.group))
            files = self._all(lambda: described(sorted(aside.glob(f"__{self.rank}_*"))))
            merged = {name: entry for part in files for name, entry in part.items()}
            self._all(lambda: self._complete(aside, meta, merged) if self.rank == 0 else None)
        except BaseException as error:  # the thread has nobody else to tell
            self._error = error
            if self.rank == 0:
                # what is left would fill the disk further
                shutil.rmtree(aside, ignore_errors=True)

    def _all(self, work: Callable[[], T]) -> list[T]:
        """`work()` of every rank; raises CheckpointError on all ranks if any of them fails."""
        mine: tuple[T | None, str | None]
        cause: BaseException | None = None
        try:
            mine = (work(), None)
        except (Exception, CheckpointException) as error:
            cause, mine = error, (None, f"rank {_origin(error, self.rank)}: {_reason(error)}")
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine, group=self.group)
        problem = next((text for _, text in everyone if text is not None), None)
        if problem is not None:
            raise CheckpointError(problem) from cause
        return [value for value, _ in everyone]

    def _clear(self) -> None:
        """Remove what killed processes left."""
        for path in (*self.folder.glob(".step-*.partial"), *self.folder.glob(".step-*.old")):
            shutil.rmtree(path)

    def _complete(self, aside: Path, meta: dict[str, Any], files: dict[str, Any]) -> None:
        """Rank 0: check that every tensor is there, then make the checkpoint visible under its name, and remove old ones."""
        stored = dcp.FileSystemReader(aside).read_metadata().state_dict_metadata
        missing = sorted(set(meta["names"]) - set(stored))
        if missing:
            raise CheckpointError(f"{len(missing)} tensors were not written, the first is {missing[0]}")
        hidden = [n for n, (size, _) in files.items() if not (aside / n).is_file() or (aside / n).stat().st_size != size]
        if hidden:
            raise CheckpointError(
                f"rank 0 does not see {hidden[0]}: the run directory must be on a file system that all nodes share"
            )
        write_complete(aside, {**meta, "files": {**files, **described([aside / ".metadata"])}})
        target = self.folder / f"step-{meta['step']:08d}"
        if target.exists():
            _remove(target)
        aside.rename(target)
        write_atomic(self.folder / "latest", target.name)
        # those of later steps belong to a future that this run does not go to; they are not its to remove
        known = [p for p in completed_checkpoints(self.folder) if int(p.name.removeprefix("step-")) <= meta["step"]]
        for old in known[: -self.keep]:
            _remove(old)

    def load(
        self,
        path: Path,
        engine: Engine,
        *,
        weights_only: bool = False,
        accept: Callable[[Mapping[str, Any]], str | None] | None = None,
    ) -> Restored:
        """Load a checkpoint of any layout into `engine`, in place. Collective.

        accept: a further check of complete.json; returns what is wrong with it.

        Raises:
            CheckpointError: on every rank: incomplete, damaged, foreign, or of another model; nothing has been changed then.
        """
        meta = self._verify(path, engine, weights_only, accept)
        engine.reshard()
        state = engine_state(engine, weights_only=weights_only)
        if not weights_only:
            state.pop(PREVIOUS, None)
            if PREVIOUS in meta["names"]:
                layers, experts = len(engine.layers), engine.layers[0].config.num_experts
                state[PREVIOUS] = torch.zeros(layers, experts, dtype=torch.float64, device=engine.mesh.device)
        self._all(lambda: dcp.load(state, checkpoint_id=path, process_group=self.group))
        if weights_only:
            return Restored(0, meta)
        engine.step = meta["step"]
        engine.optimizer.set_step(engine.step)
        engine.balancer.previous_LE = state.get(PREVIOUS)
        torch.set_rng_state(state["train.rng"])
        if path.resolve().parent == self.folder.resolve():
            self._on_disk = engine.step
        return Restored(engine.step, meta)

    def _verify(
        self, path: Path, engine: Engine, weights_only: bool, accept: Callable[[Mapping[str, Any]], str | None] | None
    ) -> dict[str, Any]:
        """The contents of complete.json, after checking files and model. All ranks raise together."""
        meta: dict[str, Any] = {}
        problem: str | None = None
        try:
            meta = read_complete(path)
            problem = (
                self._damage(path, meta["files"])
                or (None if weights_only else _without_optimizer(meta))
                or _other_model(meta, engine, weights_only)
                or (accept and accept(meta))
                or None
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"complete.json cannot be read ({type(error).__name__}: {error}); it is not a complete moefold checkpoint"
        problems: list[str | None] = [None] * self.world
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
            if index % self.world == self.rank and file_crc(file) != crc:
                return f"{name} does not hold what was written (CRC-32 differs)"
        return None


def _origin(error: BaseException, rank: int) -> int:
    """The rank that an error comes from; torch's CheckpointException, raised on every rank, carries it."""
    return min(error.failures) if isinstance(error, CheckpointException) else rank


def _reason(error: BaseException) -> str:
    """Type and first line of the error itself."""
    if isinstance(error, CheckpointException):
        error = error.failures[min(error.failures)][0]
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def described(files: list[Path]) -> dict[str, list[int]]:
    """Name -> [size, CRC-32]."""
    return {p.name: [p.stat().st_size, file_crc(p)] for p in files}


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a crash on the way never leaves one that looks complete."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def write_complete(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write complete.json, after everything else: from then on the checkpoint is one. meta: `KEYS` but crc32."""
    write_json(folder / "complete.json", {**meta, "crc32": _crc_of(meta)})


def read_complete(path: Path) -> dict[str, Any]:
    """complete.json. Raises ValueError for contents that are not ours, or have been changed."""
    meta = json.loads((path / "complete.json").read_text(encoding="utf-8"))
    if not isinstance(meta, dict):
        raise ValueError("it is not an object")
    if meta.get("schema") != SCHEMA:
        raise ValueError(f"it has schema {meta.get('schema')}, this version reads {SCHEMA}")
    missing = [key for key in KEYS if key not in meta]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    if meta["crc32"] != _crc_of(meta):
        raise ValueError("it does not hold what was written (CRC-32 differs)")
    return meta


def _without_optimizer(meta: Mapping[str, Any]) -> str | None:
    """Why a run cannot go on from a checkpoint that has no state of an optimizer, such as an imported one."""
    if any(name.startswith("optimizer.") for name in meta["names"]):
        return None
    return "it holds weights only, so there is nothing to resume; start a new run from it with checkpoint.init_from"


def _other_model(meta: Mapping[str, Any], engine: Engine, weights_only: bool) -> str | None:
    """How the tensors of the checkpoint differ from those of the engine at hand."""
    theirs: dict[str, list[int]] = meta["shapes"]
    ours = parameter_shapes(engine)
    lines = [f"{n} is {theirs[n]} there and {ours[n]} here" for n in ours if n in theirs and theirs[n] != ours[n]]
    kinds = ("model.",) if weights_only else ("model.", "optimizer.")
    there = {n for n in meta["names"] if n.startswith(kinds)}
    here = {f"model.{n}" for n in (*ours, *(name for name, _ in engine.model.named_buffers()))}
    if not weights_only:
        here |= {f"optimizer.{key}.{n}" for n in ours for key in ("exp_avg", "exp_avg_sq")}
    lines += [f"{n} is only in the checkpoint" for n in sorted(there - here)]
    lines += [f"{n} is only in the model" for n in sorted(here - there)]
    if not lines:
        return None
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    return f"it holds another model: {'; '.join(lines[:3])}{more}; use the [model] section it was trained with"


def parameter_shapes(engine: Engine) -> dict[str, list[int]]:
    """Global shape of every parameter by logical name, as kept in complete.json."""
    return {p.placement.name: list(p.placement.global_shape) for p in engine.parameters}
