"""What is converted or compared: a Hugging Face folder, or a training checkpoint, as one kind of thing. Imports no torch
until it meets a training checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ...moe.config import ModelConfig
from ...moe.errors import CheckpointError
from ...moe.hf.families import carried, family_of, ignored_tensors, read_parts
from ...moe.hf.files import CONFIG, Checkpoint
from ...moe.hf.fused import unfused
from ...moe.hf.matrix import Constant, Matrix, WeightedSum
from ..resume import find_checkpoint
from ..upcycle.progress import Told

TRAINED = "F32"
"""dtype of weights that were trained here."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model in files.

    kind: "hf", a Hugging Face folder, or "training". path: of the folder itself. family: `model_type` of the folder, or of that
    which a training checkpoint was imported from; None for one that was trained. parts: in the order of files. dtype: of the
    weights in the folder, or that which was imported. dtypes: of parts that are stored otherwise. special: special tokens in
    config.json. carry: files to take along. ignored: tensors that are no part of the model, with the reason. step: of training.
    """

    kind: Literal["hf", "training"]
    path: Path
    family: str | None
    config: ModelConfig
    parts: Mapping[str, Matrix]
    dtype: str
    dtypes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    special: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    carry: tuple[Path, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    step: int | None = None

    def describe(self) -> str:
        """In a few words."""
        if self.kind == "hf":
            return f"{self.path} ({self.family}, {self.dtype})"
        origin = f"imported from {self.family}, {self.dtype}" if self.family else f"step {self.step}"
        return f"{self.path} (training checkpoint, {origin})"

    def imported(self) -> dict[str, Any]:
        """What a training checkpoint made of this one notes of it, so that it can be written as it was."""
        names = [path.name for path in self.carry]
        facts = {"family": self.family, "dtype": self.dtype, "dtypes": dict(self.dtypes)}
        return facts | {"special": dict(self.special), "carry": names}


def open_source(path: str | Path, progress: Told | None = None) -> Source:
    """A Hugging Face folder, a training checkpoint, or the latest checkpoint of a run directory.

    progress: told while the files of a training checkpoint are checked.
    Raises CheckpointError for a path that is none of these and for damaged files; ConfigError for a model that cannot be
    represented.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; pass a Hugging Face folder, a checkpoint or a run directory")
    found = find_checkpoint(path)
    if found is not None:
        return _training(found, progress)
    if (path / CONFIG).is_file():
        return open_hf(path)
    if (path / ".metadata").is_file() or list(path.glob("__*_*.distcp")):
        raise CheckpointError(f"{path} has no complete.json: it was not written to its end, so take an earlier checkpoint")
    raise CheckpointError(
        f"{path} is neither a Hugging Face folder (it has no {CONFIG}) nor a checkpoint or run directory (no complete checkpoint)"
    )


def open_hf(path: str | Path) -> Source:
    """A Hugging Face folder. Raises as `Checkpoint.open` and `read_parts` do."""
    checkpoint = Checkpoint.open(path)
    family = family_of(checkpoint.config, checkpoint.tensors)
    config, parts = read_parts(checkpoint)
    layouts, tensors = family.tensors(config), unfused(checkpoint, family, config)
    dtypes = {p: tensors[name].dtype for name, layout in layouts.items() for p in layout.parts}
    return Source(
        kind="hf",
        path=checkpoint.folder,
        family=family.model_type,
        config=config,
        parts=parts,
        dtype=checkpoint.dtype,
        dtypes={part: dtype for part, dtype in dtypes.items() if dtype != checkpoint.dtype},
        special=carried(checkpoint.config),
        carry=checkpoint.carry,
        ignored=ignored_tensors(checkpoint, family, config),
    )


def shifted(matrix: Matrix) -> Matrix | None:
    """The w of a file whose part is 1 + w, as in Gemma's norms; else None."""
    if isinstance(matrix, WeightedSum) and matrix.parts[1:] == (Constant(matrix.shape, 1.0),) and matrix.weights == (1.0, 1.0):
        return matrix.parts[0]
    return None


def _training(path: Path, progress: Told | None) -> Source:
    from .native_read import open_native

    native = open_native(path.absolute(), progress)
    noted = native.imported
    carry = tuple(native.path / name for name in noted.get("carry", ()) if (native.path / name).is_file())
    return Source(
        kind="training",
        path=native.path,
        family=noted.get("family"),
        config=native.config,
        parts=native.parts,
        dtype=noted.get("dtype", TRAINED),
        dtypes=noted.get("dtypes", {}),
        special=noted.get("special", {}),
        carry=carry,
        step=native.meta["step"],
    )
