"""Upcycling to attention experts, from files to files: refused where nothing holds them, and the same bits after a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from moefold.launch.config import load
from moefold.launch.convert.run import export_checkpoint, import_checkpoint
from moefold.launch.upcycle import proof, upcycle
from moefold.launch.upcycle.targets import RefusedError
from moefold.moe.config import ModelConfig
from moefold.moe.model import Block


@pytest.fixture
def specialists(dense_model: Any, tmp_path: Path) -> list[Path]:
    """Two models, one the other with other weights."""
    folders = [dense_model("Qwen3"), tmp_path / "other"]
    shutil.copytree(*folders)
    file, draw = folders[1] / "model.safetensors", np.random.default_rng(0)
    moved = {name: (w + draw.normal(0, 0.1, w.shape)).astype(w.dtype) for name, w in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})
    return folders


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_specialists_become_attention_experts_of_our_own_format(kv: str, specialists: list[Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "bam", "attention_expert_kv": kv, "inexact_ok": True}
    with pytest.raises(RefusedError) as told:
        upcycle(specialists, tmp_path / "out", **options)
    reasons = {p.where: p.what for p in told.value.problems}
    assert reasons["qwen3_moe"] == "attention_experts is 2, but attention experts are native only; legal: 1"
    assert reasons["instead"].startswith("--target native holds it")
    result = upcycle(specialists, tmp_path / "out", target="native", proof_tokens=24, **options)
    assert result.proof is not None and result.proof.passed and not result.proof.exact and result.tone == "warn"
    assert dict(result.facts())["attention"].startswith("2 experts in every layer, all run for each token, ")
    assert load(str(result.folder / "pretrain.toml")).config.model == result.config
    assert (result.config.attention_experts, result.config.attention_expert_kv) == (2, kv)
    uses = [source["tensors"] for source in result.manifest["sources"]]
    keys, queries = ([use[f"model.layers.0.self_attn.{p}_proj.weight"]["use"] for use in uses] for p in "kq")
    assert keys == (["copied"] * 2 if kv == "own" else ["transformed"] * 2) and queries == ["copied"] * 2
    import_checkpoint(result.folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again", target="moefold")
    written, again = (load_file(folder / "model.safetensors") for folder in (result.folder, tmp_path / "again"))
    assert written.keys() == again.keys() and all(np.array_equal(written[name], again[name]) for name in written)
    mixing = written["layers.1.attention.router.weight_ND"]
    assert mixing.shape == (2, 32) and 0.01 < mixing.std() < 0.04


def test_the_same_model_twice_is_that_model(dense_model: Any, tmp_path: Path) -> None:
    folder = dense_model("Qwen3")
    result = upcycle([folder] * 2, tmp_path / "out", target="native", method="bam", inexact_ok=True, proof_tokens=24)
    assert result.proof is not None and result.proof.end.worst < 1e-5 and result.proof.worst.worst < 1e-5


def test_in_16_bits_routers_stay_as_wide_as_they_were(dense_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of attention experts too: training computes their logits in float32."""
    seen: dict[str, list[Tensor]] = {}
    added = proof.added

    def watched(block: Block, config: ModelConfig, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        for name, weight in block.named_parameters():
            if config.attention_experts > 1:
                seen.setdefault(name, []).append(weight.clone())
        return added(block, config, x_BSD)

    monkeypatch.setattr(proof, "added", watched)
    folder = dense_model("Qwen3", torch.bfloat16)
    upcycle([folder] * 2, tmp_path / "out", target="native", method="bam", inexact_ok=True, proof_tokens=24)
    routers = {name for name in seen if "router" in name}
    assert routers == {"attention.router.weight_ND", "moe.router.weight_ED"}
    for name, weights in seen.items():
        assert {w.dtype for w in weights} == {torch.float32} | ({torch.bfloat16} if name not in routers else set()), name
