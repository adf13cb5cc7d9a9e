"""Where a written model comes from: hashes of the sources, options, versions, and what became of every tensor.

It is known as a whole before anything is written, and the same on every run: that is how an interrupted one is gone on with.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...moe.config import ModelConfig
from ...moe.errors import CheckpointError
from ...moe.hf.codec import FLOATS
from ...moe.hf.families import family_of, ignored_tensors, read_parts
from ...moe.hf.family import Family
from ...moe.hf.files import Checkpoint, file_sha256
from ...moe.hf.journal import write_durably
from ...moe.hf.matrix import (
    Cols,
    Constant,
    Joined,
    Matrix,
    Padded,
    RepeatRows,
    Reshaped,
    Rows,
    Scaled,
    Stacked,
    Stored,
    WeightedSum,
)
from ...moe.hf.shards import Tensors
from ...moe.hf.transposed import Transposed
from ...moe.upcycle.choices import Picked, Renewed
from ...moe.upcycle.options import UpcycleOptions
from .progress import Told
from .targets import Candidate

SCHEMA = 1
MOVED = (Rows, Cols, Picked, Stacked, Joined, Reshaped, RepeatRows, Padded, Transposed)
"""Matrices whose values are those of what they are made of, elsewhere."""


@dataclass(frozen=True)
class Source:
    """A dense model to start from. ignored: tensors that are no part of it, with the reason."""

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig
    parts: Mapping[str, Matrix]
    ignored: Mapping[str, str]

    @classmethod
    def open(cls, folder: str | Path) -> Source:
        """Read headers and config.json. Raises CheckpointError and ConfigError as `Checkpoint.open` and `read_parts`."""
        checkpoint = Checkpoint.open(folder)
        family = family_of(checkpoint.config, checkpoint.tensors)
        config, parts = read_parts(checkpoint)
        return cls(checkpoint, family, config, parts, ignored_tensors(checkpoint, family, config))


@dataclass
class Use:
    """What became of one tensor. into: tensors of the result made of it. ways: how, besides being cut and put together."""

    into: list[str] = field(default_factory=list)
    ways: set[str] = field(default_factory=set)

    def to_dict(self) -> dict[str, Any]:
        ways = sorted(self.ways)
        return {"use": "transformed" if ways else "copied", "into": len(self.into), "first": self.into[0]} | (
            {"by": ways} if ways else {}
        )


def tensor_uses(sources: Sequence[Source], tensors: Tensors, options: UpcycleOptions) -> list[dict[str, dict[str, Any]]]:
    """For each source, every tensor: copied, transformed (how), or ignored (why). Raises CheckpointError for one that is lost."""
    uses: dict[tuple[Path, int], Use] = {}
    for name, (matrix, dtype) in tensors.items():
        for stored, ways in _leaves(matrix, frozenset()):
            use = uses.setdefault((stored.path, stored.offset), Use())
            if not use.into or use.into[-1] != name:
                use.into.append(name)
            use.ways |= ways | ({f"stored as {dtype}"} if dtype != stored.dtype else set())
    found = []
    for number, source in enumerate(sources):
        table: dict[str, dict[str, Any]] = {}
        for name, tensor in source.checkpoint.tensors.items():
            known = uses.get((tensor.path, tensor.offset))
            reason = source.ignored.get(name) or (None if known else _left_out(number, options))
            if reason is None and known is None:
                raise CheckpointError(
                    f"{source.checkpoint.folder}: {name} would be in no tensor of the result, so it would be lost"
                )
            table[name] = {"use": "ignored", "why": reason} if reason or known is None else known.to_dict()
        found.append(table)
    return found


def _left_out(number: int, options: UpcycleOptions) -> str | None:
    """Why nothing is made of a tensor though it is a part of its model; None where there is no good reason."""
    if options.method == "flex_olmo" and number in options.without:
        return "this model opted out"
    if options.method == "flex_olmo" and number:
        return "only feed-forward networks are taken from this model; all else is the public one's"
    return None


def _leaves(matrix: Matrix, ways: frozenset[str]) -> Iterator[tuple[Stored, frozenset[str]]]:
    """Stored tensors that a matrix is made of, each with what is done to its values on the way."""
    if isinstance(matrix, Stored):
        yield matrix, ways
        return
    if isinstance(matrix, Scaled):
        ways = ways | ({f"times {matrix.factor:.9g}"} if matrix.factor != 1 else set())
    elif isinstance(matrix, WeightedSum):
        ways = ways | {"weighted sum"}
    elif isinstance(matrix, Renewed):
        ways = ways | {"partly drawn anew"}
    elif not isinstance(matrix, MOVED):
        ways = ways | {type(matrix).__name__}
    for child in matrix.children():
        yield from _leaves(child, ways)


def narrower(dtype: str, than: str) -> bool:
    """Whether values of one type lose bits in another. F16 and BF16 each lose what the other has."""
    wide = FLOATS[:2]
    return dtype != than and (dtype not in wide if than in FLOATS[2:] else FLOATS.index(dtype) > FLOATS.index(than))


def rounds(matrix: Matrix, dtype: str) -> bool:
    """Whether a 16-bit tensor holds computed values, rounded once more. Powers of two round nothing."""
    if dtype in FLOATS[:2]:
        return False
    if isinstance(matrix, Stored):
        return narrower(dtype, matrix.dtype)
    if isinstance(matrix, Scaled) and math.frexp(abs(matrix.factor))[0] not in (0.0, 0.5):
        return True
    if not isinstance(matrix, (*MOVED, Scaled, Constant)):
        return True
    return any(rounds(child, dtype) for child in matrix.children())


def source_hashes(sources: Sequence[Source], cache: Path, told: Told) -> list[dict[str, str]]:
    """SHA-256 of the files of each source. Kept in `cache`, so that a run that goes on need not read everything once more."""
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}  # absent, or cut short by a power cut: computed again
    found, begin_s = [], time.monotonic()
    total = sum(size for source in sources for size in source.checkpoint.files.values())
    before = 0
    for source in sources:
        stamp = {str(source.checkpoint.folder / n): _stamp(source.checkpoint.folder / n) for n in source.checkpoint.files}
        key = json.dumps(stamp, sort_keys=True)
        if not (isinstance(known, dict) and isinstance(known.get(key), dict)):

            def step(done: int, _: int, __: float, before: int = before) -> None:
                told("hashing", before + done, total, time.monotonic() - begin_s)

            known = {**(known if isinstance(known, dict) else {}), key: source.checkpoint.hashes(step)}
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_durably(cache, json.dumps(known))
        found.append(dict(known[key]))
        before += sum(source.checkpoint.files.values())
    return found


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def make_manifest(
    sources: Sequence[Source],
    hashes: Sequence[Mapping[str, str]],
    taken: Candidate,
    uses: Sequence[Mapping[str, Mapping[str, Any]]],
    *,
    runtime: str,
    dtype: str,
) -> dict[str, Any]:
    """moefold.json but the sizes of files, which the writer adds. Nothing in it depends on when it is made."""
    assert taken.options is not None
    return {
        "made_by": "moefold upcycle",
        "schema": SCHEMA,
        "versions": {"moefold": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "target": taken.target,
        "runtime": runtime,
        "dtype": dtype,
        "exact": taken.gap is None,
        "gap": taken.gap,
        "rewrites": [{"name": rewrite.name, "says": rewrite.says} for rewrite in taken.rewrites],
        "options": json.loads(json.dumps(asdict(taken.options))),
        "inputs": _inputs(taken.options, taken.config),
        "sources": [
            {
                "folder": str(source.checkpoint.folder),
                "model_type": source.family.model_type,
                "dtype": source.checkpoint.dtype,
                "files": {n: {"bytes": size, "sha256": sha[n]} for n, size in source.checkpoint.files.items()},
                "tensors": {name: dict(use) for name, use in table.items()},
            }
            for source, sha, table in zip(sources, hashes, uses, strict=True)
        ],
    }


def _inputs(options: UpcycleOptions, config: ModelConfig | None) -> dict[str, str]:
    """SHA-256 of further files that the result depends on."""
    layers = config.moe_layers if config is not None else ()
    paths = [options.centroids] if options.centroids else []
    paths += [path for i in layers if (path := options.activations_of(i)) is not None]
    return {path: file_sha256(Path(path)) for path in dict.fromkeys(paths)}
