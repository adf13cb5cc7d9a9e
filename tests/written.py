"""A small source checkpoint, and a mixture of all that is written from one: copies, slices, computed and repeated tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moefold.moe.hf.files import SINGLE, Checkpoint
from moefold.moe.hf.matrix import Cols, Matrix, Normal, Rows, Scaled, Stacked
from moefold.moe.hf.shards import Tensors
from moefold.moe.hf.writer import Written, write_checkpoint

CONFIG = {"model_type": "mixtral", "hidden_size": 24}
MANIFEST = {"method": "copy", "seed": 0}
SHARD_BYTES = 7000


def make_source(folder: Path) -> Path:
    torch.manual_seed(0)
    dense = {"up": torch.randn(40, 24), "down": torch.randn(24, 40), "norm": torch.randn(23)}
    save_file({name: value.bfloat16() for name, value in dense.items()}, folder / SINGLE)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


def mixture(source: Path) -> Tensors:
    """Copies, slices, scaled matrices that are repeated, a router in F32 behind an odd number of BF16 values."""
    dense = Checkpoint.open(source).tensors
    up, down = dense["up"], dense["down"]
    tensors: dict[str, tuple[Matrix, str]] = {"norm": (dense["norm"], "BF16"), "router": (Normal((4, 24), 0.02, 0, "r"), "F32")}
    for e in range(4):
        tensors[f"{e}.up"] = (Rows(up, 20 * (e % 2), 20 * (e % 2) + 20), "BF16")
        tensors[f"{e}.down"] = (Scaled(Cols(down, slice(20 * (e % 2), 20 * (e % 2) + 20)), 3.0), "BF16")
    tensors["both"] = (Stacked((up, Scaled(up, 0.5)), new_axis=True), "BF16")
    tensors["wide_router"] = (up, "F32")
    return tensors


def write(source: Path, out: Path, **options: Any) -> Written:
    settings = {"manifest": MANIFEST, "shard_bytes": SHARD_BYTES, "carry": [source / "tokenizer.json"]} | options
    return write_checkpoint(out, settings.pop("config", CONFIG), settings.pop("tensors", mixture(source)), **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_at(nbytes: int) -> Callable[[int, int, float], None]:
    def progress(done: int, total: int, seconds: float) -> None:
        if done >= nbytes:
            raise KeyboardInterrupt

    return progress
