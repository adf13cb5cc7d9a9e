"""What conversions return: facts for programs, and lines for people. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...moe.hf.rewrites import Rewrite
from ..upcycle.progress import size
from .source import Source

MODEL_TOML = "model.toml"
"""The section [model], beside an imported checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A training checkpoint made of a Hugging Face folder. nbytes: of its tensors. resumed: of these, what interrupted runs had
    written."""

    source: Source
    out: Path
    nbytes: int
    resumed: int = 0

    def to_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"source": str(self.source.path), "resumed_bytes": self.resumed}
        facts |= {"family": self.source.family, "dtype": self.source.dtype, "out": str(self.out)}
        facts |= {"parameters": self.source.config.num_params, "bytes": self.nbytes, "ignored": dict(self.source.ignored)}
        return facts | {"carried": [path.name for path in self.source.carry]}

    def render(self) -> str:
        earlier = f", of which {size(self.resumed)} by interrupted runs" if self.resumed else ""
        lines = [
            f"imported {self.source.describe()}",
            f"  {self.source.config.num_params:,} parameters, {size(self.nbytes)} in {self.out}{earlier}",
            *(f"  left out {name}: {reason}" for name, reason in self.source.ignored.items()),
            f"  train it: moefold pretrain {self.out / MODEL_TOML} TRAIN.toml --checkpoint.init_from {self.out}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A Hugging Face folder. rewrites: exact changes that the format made necessary. notes: what a user should know."""

    source: Source
    out: Path
    target: str
    dtype: str
    tensors: int
    nbytes: int
    rewrites: tuple[Rewrite, ...]
    carried: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"source": str(self.source.path), "out": str(self.out)}
        facts |= {"target": self.target, "dtype": self.dtype}
        facts |= {"tensors": self.tensors, "bytes": self.nbytes, "rewrites": [rewrite.name for rewrite in self.rewrites]}
        return facts | {"carried": list(self.carried), "notes": list(self.notes)}

    def render(self) -> str:
        lines = [
            f"wrote {self.source.describe()}",
            f"  as {self.target}, {self.dtype}: {self.tensors} tensors, {size(self.nbytes)} in {self.out}",
            *(f"  rewritten, same function: {rewrite.says}" for rewrite in self.rewrites),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines + ([f"  along with it: {', '.join(self.carried)}"] if self.carried else []))
