"""Experts in fused tensors, as transformers 5 has them in memory, are imported as if each had its own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moefold.launch.convert.compare import check
from moefold.launch.convert.run import export_checkpoint, import_checkpoint
from moefold.moe.errors import CheckpointError
from moefold.moe.hf.families import read_parts
from moefold.moe.hf.files import Checkpoint
from moefold.moe.hf.matrix import Stored
from tiny_models import MODELS, SIZES, randomize, stored, tiny_model

SIX = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "glm4_moe")
Change = Callable[[dict[str, Tensor]], None]


def turn(tensors: dict[str, Tensor]) -> None:
    """Both fused tensors of every layer transposed."""
    for name in tensors:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensors[name].transpose(1, 2)


def save(model: object, folder: Path, change: Change = lambda tensors: None) -> tuple[Path, Path]:
    """A model as transformers saves it, and as it is in memory."""
    usual, fused = folder / "usual", folder / "fused"
    model.save_pretrained(usual)  # type: ignore[attr-defined]
    tensors = dict(model.state_dict())  # type: ignore[attr-defined]
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in tensors), "transformers has experts fused in memory"
    change(tensors)
    fused.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fused / "model.safetensors", {"format": "pt"})
    shutil.copy(usual / "config.json", fused)
    shutil.copy(usual / "generation_config.json", fused)
    return usual, fused


def written(folder: Path) -> dict[str, bytes]:
    """Everything of a checkpoint but where it is."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("model.toml", ".metadata", "complete.json")}


@pytest.mark.parametrize("transposed", [False, True], ids=["memory", "transposed"])
@pytest.mark.parametrize("name", SIX)
def test_fused_experts_are_imported_bit_by_bit(name: str, transposed: bool, tmp_path: Path) -> None:
    usual, fused = save(tiny_model(name).to(torch.bfloat16), tmp_path, turn if transposed else lambda tensors: None)
    for folder in (usual, fused):
        import_checkpoint(folder, tmp_path / f"{folder.name}-native", shard_bytes=2048)
    assert written(tmp_path / "fused-native") == written(tmp_path / "usual-native")
    metas = [json.loads((tmp_path / f"{n}-native" / "complete.json").read_text()) for n in ("usual", "fused")]
    assert metas[0].keys() == metas[1].keys()
    assert all(metas[0][key] == metas[1][key] for key in metas[0].keys() - {"files", "crc32"})
    assert check(usual, fused).same
    if not transposed:
        export_checkpoint(tmp_path / "fused-native", tmp_path / "again")
        a, b = (Checkpoint.open(folder).tensors for folder in (usual, tmp_path / "again"))
        assert {n: stored(t) for n, t in a.items()} == {n: stored(t) for n, t in b.items()}


@pytest.mark.parametrize("transposed", [False, True], ids=["memory", "transposed"])
@pytest.mark.parametrize("width", [8, 16], ids=["2F=D", "F=D"])
def test_square_tensors_are_no_riddle(width: int, transposed: bool, tmp_path: Path) -> None:
    """One of the two tensors is square, so it fits both ways; the other one says which."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, keys = MODELS["olmoe"]
    config = AutoConfig.for_model(model_type, **{**SIZES, **keys, "intermediate_size": width})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    usual, fused = save(model, tmp_path, turn if transposed else lambda tensors: None)
    assert check(usual, fused).same


LAYER = "model.layers.0.mlp.experts"


def drop_down(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LAYER}.down_proj"]


def drop_gate(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LAYER}.gate_up_proj"]


def turn_one(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.down_proj"] = tensors[f"{LAYER}.down_proj"].transpose(1, 2)


def cut(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.gate_up_proj"] = tensors[f"{LAYER}.gate_up_proj"][:3]


def twice(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.2.up_proj.weight"] = torch.zeros(12, 16)


def whole_numbers(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.down_proj"] = tensors[f"{LAYER}.down_proj"].to(torch.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop_down, r"has model.layers.0.mlp.experts.gate_up_proj, but not model.layers.0.mlp.experts.down_proj"),
        (drop_gate, r"has model.layers.0.mlp.experts.down_proj, but not model.layers.0.mlp.experts.gate_up_proj"),
        (
            turn_one,
            r"have shapes \[4, 24, 16\] and \[4, 12, 16\], but config.json makes them \[4, 24, 16\] and \[4, 16, 12\], or",
        ),
        (cut, r"have shapes \[3, 24, 16\] and"),
        (twice, r"and model.layers.0.mlp.experts.2.up_proj.weight: experts are there in two forms"),
        (whole_numbers, r"down_proj is U8, so it is quantised"),
    ],
)
def test_fused_experts_that_cannot_be_read(change: Change, says: str, tmp_path: Path) -> None:
    _, fused = save(tiny_model("olmoe"), tmp_path, change)
    with pytest.raises(CheckpointError, match=says):
        import_checkpoint(fused, tmp_path / "out")


def test_one_module_under_two_names(tmp_path: Path) -> None:
    def name_twice(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.block_sparse_moe.gate.weight"] = torch.zeros(4, 16)

    _, fused = save(tiny_model("mixtral"), tmp_path, name_twice)
    with pytest.raises(
        CheckpointError, match=r"has model.layers.0.block_sparse_moe.gate.weight and model.layers.0.mlp.gate.weight"
    ):
        read_parts(Checkpoint.open(fused))


def test_transposed_tensors_are_read_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though rows are asked for in steps, and each of them is a column of the file."""
    _, fused = save(tiny_model("olmoe"), tmp_path, turn)
    checkpoint, read = Checkpoint.open(fused), list[int]()
    parts = read_parts(checkpoint)[1]
    block = Stored.block

    def counted(self: Stored, start: int, stop: int, left: int, right: int, dtype: str) -> object:
        read.append((stop - start) * (right - left))
        return block(self, start, stop, left, right, dtype)

    monkeypatch.setattr(Stored, "block", counted)
    for part, matrix in parts.items():
        if ".moe.experts." in part:
            for row in range(matrix.num_rows):
                matrix.block(row, row + 1, 0, matrix.cols, "F32")
    assert sum(read) == sum(math.prod(t.shape) for name, t in checkpoint.tensors.items() if ".experts." in name)
